"""A draft model distilled on its target's own samples.

Stages, each resumable: samples of the target with their laws; a common start; a short pilot of each
divergence; the final run of the one whose drafts were accepted most; a calibration of its confidence.

Paper: Zhou et al., "DistillSpec: Improving Speculative Decoding via Knowledge Distillation", 2023.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..decoding.draft_model import MEASURED, confidence_features
from ..decoding.logits import guide
from ..decoding.noise import Noise, draw
from ..errors import InputError, unknown_name
from ..files import write_json
from ..models.llamagen import LlamaGen, LlamaGenTransformer
from .llamagen_samples import Drawn, draw_from_target, together
from .loop import Chance, FitConfig, Objective, shortened
from .stages import Stage, run_stages, stage_seconds

DIVERGENCES = {
    "forward_kl": "KL(p, q): the draft covers everything that the target does",
    "reverse_kl": "KL(q, p): the draft avoids what the target does not do",
    "jensen_shannon": "the mean of both KLs from the mean of the laws: between the two",
    "total_variation": "half the L1 distance, one minus the probability of acceptance itself",
}


def divergence(name: str, logp: Tensor, logq: Tensor) -> Tensor:
    """Divergence [...] of the draft's laws `logq` from the target's `logp`, both [..., V].

    Raises:
        InputError: an unknown name.
    """
    if name == "forward_kl":
        return (logp.exp() * (logp - logq)).sum(-1)
    if name == "reverse_kl":
        return (logq.exp() * (logq - logp)).sum(-1)
    if name == "jensen_shannon":
        middle = torch.logaddexp(logp, logq) - math.log(2)
        sides = (logp.exp() * (logp - middle)).nan_to_num(nan=0.0) + logq.exp() * (logq - middle)
        return 0.5 * sides.sum(-1)
    if name == "total_variation":
        return 0.5 * (logp.exp() - logq.exp()).abs().sum(-1)
    raise unknown_name("divergence", name, DIVERGENCES)


class DraftObjective(Objective):
    """Divergence of the guided draft from the guided target along the target's samples.

    Args:
        transformer: the draft, class-conditional.
        drawn: samples and laws.
        divergence: a name in `DIVERGENCES`.

    Raises:
        InputError: an unknown divergence, or a draft of another size than the samples.
    """

    def __init__(self, transformer: LlamaGenTransformer, drawn: Drawn, divergence: str) -> None:
        super().__init__()
        if divergence not in DIVERGENCES:
            raise unknown_name("divergence", divergence, DIVERGENCES)
        shape = (transformer.num_tokens, transformer.config["vocab_size"])
        if drawn.logp.shape[1:] != shape:
            raise InputError(
                f"the draft gives {shape[0]} laws over {shape[1]} tokens: expected "
                f"{tuple(drawn.logp.shape[1:])}, as the target's samples have"
            )
        self.transformer, self.drawn, self.divergence = transformer, drawn, divergence
        self.num_items = len(drawn.tokens)

    def laws(self, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """Guided log-probabilities [B, N, V] of target and draft along samples."""
        embed = self.transformer.cls_embedding
        null = torch.full_like(drawn.labels, self.transformer.config["num_classes"])
        rows = embed(torch.cat([drawn.labels, null]))
        logits = self.transformer.teacher_forced(rows, drawn.tokens.repeat(2, 1))
        guided = guide(*logits.chunk(2), drawn.scales[:, None, None])  # pyright: ignore
        return drawn.logp.float(), guided.log_softmax(-1)

    def inputs(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Samples and the laws they were drawn from."""
        return vars(self.drawn.rows(indices))

    def loss(self, inputs: dict[str, Tensor], chance: Chance) -> dict[str, Tensor]:
        """Mean divergence per token, and the mean probability of acceptance (1 - TV)."""
        logp, logq = self.laws(Drawn(**inputs))
        loss = divergence(self.divergence, logp, logq).mean()
        overlap = torch.minimum(logp, logq.detach()).exp().sum(-1).mean()
        return {"loss": loss, "acceptance": overlap}


@torch.no_grad()
def measure(transformer: LlamaGenTransformer, drawn: Drawn, seed: int = 0) -> dict[str, Any]:
    """Drafts along samples that were not trained on, and what would become of them.

    Args:
        transformer: the draft.
        drawn: samples of the target with their laws.
        seed: of the drafts.

    Returns:
        By coupling, "acceptance" [M, N] (a probability, or 0 and 1 under Gumbel coupling) and
        "features" [M, N, 4].
    """
    found: dict[str, dict[str, list[Tensor]]] = {
        name: {"acceptance": [], "features": []} for name in MEASURED
    }
    objective = DraftObjective(transformer.eval(), drawn, "forward_kl")
    for index in torch.arange(len(drawn.tokens)).split(64):
        part = drawn.rows(index)
        logp, logq = objective.laws(part)
        noise = Noise([(seed, int(k)) for k in index])
        positions = torch.arange(logq.shape[1]).expand(len(index), -1)
        gumbel = noise.gumbel(positions, logq.shape[2], logq.dtype)
        for name, numbers in found.items():
            if name == "gumbel":
                scores = logq + gumbel
                drafts = scores.argmax(-1)
                accepted = (drafts == (logp + gumbel).argmax(-1)).float()
            else:
                scores, drafts = logq, draw(logq.exp(), noise.uniform(positions, "draft"))
                ratio = (logp - logq).gather(-1, drafts[..., None])[..., 0]
                accepted = ratio.clamp(max=0).exp()
            numbers["acceptance"].append(accepted)
            numbers["features"].append(confidence_features(logq, scores, drafts))
    return {
        name: {key: torch.cat(parts) for key, parts in numbers.items()}
        for name, numbers in found.items()
    }


