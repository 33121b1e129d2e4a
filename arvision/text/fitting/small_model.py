"""A small draft model for a language model: pre-trained on text if wanted, distilled on its answers.

Stages, each resumable: pre-training on the user's own texts (FastDraft); a short pilot of each divergence
where the best is asked for; the alignment with the target, along its answers and, for a share of each
batch, along answers that the draft draws itself (DistillSpec's on-policy data).

Papers: Zhou et al., "DistillSpec: Improving Speculative Decoding via Knowledge Distillation", 2023; Zafrir
et al., "FastDraft: How to Train Your Draft", 2024 (which aligns on the target's tokens; here, on its laws).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError, unknown_name
from ...training.llamagen_draft import DIVERGENCES
from ...training.llamagen_draft import divergence as divergence_of
from ...training.loop import Chance, FitConfig, Objective, fit, full_precision
from ..layers import find_layers
from .data import Answers, answer, split_answers
from .pretrain import PretrainObjective, fresh_copy

SMALL_FIT = FitConfig(
    steps=300, batch_size=4, learning_rate=1e-3, warmup=20, mixed_precision="bf16", log_every=10
)
PRETRAIN_FIT = replace(SMALL_FIT, steps=400, batch_size=8, learning_rate=2e-3)

STARTS = {
    "layers": "the target's first and last layers, its embeddings and its output layer",
    "fresh": "a narrower network of the target's class, drawn at random",
}


@dataclass(frozen=True, kw_only=True)
class SmallTraining:
    """Settings of `train_small_model`.

    Attributes:
        divergence: a name in `DIVERGENCES`, or "auto": a pilot of each tells which suits the task.
        temperature: of the runs that the draft is for, which is what "auto" judges by; 0 is greedy.
        on_policy: share of each batch whose answers the draft draws itself, anew in each step.
        start: a name in `STARTS`.
        share: of the target's layers, at least two.
        width: of a fresh draft, as a share of the target's.
        length: tokens of a text that are read, from its start.
        pretrain_fit: of the pre-training.
        fit: of the alignment; pilots take a quarter of its steps.

    Raises:
        InputError: an unknown name, or a number out of range.
    """

    divergence: str = "forward_kl"
    temperature: float = 0.0
    on_policy: float = 0.0
    start: str = "layers"
    share: float = 0.1
    width: float = 1 / 3
    length: int = 160
    pretrain_fit: FitConfig = PRETRAIN_FIT
    fit: FitConfig = SMALL_FIT

    def __post_init__(self) -> None:
        if self.divergence not in (*DIVERGENCES, "auto"):
            raise unknown_name("divergence", self.divergence, [*DIVERGENCES, "auto"])
        if self.start not in STARTS:
            raise unknown_name("start", self.start, STARTS)
        if not 0 <= self.on_policy <= 1 or not self.temperature >= 0:
            raise InputError(
                f"on_policy {self.on_policy}, temperature {self.temperature}: expected a share in "
                "[0, 1] and a number >= 0"
            )
        if not 0 < self.share < 1 or not 0 < self.width <= 1 or self.length < 4:
            raise InputError(
                f"share {self.share}, width {self.width}, length {self.length}: expected shares "
                "and at least 4 tokens"
            )


def small_copy(network: Any, share: float = 0.1, kept: Sequence[int] | None = None) -> Any:
    """Some of the target's layers, its embeddings and its output layer, as a model of its own.

    Args:
        network: a causal language model of transformers.
        share: of the layers, at least two; spread evenly, the first and the last among them.
        kept: numbers of layers, ascending, instead.

    Raises:
        InputError: a network whose layers are in no list.
    """
    owner, name = find_layers(network)
    layers = getattr(owner, name)
    if kept is None:
        num = max(2, round(share * len(layers)))
        kept = torch.linspace(0, len(layers) - 1, num).round().long().tolist()
    num = len(kept)
    if num >= len(layers):
        raise InputError(f"a draft of {num} layers for a target of {len(layers)}: expected fewer")
    config = copy.deepcopy(network.config)
    config.num_hidden_layers = num
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in kept]
    for field in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, field):
            delattr(config, field)
    draft = type(network)(config)
    small_owner, small_name = find_layers(draft)
    for layer, index in zip(getattr(small_owner, small_name), kept, strict=True):
        layer.load_state_dict(layers[index].state_dict())
    rest = {key: value for key, value in network.state_dict().items() if f"{name}." not in key}
    draft.load_state_dict(rest, strict=False)
    draft.generation_config = copy.deepcopy(network.generation_config)
    return draft.float()


class SmallModelObjective(Objective):
    """Divergence of the draft's laws from the target's along the target's answers, or its own.

    Args:
        draft: what is trained.
        network: the target, frozen.
        answers: of the target.
        training: settings; the divergence must be one of `DIVERGENCES`.
    """

    def __init__(self, draft: Any, network: Any, answers: Answers, training: SmallTraining) -> None:
        super().__init__()
        self.draft, self._frozen = draft, (network,)
        self._answers, self._training = answers, training
        if training.start == "layers":
            # Embeddings and output layer stay the target's: most of the weights, and they fit already.
            draft.get_input_embeddings().weight.requires_grad_(False)
            draft.get_output_embeddings().weight.requires_grad_(False)
        self.num_items = len(answers.texts)

    def inputs(self, indices: Tensor, generator: torch.Generator) -> dict[str, Any]:
        """Texts, and where the answer of each begins."""
        chosen = indices.tolist()
        texts = [torch.tensor([self._answers.texts[i][: self._training.length]]) for i in chosen]
        return {"texts": texts, "starts": [self._answers.starts[i] for i in chosen]}

    def loss(self, inputs: dict[str, Any], chance: Chance) -> dict[str, Tensor]:
        """Mean divergence per token of the answers, and the mean probability of acceptance."""
        texts, starts = inputs["texts"], inputs["starts"]
        count = round(self._training.on_policy * len(texts))
        if count:
            texts = [*self.own(texts[:count], starts[:count], chance), *texts[count:]]
        losses, overlaps = [], []
        for text, start in zip(texts, starts, strict=True):
            logp, logq = self.laws(text, start)
            losses.append(divergence_of(self._training.divergence, logp, logq).mean())
            overlaps.append(torch.minimum(logp, logq.detach()).exp().sum(-1).mean())
        return {"loss": torch.stack(losses).mean(), "acceptance": torch.stack(overlaps).mean()}

    def laws(self, text: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities [N, V] of target and draft along the answer in a text [1, L]."""
        first = min(start, text.shape[1] - 1) - 1
        with torch.no_grad():
            logp = self._frozen[0](text, use_cache=False).logits[0, first:].float().log_softmax(-1)
        logq = self.draft(text, use_cache=False).logits[0, first:].float().log_softmax(-1)
        return logp, logq

    def own(self, texts: list[Tensor], starts: list[int], chance: Chance) -> list[Tensor]:
        """The same prompts with answers that the draft draws, as long as the ones they replace."""
        prompts = [text[0, :start].tolist() for text, start in zip(texts, starts, strict=True)]
        longest = max(text.shape[1] - len(ids) for text, ids in zip(texts, prompts, strict=True))
        seed = int(chance.randint(1 << 31, 1)[0])
        was_training = self.draft.training
        self.draft.eval()
        try:
            with torch.no_grad(), full_precision(self.device):
                drawn = answer(
                    self.draft,
                    prompts,
                    num_tokens=max(1, longest),
                    batch_size=len(prompts),
                    temperature=1.0,
                    seed=seed,
                    progress=False,
                )
        finally:
            self.draft.train(was_training)
        return [
            torch.tensor([ids[: text.shape[1]]], device=text.device)
            for ids, text in zip(drawn.texts, texts, strict=True)
        ]

    @torch.no_grad()
    def measured(self, temperature: float) -> dict[str, float]:
        """How good drafts along these answers would be.

        Returns:
            "agreement", how often the draft's best token is the target's, and "acceptance", the mean
            of 1 - TV between the laws at `temperature` (1 where it is 0).
        """
        hits, overlaps = [], []
        for index in range(self.num_items):
            inputs = self.inputs(torch.tensor([index]), torch.Generator())
            logp, logq = self.laws(inputs["texts"][0].to(self.device), inputs["starts"][0])
            hits.append(logp.argmax(-1) == logq.argmax(-1))
            sharp = [(law / (temperature or 1.0)).softmax(-1) for law in (logp, logq)]
            overlaps.append(torch.minimum(*sharp).sum(-1))
        return {
            "agreement": round(float(torch.cat(hits).float().mean()), 4),
            "acceptance": round(float(torch.cat(overlaps).mean()), 4),
        }


