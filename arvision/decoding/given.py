"""Tokens of an image that are given: conditions of the others, in the order in which a model draws.

A model draws the other tokens from its own laws, each given what stands before it in the model's
order, given tokens included. What comes later in that order is not looked at: that would be another
law. Given tokens are never drawn and take no pass of their own; see `docs/editing.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from ..contracts import Overruns
from ..errors import InputError
from .drafter import LARGEST_TREE, Branches
from .tree import TokenTree


class Given:
    """Which tokens of B images are given, and what they are.

    Args:
        values: [B, N] int64, [B, N, d] bits, or [B, N, D] latents; what stands at other places does
            not matter.
        mask: [B, N] bool, true where a token is given.

    Raises:
        InputError: shapes that do not fit, an image of which nothing or everything is given, or
            latents that are not finite.
    """

    def __init__(self, values: Tensor, mask: Tensor) -> None:
        if mask.dtype != torch.bool or mask.dim() != 2 or values.shape[:2] != mask.shape:
            raise InputError(
                f"given tokens {tuple(values.shape)} with a mask {tuple(mask.shape)}: expected "
                "[B, N] both, the mask of booleans"
            )
        nums = mask.sum(1).tolist()
        for row, num in enumerate(nums):
            if num == mask.shape[1]:
                raise InputError(f"image {row}: all {num} tokens are given, expected one to draw")
            if num == 0:
                raise InputError(f"image {row}: no token is given, expected a plain draw without")
        if values.is_floating_point() and not bool(values[mask].isfinite().all()):
            raise InputError("given latents hold NaN or infinity: expected finite numbers")
        self.values, self.mask = values, mask
        self._nums = nums
        self._free = _next_free(mask)

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def nums(self) -> list[int]:
        """Given tokens of each image."""
        return self._nums

    @property
    def num_leading(self) -> list[int]:
        """Given tokens of each image before the first that is drawn."""
        return [row[0] for row in self._free]

    def to(self, device: torch.device | str) -> Given:
        """The same on another device."""
        if self.mask.device == torch.device(device):
            return self
        moved = object.__new__(Given)
        moved.values, moved.mask = self.values.to(device), self.mask.to(device)
        moved._nums, moved._free = self._nums, self._free
        return moved

    def select(self, rows: Sequence[int] | slice) -> Given:
        """Those of some images."""
        chosen = object.__new__(Given)
        index = range(len(self))[rows] if isinstance(rows, slice) else rows
        places = torch.tensor(list(index), dtype=torch.int64, device=self.mask.device)
        chosen.values, chosen.mask = self.values[places], self.mask[places]
        chosen._nums = [self._nums[row] for row in index]
        chosen._free = [self._free[row] for row in index]
        return chosen

    def run_at(self, row: int, place: int) -> int:
        """How many given tokens follow each other from a place of an image on."""
        return self._free[row][place] - place

    def over(self, drawn: Tensor, positions: Tensor) -> Tensor:
        """What is drawn [B, k, ...] at positions [B, k], with the given tokens in its place."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        mask, values = self.mask[rows, positions], self.values[rows, positions]
        mask = mask.view(*mask.shape, *[1] * (drawn.dim() - 2))
        return torch.where(mask, values.to(drawn.dtype), drawn)

    def pin(self, logp: Tensor, positions: Tensor) -> Tensor:
        """Laws [B, T, V] at positions [B, T], a point mass where the token is given."""
        tokens, is_given = self._at(positions)
        point = torch.full_like(logp, float("-inf")).scatter_(-1, tokens[..., None], 0.0)
        return torch.where(is_given[..., None], point, logp)

    def fill(self, tree: TokenTree, positions: Tensor) -> TokenTree:
        """Drafts [B, T] at positions [B, T], the given tokens in their places, drawn from point masses."""
        tokens, is_given = self._at(positions)
        drafts = torch.where(is_given & (tree.tokens >= 0), tokens, tree.tokens)
        logq = None if tree.logq is None else self.pin(tree.logq, positions)
        return replace(tree, tokens=drafts, logq=logq)

    def _at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, T] (0 where none is given), and where one is; places past the end have none."""
        num = self.mask.shape[1]
        places = positions.clamp(max=num - 1)
        is_given = self.mask.gather(1, places) & (positions < num)
        return torch.where(is_given, self.values.gather(1, places), 0), is_given


@runtime_checkable
class KeepsGiven(Protocol):
    """A drafter that goes on behind given tokens; others draft in ignorance of those ahead."""

    def keep(self, given: Given) -> None:
        """Called once, after the prefill."""
        ...


AT_ONCE = 256
"""Given tokens of a beginning that are read in one call: more, and their laws take much memory."""


def read_beginning(
    state: Any, given: Given, logits: Tensor, hidden: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Read the given tokens before the first that is drawn, as the prompt was read.

    Args:
        state: of a token model, after the prefill.
        given: of all its images.
        logits: [B, V] of the prefill, for images whose first token is drawn.
        hidden: likewise, [B, 1, C].

    Returns:
        Logits [B, V] and hidden states [B, 1, C] before the first token that is drawn.

    Raises:
        InputError: a state that takes no candidates past the last token.
    """
    if not (isinstance(state, Overruns) and state.allows_overrun):
        raise InputError(
            "given tokens: this model's state takes no candidates past the last token (see "
            "arvision.contracts.Overruns), expected a draw without"
        )
    nums = given.num_leading
    images = torch.arange(len(nums), device=logits.device)
    for first in range(0, max(nums), AT_ONCE):
        num = min(AT_ONCE, max(nums) - first)
        out: Tensor = cast(Any, state).extend(given.values[:, first : first + num].clamp(min=0))
        read = torch.tensor([min(max(count - first, 0), num) for count in nums], device=out.device)
        ends = torch.tensor([first < count <= first + num for count in nums], device=out.device)
        last = (read - 1).clamp(min=0)
        logits = torch.where(ends[:, None], out[images, last], logits)
        if hidden is not None:
            found = cast(Any, state).hidden[images, last][:, None]
            hidden = torch.where(ends[:, None, None], found, hidden)
        cast(Any, state).commit(torch.arange(num, device=out.device).expand(len(nums), num), read)
    return logits, hidden