def acceptance_figures(measured: dict[str, Any], scales: Tensor) -> dict[str, float]:
    """Mean acceptance by coupling and guidance scale, "gumbel at guidance 3" and so on."""
    return {
        f"{name} at guidance {scale:g}": float(numbers["acceptance"][scales == scale].mean())
        for name, numbers in measured.items()
        for scale in scales.unique().tolist()
    }


def calibrate(features: Tensor, acceptance: Tensor, steps: int = 30) -> list[float]:
    """Weights of the logistic function of `features` that predicts `acceptance` best.

    Args:
        features: [..., 4], see `arvision.decoding.draft_model.confidence_features`.
        acceptance: [...], probabilities.
        steps: of Newton's method.
    """
    x, y = features.flatten(0, -2).double(), acceptance.flatten().double()
    weights = torch.zeros(x.shape[1], dtype=x.dtype)
    ridge = 1e-3 * torch.eye(len(weights), dtype=x.dtype)
    for _ in range(steps):
        predicted = (x @ weights).sigmoid()
        gradient = x.T @ (predicted - y) / len(y) + ridge @ weights
        curvature = (x * (predicted * (1 - predicted))[:, None]).T @ x / len(y) + ridge
        weights = weights - torch.linalg.solve(curvature, gradient)
    return [round(value, 4) for value in weights.tolist()]


@dataclass
class _Work:
    """What the stages of one run hand to each other.

    Attributes:
        target: whose drafts are made.
        training: settings.
        drawn: samples to learn from.
        held_out: samples to measure on.
        drafts: finished ones by their stage.
        pilots: measured acceptance by divergence.
    """

    target: LlamaGen
    training: DraftTraining
    drawn: Drawn
    held_out: Drawn
    drafts: dict[str, LlamaGenTransformer] = field(default_factory=dict)
    pilots: dict[str, dict[str, float]] = field(default_factory=dict)

    def best(self) -> str:
        """The divergence whose pilot's drafts were accepted most.

        Judged where drafts are used most: the first of the guidance scales, both couplings alike.
        """
        scale = f"at guidance {next(iter(self.training.samples)):g}"
        sums = {
            name: sum(found[f"{coupling} {scale}"] for coupling in MEASURED)
            for name, found in self.pilots.items()
        }
        return max(sums, key=lambda name: sums[name])


@dataclass(frozen=True, kw_only=True)
class DraftStage(Stage[_Work]):
    """The draft from scratch, or from where another stage left it.

    Attributes:
        divergence: a name in `DIVERGENCES`; None for the pilots' best.
        start: stage whose weights it starts from; None for random ones.
    """

    divergence: str | None = None
    start: str | None = None

    def objective(self, work: _Work) -> DraftObjective:
        """Divergence of the draft's guided laws from the target's."""
        sizes = {k: v for k, v in work.target.transformer.config.items() if not k.startswith("_")}
        draft = LlamaGenTransformer(**sizes | work.training.sizes)
        if self.start is not None:
            draft.load_state_dict(work.drafts[self.start].state_dict())
        return DraftObjective(draft, work.drawn, self.divergence or work.best())

    def finish(self, work: _Work, objective: DraftObjective) -> None:
        """The draft."""
        work.drafts[self.name] = objective.transformer


@dataclass(frozen=True, kw_only=True)
class PilotStage(DraftStage):
    """A short trial of a divergence, measured on the samples held out."""

    def finish(self, work: _Work, objective: DraftObjective) -> None:
        """The measured acceptance."""
        measured = measure(objective.transformer, work.held_out)
        work.pilots[objective.divergence] = acceptance_figures(measured, work.held_out.scales)


