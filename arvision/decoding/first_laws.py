"""The law that a position is guessed from before the model has said anything about it.

What stands at a place of a picture has much to do with what stands above it, and with what stands
there in other pictures of the same kind. Both cost no pass of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..contracts import Conditions
from .verify import Round, Verdict
from .window import model_key

RING = 64
"""Positions behind the last known token whose laws are kept, besides a line of the grid."""

LOWEST = -20.0
"""Log-probabilities are averaged no lower than this."""

MEMORY_BYTES = 1 << 28
"""A memory keeps as many conditions apart as fit; the others share what all have in common."""


class LawMemory:
    """Means of the final log laws of earlier images, by position, over all images and by condition.

    Args:
        num_tokens: N.
        vocab_size: V.
        device: where the sums are kept, float32.
    """

    def __init__(self, num_tokens: int, vocab_size: int, device: torch.device) -> None:
        self._sums = torch.zeros(1, num_tokens, vocab_size, device=device)
        self._counts = torch.zeros(1, num_tokens, device=device)
        self._slots: dict[Any, int] = {}

    def slots(self, conditions: Conditions) -> Tensor:
        """[B] int64, where each condition is kept: 0 for those that are not told apart."""
        return torch.tensor([self._slot(c) for c in conditions], device=self._sums.device)

    def _slot(self, condition: Any) -> int:
        # Features and prompts of several parts have no name to remember them by.
        if not isinstance(condition, int | str | None):
            return 0
        size = self._sums[0].numel() * self._sums.element_size()
        if condition not in self._slots and (len(self._slots) + 1) * size <= MEMORY_BYTES:
            self._slots[condition] = len(self._sums)
            self._sums = torch.cat([self._sums, torch.zeros_like(self._sums[:1])])
            self._counts = torch.cat([self._counts, torch.zeros_like(self._counts[:1])])
        return self._slots.get(condition, 0)

    def mean(self, slots: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Mean log laws [B, k, V] at positions [B, k], and where there are any, [B, k] bool.

        Images of the same condition count by their number, all images together count one.
        """
        own, is_own = slots[:, None], (slots > 0).to(self._counts.dtype)[:, None]
        sums = self._sums[own, positions] * is_own[..., None]
        counts = self._counts[own, positions] * is_own
        every = self._counts[0, positions]
        common = self._sums[0, positions] / every.clamp(min=1)[..., None]
        return (sums + common) / (counts + 1)[..., None], every > 0

    def add(self, slots: Tensor, positions: Tensor, laws: Tensor, counts: Tensor) -> None:
        """Remember final laws [B, k, V] at positions [B, k], of each row the first `counts` [B]."""
        is_final = torch.arange(positions.shape[1], device=counts.device) < counts[:, None]
        num = self._sums.shape[1]
        is_final = is_final & (positions < num)
        weight = is_final.float()
        given = laws.float().clamp(min=LOWEST) * weight[..., None]
        places = positions.clamp(max=num - 1)
        own = slots[:, None].expand_as(places)
        for kept in (torch.zeros_like(own), own):
            mine = weight if kept is not own else weight * (own > 0)
            self._counts.index_put_((kept, places), mine, accumulate=True)
            self._sums.index_put_((kept, places), given * (mine > 0)[..., None], accumulate=True)

    def buffers(self) -> list[Tensor]:
        """What `add` changes, in place."""
        return [self._sums, self._counts]

    def move(self, buffers: list[Tensor]) -> None:
        """Go on in other tensors, of the shapes of `buffers`."""
        self._sums, self._counts = buffers


class Memories:
    """The memories of one sampler, one for each kind of model and way of shaping its laws.

    A copied or saved sampler begins without any.
    """

    def __init__(self) -> None:
        self._of: dict[Any, LawMemory] = {}

    def __reduce__(self) -> tuple[type[Memories], tuple[()]]:
        return Memories, ()

    def of(self, model: Any, kind: Any, device: torch.device) -> LawMemory:
        """The memory of a model's laws; `kind` tells apart what changes them.

        Models are told apart as cost tables tell them: a pipeline may make its model anew for every
        call. Two of the same sizes share a memory, which costs passes and changes no picture.
        """
        sizes = (model.num_tokens, model.vocab_size, model.grid)
        key = (model_key(model), *sizes, str(device), kind)
        if key not in self._of:
            self._of[key] = LawMemory(model.num_tokens, model.vocab_size, device)
        return self._of[key]


