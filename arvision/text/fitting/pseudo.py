"""Pseudo tokens (PPD, hidden transfer) fitted through a frozen target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...decoding.transformers_cache import TextSizes
from ...decoding.tree import topology
from ...errors import InputError
from ...training.loop import Chance, FitConfig, Objective, fit
from ..drafters.papers.pseudo import make_pseudo, save_pseudo
from ..layers import edited, find_layers
from .data import Answers

PSEUDO_FIT = FitConfig(
    steps=120, batch_size=2, learning_rate=1e-2, warmup=10, mixed_precision="no", log_every=10
)


@dataclass(frozen=True, kw_only=True)
class PseudoTraining:
    """Settings of `train_pseudo`.

    Attributes:
        kind: "ppd" or "hidden_transfer".
        num_guesses: K.
        num_places: places of a text behind which pseudo tokens stand in one step.
        length: tokens of a text that a step reads.
        layer: share of the layers below the one whose input hidden transfer replaces.
        fit: settings of the loop.
    """

    kind: str = "ppd"
    num_guesses: int = 3
    num_places: int = 12
    length: int = 96
    layer: float = 0.6
    fit: FitConfig = PSEUDO_FIT


class PseudoObjective(Objective):
    """Divergence of what the target says at pseudo tokens from what it says at the tokens later.

    Args:
        module: `PromptTokens` or `HiddenTransfer`.
        network: the target, frozen.
        answers: its answers.
        training: settings.

    Raises:
        InputError: answers that are all too short.
    """

    def __init__(
        self, module: Any, network: Any, answers: Answers, training: PseudoTraining
    ) -> None:
        super().__init__()
        self.module, self._settings = module, training
        # In a tuple, so that the target's weights are no part of what is trained and saved.
        self._frozen = (network,)
        need = training.num_guesses + 3
        self._texts = [
            (text[: training.length], start)
            for text, start in zip(answers.texts, answers.starts, strict=True)
            if min(len(text), training.length) - start >= need
        ]
        if not self._texts:
            raise InputError(
                f"no answer has {need} tokens among the first {training.length} of its text: "
                "expected shorter prompts or longer answers"
            )
        self.num_items = len(self._texts)

    def inputs(self, indices: Tensor, generator: torch.Generator) -> dict[str, Any]:
        """Texts, and a draw of places of each."""
        texts, places = [], []
        for index in indices.tolist():
            text, start = self._texts[index]
            room = torch.arange(start - 1, len(text) - self._settings.num_guesses - 1)
            order = torch.randperm(len(room), generator=generator)
            texts.append(torch.tensor([text]))
            places.append(room[order[: self._settings.num_places]])
        return {"texts": texts, "places": places}

    def loss(self, inputs: dict[str, Any], chance: Chance) -> dict[str, Tensor]:
        """Mean forward divergence over texts, and the agreement of the first guess."""
        pairs = zip(inputs["texts"], inputs["places"], strict=True)
        losses, right = zip(*(self.text_loss(text, places) for text, places in pairs), strict=True)
        return {"loss": torch.stack(losses).mean(), "agreement": torch.stack(right).mean()}

    def text_loss(self, text: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and agreement on one text [1, L], pseudo tokens behind places [P]."""
        network = self._frozen[0]
        count, num = self._settings.num_guesses, text.shape[1]
        parents = list(range(-1, num - 1))
        owners, numbers = list(range(num)), [-1] * num
        for place in chosen.tolist():
            above = place
            for number in range(count):
                parents.append(above)
                above = len(parents) - 1
                owners.append(place)
                numbers.append(number)
        weight = network.get_input_embeddings().weight
        shape = topology(tuple(parents), weight.device)
        known = network.get_input_embeddings()(text)
        extra = self.module.vectors().to(known.dtype).repeat(len(chosen), 1)[None]
        bars = torch.zeros(
            1, 1, len(parents), len(parents), device=weight.device, dtype=weight.dtype
        )
        bars.masked_fill_(~shape.ancestors, torch.finfo(weight.dtype).min)
        kinds = torch.tensor(numbers, device=weight.device)
        whose = torch.tensor(owners, device=weight.device)
        with edited(
            network, self.module.layer, lambda hidden: self.module.edit(hidden, whose, kinds)
        ):
            logits = network(
                inputs_embeds=torch.cat([known, extra], dim=1),
                attention_mask=bars,
                position_ids=shape.depths[None],
                use_cache=False,
            ).logits[0]
        guesses = logits[num:].float().log_softmax(-1).view(len(chosen), count, -1)
        later = chosen[:, None] + 1 + torch.arange(count, device=chosen.device)
        teacher = logits[:num].detach()[later].float().log_softmax(-1)
        loss = (teacher.exp() * (teacher - guesses)).sum(-1).mean()
        right = (teacher[:, 0].argmax(-1) == guesses[:, 0].argmax(-1)).float().mean()
        return loss, right.detach()


def train_pseudo(
    network: Any,
    answers: Answers,
    out: Path,
    training: PseudoTraining | None = None,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Fit pseudo tokens on a frozen target and save them in `out`; resumes what lies there.

    Returns:
        Figures: "agreement" of the first guess and "loss" of the last logged step, "parameters",
        "seconds".

    Raises:
        InputError: answers that are too short, or a network without a list of layers.
    """
    training = training or PseudoTraining()
    torch.manual_seed(training.fit.seed)
    find_layers(network)
    sizes = TextSizes.of(network)
    layer = round(training.layer * sizes.num_layers)
    module = make_pseudo(training.kind, sizes.hidden_size, training.num_guesses, layer)
    device = network.get_input_embeddings().weight.device
    module.to(device)
    objective = PseudoObjective(module, network, answers, training)
    log = fit(objective, training.fit, out / "fit", device=device, progress=progress)
    figures = {
        "agreement": log[-1]["agreement"],
        "loss": log[-1]["loss"],
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "seconds": log[-1]["seconds"],
    }
    save_pseudo(module, out, figures=figures)
    return figures