@dataclass(frozen=True, kw_only=True)
class DraftTraining:
    """Settings of `train_draft`.

    Attributes:
        sizes: arguments of `LlamaGenTransformer` that differ from the target's.
        samples: target samples to train on, by guidance scale.
        held_out: the first samples of each scale, kept for measuring.
        batch_size: of sampling.
        divergences: the ones to try.
        start_fit: common start of the pilots, with the first of the divergences.
        pilot_fit: settings of a pilot.
        final_fit: settings of the final run, which begins where the common start ended.
    """

    sizes: dict[str, Any] = field(
        default_factory=lambda: {
            "hidden_size": 128,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 336,
        }
    )
    samples: dict[float, int] = field(default_factory=lambda: {3.0: 12_288, 1.0: 2_048})
    held_out: int = 256
    batch_size: int = 128
    divergences: tuple[str, ...] = ("forward_kl", "reverse_kl", "total_variation")
    start_fit: FitConfig = FitConfig(
        steps=400, batch_size=32, learning_rate=2e-3, mixed_precision="bf16"
    )
    pilot_fit: FitConfig = FitConfig(
        steps=150, batch_size=32, learning_rate=1e-3, warmup=20, mixed_precision="bf16"
    )
    final_fit: FitConfig = FitConfig(
        steps=3200, batch_size=32, learning_rate=2e-3, mixed_precision="bf16", seed=1
    )

    def __post_init__(self) -> None:
        for name in self.divergences:
            if name not in DIVERGENCES:
                raise unknown_name("divergence", name, DIVERGENCES)
        if not self.divergences or any(n <= self.held_out for n in self.samples.values()):
            raise InputError(
                f"{self.samples} samples with {self.held_out} held out and divergences "
                f"{self.divergences}: expected more samples than held out, and a divergence"
            )

    def stages(self) -> list[DraftStage]:
        """A common start, a pilot of each divergence, the final run of the best."""
        first = DraftStage(name="start", fit=self.start_fit, divergence=self.divergences[0])
        pilots = [
            PilotStage(name=f"pilot-{name}", fit=self.pilot_fit, divergence=name, start="start")
            for name in self.divergences
        ]
        return [first, *pilots, DraftStage(name="final", fit=self.final_fit, start="start")]


@dataclass(frozen=True)
class DraftResult:
    """What `train_draft` returns.

    Attributes:
        transformer: the draft.
        calibration: weights by coupling, see `arvision.decoding.draft_model.Calibration`.
        figures: acceptances of the pilots and of the final draft, sizes, seconds.
    """

    transformer: LlamaGenTransformer
    calibration: dict[str, list[float]]
    figures: dict[str, Any]


def train_draft(
    target: LlamaGen,
    out: Path,
    training: DraftTraining | None = None,
    *,
    progress: bool = True,
) -> DraftResult:
    """Distil a draft of `target`; every stage resumes from what lies in `out`.

    Args:
        target: a class-conditional model.
        out: takes the samples, the checkpoints and `figures.json`.
        training: settings.
        progress: show bars on stderr.

    Raises:
        InputError: a target that is not class-conditional, or sizes that do not fit.
        CheckpointError: `out` holds checkpoints of other settings.
    """
    training = training or DraftTraining()
    if target.transformer.is_text_conditional:
        raise InputError("the target is text-conditional: expected a class-conditional model")
    held_out, drawn = [], []
    for scale, num in training.samples.items():
        part = draw_from_target(
            target,
            out / "samples",
            {scale: num},
            batch_size=training.batch_size,
            progress=progress,
        )
        held_out.append(part.rows(slice(0, training.held_out)))
        drawn.append(part.rows(slice(training.held_out, None)))
    work = _Work(target, training, together(drawn), together(held_out))
    stages = training.stages()
    run_stages(stages, work, out, progress=progress)
    final = work.drafts["final"]
    measured = measure(final, work.held_out)
    figures = {
        "divergence": work.best(),
        "pilots": work.pilots,
        "acceptance": acceptance_figures(measured, work.held_out.scales),
        "parameters": final.num_parameters(),
        "target_parameters": target.transformer.num_parameters(),
        "samples": {f"{scale:g}": num for scale, num in training.samples.items()},
        "seconds": stage_seconds(out, stages),
    }
    write_json(out / "figures.json", figures)
    calibration = {name: calibrate(**numbers) for name, numbers in measured.items()}
    return DraftResult(final, calibration, figures)


@dataclass(frozen=True, kw_only=True)
class DraftRecipe:
    """A draft by name.

    Attributes:
        target: name of the target's recipe.
        card: "kind", "conditions", "summary" and "draft_for" of the draft.
        training: settings.
    """

    target: str
    card: dict[str, str]
    training: DraftTraining = field(default_factory=DraftTraining)

    def shortened(self, steps: int, num_samples: int) -> DraftRecipe:
        """The same recipe with at most `steps` steps per stage on `num_samples` of each scale."""
        old = self.training
        training = shortened(
            old,
            steps,
            samples={scale: min(num_samples, num) for scale, num in old.samples.items()},
            held_out=min(old.held_out, num_samples // 4),
        )
        return replace(self, training=training)


DRAFT_RECIPES = {
    "llamagen-fashion-draft": DraftRecipe(
        target="llamagen-fashion",
        card={
            "kind": "token",
            "conditions": "class",
            "summary": "Draft model for llamagen-fashion, a sixth of its size: tokens, no images",
            "draft_for": "llamagen-fashion",
        },
    )
}