def train_small_model(
    network: Any,
    tokenizer: Any,
    answers: Answers,
    out: Path,
    training: SmallTraining | None = None,
    *,
    blocks: Tensor | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a small draft model and save it in `out` as transformers does; resumes.

    Args:
        network: the target.
        tokenizer: saved beside the draft; None for none.
        answers: of the target; a tenth is held out.
        out: takes the checkpoints and the draft.
        training: settings.
        blocks: ids [M, L] of text to pre-train on; None for no pre-training.
        progress: show bars on stderr.

    Returns:
        Figures: "agreement" and "acceptance" on the answers held out, "divergence" and the "pilots'"
        figures, "loss" of the last logged step, "parameters", "layers", "seconds" (all stages).

    Raises:
        InputError: bad settings, a target with too few layers, or too few answers.
    """
    training = training or SmallTraining()
    torch.manual_seed(0)
    device = network.get_input_embeddings().weight.device
    if training.start == "layers":
        draft = small_copy(network, training.share)
    else:
        draft = fresh_copy(network, training.share, training.width)
    draft.to(device)
    learn, held = split_answers(answers)
    seconds, pilots = 0.0, {}
    if blocks is not None:
        stage = PretrainObjective(draft, blocks)
        log = fit(stage, training.pretrain_fit, out / "pretrain", device=device, progress=progress)
        seconds += log[-1]["seconds"]
    if training.divergence == "auto":
        short = replace(training.fit, steps=max(1, training.fit.steps // 4))
        for name in DIVERGENCES:
            pilot = replace(training, divergence=name, fit=short)
            trial = SmallModelObjective(copy.deepcopy(draft), network, learn, pilot)
            log = fit(trial, short, out / f"pilot-{name}", device=device, progress=progress)
            seconds += log[-1]["seconds"]
            judge = SmallModelObjective(trial.draft, network, held, pilot)
            pilots[name] = judge.measured(training.temperature)
        by = "acceptance" if training.temperature else "agreement"
        best = max(pilots, key=lambda name: pilots[name][by])
        training = replace(training, divergence=best)
    objective = SmallModelObjective(draft, network, learn, training)
    log = fit(objective, training.fit, out / "fit", device=device, progress=progress)
    figures = SmallModelObjective(draft, network, held, training).measured(training.temperature)
    draft.requires_grad_(True).eval().to(network.dtype).save_pretrained(out)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    return figures | {
        "divergence": training.divergence,
        "pilots": pilots,
        "loss": log[-1]["loss"],
        "parameters": sum(parameter.numel() for parameter in draft.parameters()),
        "layers": draft.config.num_hidden_layers,
        "seconds": round(seconds + log[-1]["seconds"], 1),
    }
