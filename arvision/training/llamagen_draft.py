"""A draft model distilled on its target's own samples.

Stages, each resumable: samples of the target with their laws; a common start; a short pilot of each
divergence; the final run of the one whose drafts were accepted most; a calibration of its confidence.
Part of each batch may be the draft's own samples (on-policy), with the target's laws along them.

Paper: Zhou et al., "DistillSpec: Improving Speculative Decoding via Knowledge Distillation", 2023.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..contracts import TokenModel
from ..decoding.draft_model import MEASURED, confidence_features
from ..decoding.logits import guide
from ..decoding.noise import Noise, draw
from ..decoding.teacher_forcing import teacher_forced
from ..errors import InputError, unknown_name
from ..files import write_json
from ..models.llamagen import LlamaGen, LlamaGenTransformer
from .captions import every_caption
from .llamagen_samples import SMALLEST_LOGP, Drawn, draw_from_target, plain_tokens, together
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
    """Divergence of the guided draft from the guided target along samples of the target, or its own.

    Args:
        transformer: the draft.
        drawn: samples of the target, and laws.
        divergence: a name in `DIVERGENCES`.
        target: of a text-conditional draft, whose text encoder it shares, or with `on_policy`.
        conditions: what the samples' labels number; None for classes.
        on_policy: share of each batch in whose place the draft draws samples of its own, anew in each
            step; the target's laws along them are what it learns from.

    Raises:
        InputError: an unknown divergence, or a draft of another size than the samples.
    """

    def __init__(
        self,
        transformer: LlamaGenTransformer,
        drawn: Drawn,
        divergence: str,
        target: LlamaGen | None = None,
        conditions: Sequence[Any] | None = None,
        on_policy: float = 0.0,
    ) -> None:
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
        self.target, self.on_policy = target, on_policy
        captions = None if target is None else target.captions
        texts: dict[str, Any] = {}
        if captions is not None:
            texts["text_encoder"] = captions.text_encoder
            texts["text_tokenizer"] = captions.text_tokenizer
        self.model = LlamaGen(transformer, **texts)
        self.conditions = range(transformer.config["num_classes"] or 0)
        if conditions is not None:
            self.conditions = conditions
        if target is not None:
            self.beside = (target.transformer, *list(texts.values())[:1])

    def asked(self, labels: Tensor) -> list[Any]:
        """The conditions with these numbers [B]."""
        return [self.conditions[label] for label in labels.tolist()]

    def laws(self, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """Guided log-probabilities [B, N, V] of target and draft along samples."""
        rows, null, valid = self.model.rows(self.asked(drawn.labels))
        mask = None if valid is None else valid.repeat(2, 1)
        both = torch.cat([rows, null])
        logits = self.transformer.teacher_forced(both, drawn.tokens.repeat(2, 1), mask)
        guided = guide(*logits.chunk(2), drawn.scales[:, None, None])  # pyright: ignore
        return drawn.logp.float(), guided.log_softmax(-1)

    def inputs(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Samples and the laws they were drawn from."""
        return vars(self.drawn.rows(indices))

    def loss(self, inputs: dict[str, Tensor], chance: Chance) -> dict[str, Tensor]:
        """Mean divergence per token, and the mean probability of acceptance (1 - TV)."""
        drawn = Drawn(**inputs)
        count = round(self.on_policy * len(drawn.tokens))
        if count:
            own = self._own(drawn.rows(slice(0, count)), chance)
            drawn = together([own, drawn.rows(slice(count, None))])
        logp, logq = self.laws(drawn)
        loss = divergence(self.divergence, logp, logq).mean()
        overlap = torch.minimum(logp, logq.detach()).exp().sum(-1).mean()
        return {"loss": loss, "acceptance": overlap}

    @torch.no_grad()
    def _own(self, drawn: Drawn, chance: Chance) -> Drawn:
        """Samples of the draft in the place of others, with the target's laws along them."""
        assert self.target is not None
        asked, parts = self.asked(drawn.labels), []
        numbers = chance.randint(1 << 31, len(asked)).tolist()
        for scale in drawn.scales.unique().tolist():
            index = (drawn.scales == scale).nonzero()[:, 0]
            some = [asked[k] for k in index.tolist()]
            tokens = plain_tokens(
                self.model, some, [(numbers[k], 0) for k in index.tolist()], scale
            )
            logits = teacher_forced(cast(TokenModel, self.target), some, tokens, scale)
            logp = logits.log_softmax(-1).clamp(min=SMALLEST_LOGP).to(drawn.logp.dtype)
            parts.append(Drawn(tokens, logp, drawn.labels[index], drawn.scales[index]))
        return together(parts)


