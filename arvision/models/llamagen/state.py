"""Decode state of a LlamaGen model: guided logits over a cache that takes candidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...decoding.cache import KVCache, interleaved
from ...decoding.logits import guided, has_weights, joined_scales, weights_at
from ...decoding.tree import Topology, check_parents, check_path, check_placed, topology_of
from ...errors import InputError, StateError
from .transformer import LlamaGenTransformer, prefix_mask

TREE_ROOM = 64
"""Cache positions beyond the last token, so that a tree fits near the end of an image."""


class LlamaGenState:
    """See `arvision.contracts.TokenState`.

    With guidance the cache holds 2B rows, the conditional ones first; scale 1 needs only these and
    scale 0 only the null rows.

    Args:
        transformer: the network.
        rows: conditioning rows [R, P, C], R = B or 2B.
        valid: [R, P] bool, false on padding; None without padding.
        guidance_scale: weight of the conditional logits, or one for each token of each image, [B, N].
        batch_size: B.
    """

    allows_overrun = True
    leaves_guidance = False
    unread = ("lengths", "_prefill", "_tree")

    def __init__(
        self,
        transformer: LlamaGenTransformer,
        rows: Tensor,
        valid: Tensor | None,
        guidance_scale: float,
        batch_size: int,
    ) -> None:
        config = transformer.config
        self._transformer = transformer
        self._scale: Any = guidance_scale
        self._is_doubled = rows.shape[0] != batch_size
        self._num_conditions = rows.shape[1]
        self._rotary = transformer.rotary()
        self._tree: Topology | None = None
        self.cache = KVCache(
            config["num_layers"],
            rows.shape[0],
            config["num_kv_heads"] or config["num_heads"],
            self._num_conditions + transformer.num_tokens + TREE_ROOM,
            config["hidden_size"] // config["num_heads"],
            device=rows.device,
            dtype=rows.dtype,
            open_columns=valid,
        )
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=rows.device)
        self._prefill = (rows, valid)

    def prefill(self) -> Tensor:
        """Run the conditioning rows; guided logits [B, V] of the first token."""
        rows, valid = self._prefill
        num = self._num_conditions
        _, mask = self.cache.begin(num)
        if valid is not None:
            bars = torch.zeros((), dtype=rows.dtype, device=rows.device)
            mask = bars.masked_fill(~prefix_mask(valid, num), float("-inf"))
        logits = self._transformer(
            rows, self._rotary[:num], mask=mask, cache=self.cache, num_logits=1
        )
        every = torch.arange(num, device=rows.device).expand(rows.shape[0], num)
        self.cache.commit(every, torch.full_like(every[:, 0], num))
        return self._guided(logits, torch.zeros_like(self.lengths)[:, None])[:, 0]

    def _guided(self, logits: Tensor, places: Tensor | None) -> Any:
        """Guided logits [B, T, V] of the tokens at `places` [B, T]; None where none needs to know."""
        if not self._is_doubled:
            return logits
        conditional, null = logits.chunk(2)
        weights = self._scale if places is None else weights_at(self._scale, places, conditional)
        return guided(conditional, null, weights, is_left=self.leaves_guidance)

    def _behind(self, lengths: Tensor, steps: Tensor) -> Tensor | None:
        """Places [B, T] that follow candidates so far behind the first `lengths` [B] tokens."""
        return lengths[:, None] + steps + 1 if has_weights(self._scale) else None

    def _doubled(self, tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor]) if self._is_doubled else tensor

    @torch.no_grad()
    def extend(self, tokens: Tensor, parents: Tensor | None = None) -> Tensor:
        """Guided logits [B, T, V] of what follows each candidate.

        Args:
            tokens: [B, T] int64; candidates of an earlier call that were not kept are forgotten.
            parents: [T] int64 with `parents[t] < t`, -1 for the committed prefix, or [B, T], a tree
                for every row; None for a chain.

        Raises:
            InputError: a shape or a parent that does not fit, or a token out of range.
            StateError: a tree larger than the room left.
        """
        batch, num = tokens.shape if tokens.dim() == 2 else (-1, 0)
        if batch != len(self.lengths) or num < 1:
            raise InputError(
                f"tokens {tuple(tokens.shape)}: expected [{len(self.lengths)}, T] with T >= 1"
            )
        if parents is None:
            return self._extend(tokens, None)
        check_parents(parents, num)
        return self._extend(tokens, topology_of(parents.to(tokens.device)))

    @torch.no_grad()
    def extend_along(self, tokens: Tensor, tree: Topology | None) -> Tensor:
        """`extend` with a topology of candidates; see `arvision.contracts.AdvancesAlong`."""
        return self._extend(tokens, tree)

    def _extend(self, tokens: Tensor, tree: Topology | None) -> Tensor:
        num = tokens.shape[1]
        ancestors = steps = None
        if tree is not None:
            ancestors, steps = tree.ancestors, tree.depths
            if not tree.is_shared:
                ancestors, steps = self._doubled(ancestors), self._doubled(steps)
        self._tree = tree
        _, mask = self.cache.begin(num, ancestors)
        places = None
        if isinstance(self._scale, Tensor):
            depths = torch.arange(num, device=tokens.device) if tree is None else tree.depths
            places = self._behind(self.lengths, depths)
        return self._run(tokens, self._turns(num, steps), mask, places)

    def _turns(self, num: int, depths: Tensor | None) -> Tensor:
        """The rotary table's entries of candidates at `depths` [T] or [R, T]; None for a chain."""
        first, last = self.cache.host_lengths[0], len(self._rotary) - 1
        if depths is None and self.cache.is_uniform and first + num <= last + 1:
            return self._rotary[first : first + num]
        behind = torch.arange(num, device=self._rotary.device) if depths is None else depths
        begin = first if self.cache.is_uniform else self.cache.lengths[:, None]
        return self._rotary[(begin + behind).clamp(max=last)]

    @torch.no_grad()
    def extend_fixed(self, tokens: Tensor, lengths: Tensor, tree: Topology | None = None) -> Tensor:
        """Guided logits [B, T, V] of candidates; see `arvision.contracts.TakesFixedTrees`."""
        steps, last = torch.arange(tokens.shape[1], device=tokens.device), len(self._rotary) - 1
        begin = self._doubled(lengths + self._num_conditions)[:, None]
        slots = begin + steps
        if tree is None:
            mask = self.cache.begin_fixed(slots, last + 1)
            places = self._behind(lengths, steps)
            return self._run(tokens, self._rotary[slots.clamp(max=last)], mask, places)
        ancestors, depths = tree.ancestors, tree.depths
        if not tree.is_shared:
            ancestors, depths = self._doubled(ancestors), self._doubled(depths)
        mask = self.cache.begin_fixed(slots, self.cache.capacity, ancestors)
        places = self._behind(lengths, tree.depths)
        return self._run(tokens, self._rotary[(begin + depths).clamp(max=last)], mask, places)

    def keep_fixed(self, path: Tensor, counts: Tensor, lengths: Tensor) -> None:
        """Keep a path of each row; see `arvision.contracts.TakesFixedTrees`."""
        begin = self._doubled(lengths + self._num_conditions)
        self.cache.keep_fixed(self._doubled(path), self._doubled(counts), begin)

    def _run(
        self, tokens: Tensor, rotary: Tensor, mask: Tensor | None, places: Tensor | None
    ) -> Tensor:
        """Guided logits [B, T, V] after the cache was told where the candidates stand."""
        fed = self._doubled(tokens)
        return self._guided(self._transformer(fed, rotary, mask=mask, cache=self.cache), places)

    @torch.no_grad()
    def extend_at(self, tokens: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """Guided logits [B, T, V] of what follows tokens at positions of the caller's choice.

        What is fed stays until its position is fed again; `visible` alone says what counts.

        Args:
            tokens: [B, T] int64.
            positions: [B, T] int64, places in the image in raster order; -1 for padding, whose
                logits mean nothing.
            visible: [B, T, N] bool, the positions that a candidate looks at besides the conditions
                and itself.

        Raises:
            InputError: shapes that do not fit, or a position out of range.
        """
        batch, num_tokens = len(self.lengths), self._transformer.num_tokens
        shape = (batch, tokens.shape[-1])
        check_placed(tokens, positions, visible, shape, num_tokens)
        positions = positions.to(tokens.device)
        is_padding = positions < 0
        # Padding is written where no mask ever looks.
        slots = torch.where(is_padding, self.cache.capacity - 1, positions + self._num_conditions)
        sees = visible.new_ones(*shape, self._num_conditions + num_tokens)
        sees[..., self._num_conditions :] = visible & ~is_padding[..., None]
        own = slots.clamp(max=sees.shape[2] - 1)[..., None]
        sees.scatter_(2, own, sees.gather(2, own) | ~is_padding[..., None])
        mask = self.cache.begin_at(self._doubled(slots), self._doubled(sees))
        rotary = self._rotary[self._doubled(slots).clamp(max=len(self._rotary) - 1)]
        return self._run(tokens, rotary, mask, positions + 1)

    def commit(self, kept: Tensor, counts: Tensor) -> None:
        """Keep some of the last candidates and forget the rest.

        Args:
            kept: [B, K] int64, indices into the candidates, parents before children.
            counts: [B] int64, how many of each row of `kept` count; rows may differ.

        Raises:
            StateError: no candidates are pending, or a parent was not kept.
        """
        num = self.cache.num_pending
        if num == 0:
            raise StateError("commit without candidates: call extend first")
        parents = None if self._tree is None else self._tree.laws - 1
        check_path(kept, counts, parents, num, len(self.lengths))
        self.cache.commit(self._doubled(kept), self._doubled(counts))
        self.lengths = self.lengths + counts

    def advance(self, counts: Tensor, given: Sequence[int]) -> None:
        """Keep the first candidates of each row of a chain; see `arvision.contracts.Advances`."""
        if self.cache.num_pending == 0:
            raise StateError("advance without candidates: call extend first")
        self.cache.advance(self._doubled(counts), self._twice(given))
        self.lengths = self.lengths + counts

    def advance_along(self, path: Tensor, counts: Tensor, given: Sequence[int]) -> None:
        """Keep a path of each row; see `arvision.contracts.AdvancesAlong`."""
        self.cache.keep(self._doubled(path), self._doubled(counts), self._twice(given))
        self.lengths = self.lengths + counts

    def _twice(self, given: Sequence[int]) -> Sequence[int]:
        return [*given, *given] if self._is_doubled else given

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows` [B'] and drop the others."""
        if self._is_doubled:
            self.cache.select(torch.cat([rows, rows + len(self.lengths)]))
        else:
            self.cache.select(rows)
        self.lengths = self.lengths[rows]
        if isinstance(self._scale, Tensor):
            self._scale = self._scale[rows]

    def join(self, other: LlamaGenState) -> None:
        """Take in the rows of another state, see `arvision.contracts.TakesRows`.

        Raises:
            StateError: one of them has null rows beside its rows and the other has none.
        """
        if self._is_doubled != other._is_doubled:
            raise StateError("rows with guidance and rows without it: expected one of them")
        own, others = len(self.lengths), len(other.lengths)
        self.cache.join(other.cache, interleaved(own, others, 1 + self._is_doubled))
        self._scale = joined_scales(self._scale, own, other._scale, others, self.cache.keys)
        self.lengths = torch.cat([self.lengths, other.lengths])
        self._tree = None
