"""Nested models: the first layers of a draft, or of the target, as many as a draft needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....decoding.draft_state import FollowingState
from ....decoding.noise import Noise
from ....decoding.tree import TokenTree, none_left
from ....errors import InputError
from ....stored import read_object
from ...layers import final_norm
from ..base import register
from ..draft_tree import in_vocabulary
from .short_target import ShortTarget

EXITS_FIELD = "arvision_exits"
"""Of the configuration of a nested draft: its exits, in layers."""


def is_nested(folder: Path) -> bool:
    """Whether a folder holds a nested draft of `arvision train-draft`."""
    return (folder / "config.json").exists() and EXITS_FIELD in read_object(folder / "config.json")


@register("nested_exit", summary="first layers of a nested draft or of the target (S2D)")
class NestedExit(ShortTarget):
    """Nested sub-models, the smallest first: each draft comes from the first one that is sure of it.

    A token is drafted by one pass that stops behind the layers after which the law is sure, so that
    easy tokens cost few layers. The draft of `arvision train-draft --kind nested` was trained at all
    of its exits at once (sorted fine-tuning) and serves every target of its vocabulary, small ones with
    its first exits and large ones with all. Without a draft the target's own first layers are used;
    unless it was trained that way, it drafts little.

    Args:
        draft: a nested draft, with exits in its configuration; None for the target itself.
        exits: shares of the layers behind which a pass may end, ascending; None for the draft's own,
            or (0.5, 0.75) of the target.
        num_draft: longest chain.
        confidence: probability from which an exit's token is drafted.

    Attributes:
        num_left: drafts that came from each exit since the object was made.

    Raises:
        InputError: exits that do not ascend in (0, 1], or a draft without any.

    Paper: Kavehzadeh et al., "S2D: Sorted Speculative Decoding For More Efficient Deployment of
    Nested Large Language Models", 2024, sections 3-4.
    """

    def __init__(
        self,
        draft: Any = None,
        exits: Sequence[float] | None = None,
        num_draft: int = 4,
        confidence: float = 0.6,
    ) -> None:
        super().__init__()
        self.draft = draft
        own = None if draft is None else getattr(draft.network.config, EXITS_FIELD, None)
        if exits is None and own is not None and draft is not None:
            exits = [layers / draft.sizes.num_layers for layers in own]
        elif exits is None:
            exits = (0.5, 0.75)
            if draft is not None:
                raise InputError(
                    "a draft without exits in its configuration: expected one of `arvision train-draft "
                    "--kind nested`, or exits"
                )
        if not exits or list(exits) != sorted(exits) or not 0 < exits[0] <= exits[-1] <= 1:
            raise InputError(f"exits {tuple(exits)}: expected ascending shares in (0, 1]")
        self.exits, self.num_draft, self.confidence = tuple(exits), num_draft, confidence
        self.draft_vocab_size = None if draft is None else draft.vocab_size
        self.num_left = [0] * len(self.exits)

    def start(self, noise: Noise, vocab_size: int, num_tokens: int) -> None:
        """A new batch begins."""
        super().start(noise, vocab_size, num_tokens)
        self._known = [0] * len(noise)

    def begin(self, state: Any) -> None:
        """Prefill the draft, or hold on to the target's state."""
        self._following, self._first = None, None
        if self.draft is None:
            super().begin(state)
        else:
            self._following = FollowingState(
                self.draft, self.histories, 1.0, self._own_law, self.num_tokens
            )
            self.state = self._following.state
        network, num = self.state.model.network, self.state.model.sizes.num_layers
        self._layers = sorted({max(1, round(share * num)) for share in self.exits})
        self._norm, self._output = final_norm(network), network.get_output_embeddings()

    def _own_law(self, logits: Tensor) -> Tensor:
        return self.shaped(in_vocabulary(logits, self.vocab_size))

    def hear(self, new: Sequence[list[int]], told: Sequence[list[int]]) -> None:
        """Count what became final."""
        self._known = [known + len(own) for known, own in zip(self._known, new, strict=True)]
        super().hear(new, told)

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows`."""
        super().select(rows)
        self._known = [self._known[row] for row in rows.tolist()]
        if self._following is not None:
            self._following.select(rows)

    def propose(self, tokens: Tensor, lengths: Tensor, num: int, round_number: int) -> TokenTree:
        """See `ShortTarget`; what became final goes through the whole draft first."""
        if self._following is not None:
            self._first = self._following.follow(tokens, lengths, self._known)
        return super().propose(tokens, lengths, num, round_number)

    def law(self, tokens: Tensor) -> Tensor:
        """See `ShortTarget`."""
        if self._first is not None:  # known from the pass that followed the target
            law, self._first = self._first, None
            return law
        *earlier, last = self._layers
        found: list[Tensor] = []  # the law of each exit so far, where the ones before were not sure

        def add(logits: Tensor) -> Tensor:
            law = self._own_law(logits)
            if found:
                law = torch.where(self._unsure(found[-1])[:, None], law, found[-1])
            found.append(law)
            return law

        def look(hidden: Tensor) -> bool:
            return none_left(self._unsure(add(self._output(self._norm(hidden[:, -1])))))

        fed = tokens if self.draft is None else tokens.clamp(max=self.draft.vocab_size - 1)
        logits = self.state.draft(fed, layers=range(last), exits=dict.fromkeys(earlier, look))
        if len(found) == len(earlier) and not (found and none_left(self._unsure(found[-1]))):
            add(logits[:, -1])
        self.num_left[len(found) - 1] += 1
        return found[-1]

    def _unsure(self, law: Tensor) -> Tensor:
        return law.amax(-1).exp() < self.confidence