@torch.no_grad()
def measure(
    transformer: LlamaGenTransformer,
    drawn: Drawn,
    seed: int = 0,
    target: LlamaGen | None = None,
    conditions: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """Drafts along samples that were not trained on, and what would become of them.

    Args:
        transformer: the draft.
        drawn: samples of the target with their laws.
        seed: of the drafts.
        target: of a text-conditional draft.
        conditions: of the samples; None for classes.

    Returns:
        By coupling, "acceptance" [M, N] (a probability, or 0 and 1 under Gumbel coupling) and
        "features" [M, N, 4].
    """
    found: dict[str, dict[str, list[Tensor]]] = {
        name: {"acceptance": [], "features": []} for name in MEASURED
    }
    objective = DraftObjective(transformer.eval(), drawn, "forward_kl", target, conditions)
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

        Judged by the task: the first of the guidance scales, and the coupling that drafts are for
        (both alike where the training names none).
        """
        coupling = self.training.coupling
        judges = MEASURED if coupling is None else [coupling]
        scale = f"at guidance {next(iter(self.training.samples)):g}"
        sums = {
            name: sum(found[f"{each} {scale}"] for each in judges)
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
        training = work.training
        return DraftObjective(
            draft,
            work.drawn,
            self.divergence or work.best(),
            work.target,
            training.conditions,
            training.on_policy if self.divergence is None else 0.0,
        )

    def finish(self, work: _Work, objective: DraftObjective) -> None:
        """The draft."""
        work.drafts[self.name] = objective.transformer


@dataclass(frozen=True, kw_only=True)
class PilotStage(DraftStage):
    """A short trial of a divergence, measured on the samples held out."""

    def finish(self, work: _Work, objective: DraftObjective) -> None:
        """The measured acceptance."""
        more = (work.target, work.training.conditions)
        measured = measure(objective.transformer, work.held_out, 0, *more)
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
        coupling: under which drafts will be judged, "gumbel" or "independent": the divergence whose
            pilot does best there is taken; None for both alike.
        conditions: captions of a text-conditional target, which take turns; None for classes.
        on_policy: share of the draft's own samples in the batches of the final run.
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
    coupling: str | None = None
    conditions: Sequence[str] | None = None
    on_policy: float = 0.0
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
        if self.coupling is not None and self.coupling not in MEASURED:
            raise unknown_name("coupling", self.coupling, MEASURED)
        if not 0 <= self.on_policy <= 1:
            raise InputError(f"on_policy {self.on_policy}: expected a share in [0, 1]")
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
        target: a class- or text-conditional model.
        out: takes the samples, the checkpoints and `figures.json`.
        training: settings.
        progress: show bars on stderr.

    Raises:
        InputError: captions that are missing or have no effect, or sizes that do not fit.
        CheckpointError: `out` holds checkpoints of other settings.
    """
    training = training or DraftTraining()
    if target.transformer.is_text_conditional != (training.conditions is not None):
        raise InputError("conditions: expected captions with a text-conditional target, else None")
    held_out, drawn = [], []
    for scale, num in training.samples.items():
        part = draw_from_target(
            target,
            out / "samples",
            {scale: num},
            batch_size=training.batch_size,
            progress=progress,
            conditions=training.conditions,
        )
        held_out.append(part.rows(slice(0, training.held_out)))
        drawn.append(part.rows(slice(training.held_out, None)))
    work = _Work(target, training, together(drawn), together(held_out))
    stages = training.stages()
    run_stages(stages, work, out, progress=progress)
    final = work.drafts["final"]
    measured = measure(final, work.held_out, 0, target, training.conditions)
    figures = {
        "divergence": work.best(),
        "on_policy": training.on_policy,
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
    ),
    "llamagen-fashion-t2i-draft": DraftRecipe(
        target="llamagen-fashion-t2i",
        card={
            "kind": "token",
            "conditions": "text",
            "summary": "Draft model for llamagen-fashion-t2i, a sixth of its size: tokens, no images",
            "draft_for": "llamagen-fashion-t2i",
        },
        training=DraftTraining(
            conditions=every_caption(), samples={3.0: 8192, 1.0: 1024}, on_policy=0.5
        ),
    ),
}
