"""A nested draft for targets of several sizes: sorted fine-tuning of the first layers of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...decoding.transformers_cache import TextSizes
from ...errors import InputError
from ...training.loop import Chance, FitConfig, Objective, fit
from ..drafters.papers.nested import EXITS_FIELD
from ..layers import final_norm, watching
from .data import Answers, num_held_out
from .small_model import SMALL_FIT, small_copy


@dataclass(frozen=True, kw_only=True)
class NestedTraining:
    """Settings of `train_nested`.

    Attributes:
        share: of the target's layers, the first ones, which the draft has.
        exits: shares of the draft's layers at which it is a model of its own, ascending to 1.
        length: tokens of a text that are read, from its start.
        fit: settings of the loop.

    Raises:
        InputError: shares that do not ascend to 1.
    """

    share: float = 0.3
    exits: tuple[float, ...] = (1 / 3, 2 / 3, 1.0)
    length: int = 128
    fit: FitConfig = SMALL_FIT

    def __post_init__(self) -> None:
        ascends = list(self.exits) == sorted(set(self.exits))
        if not 0 < self.share < 1 or not ascends or self.exits[0] <= 0 or self.exits[-1] != 1:
            raise InputError(
                f"share {self.share}, exits {self.exits}: expected a share in (0, 1), and shares that "
                "ascend to 1"
            )


def exit_logits(draft: Any, exits: Sequence[int], text: Tensor) -> list[Tensor]:
    """Logits [L, V] behind each exit along a text [1, L], from one pass."""
    seen: dict[int, Tensor] = {}
    with watching(draft, exits, seen):
        draft(text, use_cache=False)
    last, norm, output = (
        TextSizes.of(draft).num_layers,
        final_norm(draft),
        draft.get_output_embeddings(),
    )
    return [output(seen[exit] if exit == last else norm(seen[exit]))[0] for exit in exits]


class SortedObjective(Objective):
    """Sorted fine-tuning: the cross-entropy of the answers behind every exit, summed.

    It asks for no target's laws, so that answers of several targets may be mixed.

    Args:
        draft: what is trained.
        exits: numbers of its layers.
        answers: of one target or several.
        length: tokens of a text that are read.

    Paper: Kavehzadeh et al., "Sorted LLaMA" (2023) and "S2D" (2024), section 3.
    """

    def __init__(self, draft: Any, exits: Sequence[int], answers: Answers, length: int) -> None:
        super().__init__()
        self.draft, self._exits, self._answers, self._length = draft, list(exits), answers, length
        # Embeddings and output layer stay the target's: most of the weights, and they fit already.
        draft.get_input_embeddings().weight.requires_grad_(False)
        draft.get_output_embeddings().weight.requires_grad_(False)
        self.num_items = len(answers.texts)

    def inputs(self, indices: Tensor, generator: torch.Generator) -> dict[str, Any]:
        """Texts, and the place of each whose token is the first to be learnt."""
        texts = [torch.tensor([self._answers.texts[i][: self._length]]) for i in indices.tolist()]
        starts = [self._answers.starts[i] for i in indices.tolist()]
        return {"texts": texts, "starts": starts}

    def loss(self, inputs: dict[str, Any], chance: Chance) -> dict[str, Tensor]:
        """The sum over exits of the mean loss, and the share of right tokens behind the first and the
        last one."""
        losses, right = [], []
        for text, start in zip(inputs["texts"], inputs["starts"], strict=True):
            first = min(start, text.shape[1] - 1)
            wanted = text[0, first:]
            said = [
                each[first - 1 : -1].float() for each in exit_logits(self.draft, self._exits, text)
            ]
            losses.append(torch.stack([cross_entropy(each, wanted) for each in said]).sum())
            right.append(torch.stack([(each.argmax(-1) == wanted).float().mean() for each in said]))
        agreement = torch.stack(right).mean(0).detach()
        return {
            "loss": torch.stack(losses).mean(),
            "first": agreement[0],
            "agreement": agreement[-1],
        }


def train_nested(
    network: Any,
    tokenizer: Any,
    answers: Sequence[Answers],
    out: Path,
    training: NestedTraining | None = None,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Fit a nested draft and save it in `out` as transformers does; resumes.

    Args:
        network: whose first layers the draft starts from: the smallest of its targets.
        tokenizer: saved with it; None for none.
        answers: of each target.
        out: takes the draft.
        training: settings.
        progress: show a bar on stderr.

    Returns:
        Figures: "agreement" (share of right tokens behind each exit, on answers that the fit did not
        see), "loss", "exits", "layers", "parameters", "seconds".

    Raises:
        InputError: a network with too few layers.
    """
    training = training or NestedTraining()
    torch.manual_seed(training.fit.seed)
    device = network.get_input_embeddings().weight.device
    num = max(2, round(training.share * TextSizes.of(network).num_layers))
    draft = small_copy(network, kept=range(num)).to(device)
    exits = sorted({max(1, round(share * num)) for share in training.exits})
    kept, held = Answers([], []), Answers([], [])
    for each in answers:
        split = len(each.texts) - num_held_out(len(each.texts))
        for part, where in ((kept, slice(split)), (held, slice(split, None))):
            part.texts.extend(each.texts[where])
            part.starts.extend(each.starts[where])
    objective = SortedObjective(draft, exits, kept, training.length)
    log = fit(objective, training.fit, out / "fit", device=device, progress=progress)
    agreement = right_behind(draft.eval(), exits, held, training.length)
    setattr(draft.config, EXITS_FIELD, exits)
    draft.requires_grad_(True).to(network.dtype).save_pretrained(out)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    return {
        "agreement": [round(share, 3) for share in agreement],
        "loss": log[-1]["loss"],
        "exits": exits,
        "layers": num,
        "parameters": sum(parameter.numel() for parameter in draft.parameters()),
        "seconds": log[-1]["seconds"],
    }


@torch.no_grad()
def right_behind(draft: Any, exits: Sequence[int], answers: Answers, length: int) -> list[float]:
    """Share of the answers' tokens that the draft says behind each of its exits."""
    hits, total = torch.zeros(len(exits)), 0
    device = draft.get_input_embeddings().weight.device
    for text, start in zip(answers.texts, answers.starts, strict=True):
        ids = torch.tensor([text[:length]], device=device)
        said = exit_logits(draft, exits, ids)
        wanted = ids[0, start:]
        hits += torch.stack(
            [(each[start - 1 : -1].argmax(-1) == wanted).sum() for each in said]
        ).cpu()
        total += len(wanted)
    return (hits / max(1, total)).tolist()
