"""Medusa-2: heads and backbone learn together, so that the backbone's states say more of what follows.

The target changes by it: what is saved beside the heads is another model, near the old one as far as
the old one's laws were held on to, and drafts are verified against that one.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...training.llamagen_draft import divergence
from ...training.loop import Chance, FitConfig, fit
from ..drafters.heads import DraftHeads, load_heads, save_heads
from ..layers import find_layers
from .data import Answers, TextExamples, read_texts, split_answers
from .heads import HeadObjective, HeadTraining, train_heads

BACKBONE = "backbone"
"""Folder of the trained target, within that of the heads."""


@dataclass(frozen=True, kw_only=True)
class Medusa2Training:
    """Settings of `train_medusa2`.

    Attributes:
        heads: of the first stage, in which the heads learn alone.
        weight: of the heads' loss, beside the divergence of the backbone from what it was.
        share: learning rate of the backbone, as a share of the heads'.
        num_layers: last layers of the backbone that are trained; None for all.
        fit: settings of the second stage; a step takes whole texts.

    Raises:
        InputError: heads of another kind, or a value out of range.
    """

    heads: HeadTraining = field(default_factory=lambda: HeadTraining(kind="medusa"))
    weight: float = 0.2
    share: float = 0.25
    num_layers: int | None = None
    fit: FitConfig = field(
        default_factory=lambda: FitConfig(
            steps=100, batch_size=4, learning_rate=1e-3, warmup=20, mixed_precision="bf16"
        )
    )

    def __post_init__(self) -> None:
        if self.heads.kind != "medusa" or self.weight <= 0 or not 0 < self.share <= 1:
            raise InputError(
                f"heads {self.heads.kind!r}, weight {self.weight}, share {self.share}: expected "
                "'medusa', > 0, in (0, 1]"
            )
        if self.num_layers is not None and self.num_layers < 1:
            raise InputError(f"num_layers {self.num_layers}: expected >= 1")


class JointObjective(HeadObjective):
    """The heads' divergence on the backbone's own states, and that of the backbone from what it was.

    Args:
        backbone: what is trained with the heads.
        whole: [V, C], the target's output layer.
        settings: of both.
        given: of `HeadObjective`; the examples are those of the target before.
    """

    def __init__(
        self,
        heads: DraftHeads,
        backbone: Any,
        whole: Tensor,
        settings: Medusa2Training,
        *given: Any,
    ) -> None:
        super().__init__(heads, *given)
        self.backbone, self._whole, self._settings = backbone, whole, settings

    def rate_share(self, name: str) -> float:
        """See `Objective`."""
        return 1.0 if name.startswith("heads.") else self._settings.share

    def read(self, texts: Tensor, hidden: Tensor) -> Tensor:
        """What the backbone makes of texts now, at all places but the last."""
        return self.backbone.get_decoder()(texts, use_cache=False)[0][:, :-1].float()

    def _laws_of_backbone(self, places: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log-probabilities [M, V] of what the target was, and of the backbone."""
        found = (places["teacher"][:, 0], places["seen"])
        logp, logq = (
            (hidden.to(self._whole.dtype) @ self._whole.T).float().log_softmax(-1)
            for hidden in found
        )
        return logp, logq

    def loss(self, inputs: dict[str, Tensor], chance: Chance) -> dict[str, Tensor]:
        """See `Objective`."""
        places = self.places(inputs)
        found = self.loss_at(places)
        moved = divergence("forward_kl", *self._laws_of_backbone(places)).mean()
        loss = moved + self._settings.weight * found["loss"]
        return {"loss": loss, "moved": moved.detach(), "agreement": found["agreement"]}

    @torch.no_grad()
    def change(self) -> dict[str, float]:
        """How far the backbone is from what it was, at places of answers: the mean divergence in nats,
        and how often the likeliest token is the same."""
        moved, same = [], []
        for index in range(self.num_items):
            inputs = self.inputs(torch.tensor([index]), torch.Generator())
            inputs = {key: value.to(self.device) for key, value in inputs.items()}
            logp, logq = self._laws_of_backbone(self.places(inputs))
            moved.append(divergence("forward_kl", logp, logq))
            same.append(logp.argmax(-1) == logq.argmax(-1))
        return {
            "divergence": round(float(torch.cat(moved).mean()), 5),
            "same_token": round(float(torch.cat(same).float().mean()), 4),
        }