class FirstLaws:
    """First laws of the positions of B images that are being drawn.

    Args:
        columns: of the image grid; None to take the last law of the last pass everywhere.
        memory: of earlier images; None to look at the line above only.
    """

    renewed = ("_laws", "_held", "_prior")

    def __init__(self, columns: int | None, memory: LawMemory | None = None) -> None:
        self._columns, self._memory = columns, memory
        self._size = RING + (columns or 0)

    def start(self, batch: int, vocab_size: int, conditions: Sequence[Any]) -> None:
        """Forget the images of an earlier batch."""
        self._batch, self._vocab_size = batch, vocab_size
        self._laws: Tensor | None = None
        self._slots = None if self._memory is None else self._memory.slots(conditions)

    def at(self, positions: Tensor) -> Tensor:
        """Log laws [B, k, V] at positions [B, k]; not normalised where they are means.

        Where neither the line above nor the memory has one it is the last law of the last pass.
        """
        assert self._laws is not None
        if self._columns is None:
            return self._prior[:, None].expand(-1, positions.shape[1], -1)
        above = positions - self._columns
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        places = above.clamp(min=0) % self._size
        is_known = (self._held[rows, places] == above)[..., None]
        laws = torch.where(is_known, self._laws[rows, places], self._prior[:, None])
        if self._memory is None or self._slots is None:
            return laws
        mean, is_remembered = self._memory.mean(
            self._slots, positions.clamp(max=self._last(positions))
        )
        mean, is_remembered = mean.to(laws.dtype), is_remembered[..., None]
        both = 0.5 * (laws.clamp(min=LOWEST) + mean)
        return torch.where(is_remembered, torch.where(is_known, both, mean), laws)

    def carry(self) -> list[Tensor]:
        """What one pass leaves for the next; see `restore`."""
        assert self._laws is not None
        kept = [] if self._memory is None else self._memory.buffers()
        return [self._laws, self._held, self._prior, *kept]

    def restore(self, carried: list[Tensor]) -> None:
        """Go on from what a pass left."""
        self._laws, self._held, self._prior, *kept = carried
        if self._memory is not None:
            self._memory.move(kept)

    def join(self, other: FirstLaws) -> None:
        """Take in the rows of other images, behind the own ones; a memory is that of both."""
        assert self._laws is not None
        assert other._laws is not None
        self._laws = torch.cat([self._laws, other._laws])
        self._held = torch.cat([self._held, other._held])
        self._prior = torch.cat([self._prior, other._prior])
        self._batch += other._batch
        if self._slots is not None and other._slots is not None:
            self._slots = torch.cat([self._slots, other._slots])

    def _last(self, positions: Tensor) -> int:
        assert self._memory is not None
        return self._memory._counts.shape[1] - 1

    def observe(self, batch: Round, verdict: Verdict, offsets: Tensor, levels: int) -> None:
        """Keep the newest law of every position of a pass.

        Args:
            batch: the round.
            verdict: of it.
            offsets: [B, T + 1] int64, how far behind the first of them each law of the pass stands;
                negative for laws that mean nothing.
            levels: positions of the pass.
        """
        laws = batch.target_logp
        if self._laws is None:
            self._laws = laws.new_zeros(self._batch, self._size, self._vocab_size)
            self._held = torch.full((self._batch, self._size), -1, device=laws.device)
        rows = torch.arange(len(laws), device=laws.device)[:, None]
        order = torch.arange(laws.shape[1], device=laws.device)
        # Of several laws of a position the one behind the final tokens counts, else the first.
        rank = order.expand(len(laws), -1) + laws.shape[1]
        if verdict.path is None:
            rank = order.expand(len(laws), -1)
        elif verdict.path.shape[1]:
            steps = torch.arange(verdict.path.shape[1], device=laws.device)
            kept = steps < verdict.counts[:, None] - 1
            path = torch.where(kept, verdict.path + 1, 0)
            rank = rank.scatter(1, path, path.clone())
        places = torch.arange(levels, device=laws.device)
        stands = offsets[:, None] == places[:, None]  # [B, levels, T + 1]
        best = torch.where(stands, rank[:, None], 3 * laws.shape[1]).min(-1)
        is_there = best.values < 3 * laws.shape[1]
        first = batch.positions[:, :1]
        slots = (first + places) % self._size
        newest = laws[rows, best.indices]
        self._laws[rows, slots] = torch.where(is_there[..., None], newest, self._laws[rows, slots])
        self._held[rows, slots] = torch.where(is_there, first + places, self._held[rows, slots])
        self._prior = laws[rows[:, 0], torch.where(is_there, best.indices, 0).amax(-1)]
        if self._memory is not None and self._slots is not None:
            self._memory.add(self._slots, first + places, newest, verdict.counts)

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows`."""
        if self._laws is not None:
            self._laws, self._held = self._laws[rows], self._held[rows]
            self._prior = self._prior[rows]
        self._batch = len(rows)
        if self._slots is not None:
            self._slots = self._slots[rows]