def _next_free(mask: Tensor) -> list[list[int]]:
    """For each image and place 0..N the first place from there on that is drawn; N if none is."""
    num = mask.shape[1]
    places = torch.arange(num + 1, device=mask.device)
    stops = torch.where(torch.nn.functional.pad(mask, (0, 1), value=False), num, places)
    return stops.flip(1).cummin(1).values.flip(1).tolist()


@dataclass(frozen=True)
class Front:
    """Given tokens that a pass reads in front of the candidates, k_b of row b, K at most.

    Attributes:
        nums: k_b of each row.
        counts: [B], the same where the tokens are.
    """

    nums: Sequence[int]
    counts: Tensor

    @property
    def most(self) -> int:
        """K."""
        return max(self.nums)

    def leaves_room(self, num_tokens: int, room: Sequence[int], num: int, drafter: Any) -> bool:
        """Whether `num` candidates fit behind; a chain may run past the end of the cache.

        Args:
            num_tokens: N.
            room: tokens that each row lacks.
            num: candidates.
            drafter: of these.
        """
        if not (isinstance(drafter, Branches) and drafter.branches):
            return True
        reach = max(num_tokens - left - own for left, own in zip(room, self.nums, strict=True))
        return reach + self.most + num <= num_tokens + LARGEST_TREE

    def _own(self, num: int) -> Tensor:
        """[B, K + num]: which candidate each thing that is fed is; negative for given tokens."""
        return torch.arange(self.most + num, device=self.counts.device) - self.counts[:, None]

    def feed(self, tokens: Tensor, lengths: Tensor, fed: Tensor) -> Tensor:
        """Candidates [B, T] behind the given tokens, [B, K + T]; shorter rows end in repetitions.

        Args:
            tokens: [B, N], what is final.
            lengths: [B], final tokens; the last one is the first candidate.
            fed: [B, T].
        """
        own = self._own(fed.shape[1])
        front = tokens.gather(1, (lengths[:, None] - 1 + own).clamp(0, tokens.shape[1] - 1))
        return torch.where(own < 0, front, fed.gather(1, own.clamp(0, fed.shape[1] - 1)))

    def parents(self, parents: Tensor) -> Tensor:
        """Parents [T] or [B, T] of the candidates, root included, as those of what is fed."""
        num = parents.shape[-1]
        own = self._own(num)
        order = torch.arange(own.shape[1], device=own.device).expand_as(own)
        above = parents.to(own.device).expand(len(own), num).gather(1, own.clamp(0, num - 1))
        above = torch.where(own > 0, above + self.counts[:, None], order - 1)
        return torch.where(own < num, above, -1)

    def pick(self, values: Tensor, num: int) -> Tensor:
        """Of values [B, K + num, C] behind all that was fed, those behind the candidates."""
        index = self.counts[:, None] + torch.arange(num, device=values.device)
        return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))

    def path(self, path: Tensor) -> Tensor:
        """Candidates that stay [B, k], root first, as what was fed: given tokens stay before them."""
        own = self._own(path.shape[1])
        order = torch.arange(own.shape[1], device=own.device).expand_as(own)
        kept = path.gather(1, own.clamp(0, path.shape[1] - 1)) + self.counts[:, None]
        return torch.where(own < 0, order, kept)