def trainable_copy(network: Any, num_layers: int | None) -> Any:
    """A copy of a target in float32, of which the last layers are trained (None: all of them)."""
    backbone = copy.deepcopy(network).float().requires_grad_(False)
    owner, name = find_layers(backbone)
    layers = getattr(owner, name)
    for layer in layers[-(num_layers or len(layers)) :]:
        layer.requires_grad_(True)
    if isinstance(norm := getattr(owner, "norm", None), torch.nn.Module):
        norm.requires_grad_(True)
    return backbone


def train_medusa2(
    network: Any,
    tokenizer: Any,
    answers: Answers,
    out: Path,
    training: Medusa2Training | None = None,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Fit heads alone, then heads and backbone together; both are saved in `out`; resumes.

    Embeddings and output layer stay the target's: the heads end in them, and its laws before the
    training are read from them.

    Args:
        network: the target; it stays as it is.
        tokenizer: saved with the backbone; None for none.
        answers: the target's own answers.
        out: folder for checkpoints, the heads, and the backbone (`BACKBONE`).
        training: settings.
        progress: show bars on stderr.

    Returns:
        Figures: those of `train_heads`, with the agreement of the heads with the new target;
        "agreement_before", of the heads of the first stage with the old one; "target_changed", see
        `JointObjective.change`.

    Raises:
        InputError: answers that are too short or too few.

    Paper: Cai et al., "Medusa", 2024, section 2.2.2 (combined loss, rates apart, heads first) and
    2.3.2 (self-distillation; all weights are trained here, or those of the last layers, not adapters).
    """
    training = training or Medusa2Training()
    settings = training.heads
    before = train_heads(network, answers, out / "heads", settings, progress=progress)
    heads, vocabulary = load_heads(out / "heads")
    whole = network.get_output_embeddings().weight.detach()
    device = whole.device
    heads.to(device)
    vocabulary = vocabulary.to(device)
    embedding = network.get_input_embeddings().weight.detach()
    least = settings.num_heads + 1
    learn, held = (
        read_texts(network, part, settings.length, least=least, progress=progress)
        for part in split_answers(answers)
    )
    backbone = trainable_copy(network, training.num_layers)

    def joint(examples: TextExamples) -> JointObjective:
        given = examples, embedding.float(), whole[vocabulary].float(), settings
        return JointObjective(heads, backbone, whole.float(), training, *given)

    objective = joint(learn)
    log = fit(objective, training.fit, out / "fit", device=device, progress=progress)
    heads.eval()
    backbone.eval()
    change = joint(held).change()
    backbone = backbone.requires_grad_(True).to(network.dtype)
    fresh = read_texts(
        backbone, split_answers(answers)[1], settings.length, least=least, progress=False
    )
    judge = HeadObjective(heads, fresh, embedding, whole[vocabulary], settings)
    heads.accuracies = tuple(map(tuple, judge.accuracies(torch.arange(judge.num_items))))
    figures = before | {
        "agreement": [row[0] for row in heads.accuracies],
        "agreement_before": before["agreement"],
        "target_changed": change,
        "seconds": before["seconds"] + log[-1]["seconds"],
    }
    save_heads(heads, vocabulary, out, backbone=BACKBONE, figures=figures)
    backbone.save_pretrained(out / BACKBONE)
    if tokenizer is not None:
        tokenizer.save_pretrained(out / BACKBONE)
    return figures


def medusa2_training(
    heads: HeadTraining, steps: int | None, batch_size: int | None
) -> Medusa2Training:
    """Settings of both stages: `steps` of the heads alone, a quarter as many of heads and backbone
    together, `batch_size` texts in each of these."""
    default = Medusa2Training(heads=replace(heads, kind="medusa"))
    changed = {"steps": steps and max(1, steps // 4), "batch_size": batch_size}
    given = {name: value for name, value in changed.items() if value is not None}
    return replace(default, fit=replace(default.fit, **given))
