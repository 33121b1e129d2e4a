"""A preallocated key/value cache that takes candidates and keeps some of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import StateError
from ..kernels.compaction import compact_
from ..kernels.tree_attention import carry, look

LARGEST_TABLE = 2048
"""Positions up to which a cache keeps a table of what each may look at; it grows with the square."""


class KVCache:
    """Keys and values of R rows that may stand at different lengths.

    Candidates are written behind the committed length of their row; `commit` keeps some of them and
    forgets the rest by moving the length. Nothing is copied as long as what is kept is already
    contiguous, and nothing is allocated per step in proportion to the sequence while all rows stand
    at the same length.

    Args:
        num_layers: attention layers.
        num_rows: R.
        num_heads: key/value heads H.
        capacity: positions S that a row can hold.
        head_dim: D.
        value_dim: width of the values where it is another one; None for D.
        device: of the cache.
        dtype: of the cache.
        open_columns: [R, P] bool, false where the first P positions must never be looked at
            (padding); None for no such positions.
    """

    unread = ("lengths", "_host_lengths", "_slots", "_first", "_end", "_num", "_is_chain")
    """See `arvision.decoding.reach`: candidates of fixed shapes are told where they stand."""
    renewed = ("_causal",)

    def __init__(
        self,
        num_layers: int,
        num_rows: int,
        num_heads: int,
        capacity: int,
        head_dim: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        value_dim: int | None = None,
        open_columns: Tensor | None = None,
    ) -> None:
        shape = (num_layers, num_rows, num_heads, capacity)
        self.keys = torch.zeros(*shape, head_dim, device=device, dtype=dtype)
        self.values = torch.zeros(*shape, value_dim or head_dim, device=device, dtype=dtype)
        # Rows that leave make room here for those that join.
        self._stored: tuple[Tensor, ...] = (self.keys, self.values)
        self.lengths = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._host_lengths = [0] * num_rows
        self._slots: Tensor | None = None
        self._first = 0
        self._end = 0
        self._num = 0
        self._is_chain = True
        self._reach(capacity)
        self._closed: Tensor | None = None
        if open_columns is not None and not bool(open_columns.all()):
            self._closed = torch.zeros(num_rows, 1, 1, capacity, device=device, dtype=dtype)
            self._closed[:, 0, 0, : open_columns.shape[1]].masked_fill_(
                ~open_columns.to(device), float("-inf")
            )

    def _reach(self, capacity: int) -> None:
        """Be `capacity` positions long."""
        self.capacity = capacity
        self._order = torch.arange(capacity, device=self.keys.device)
        self._causal: Tensor | None = None

    @property
    def _columns(self) -> Tensor | None:
        """[R, S] bool, false where nothing ever looks; None where all is open."""
        return None if self._closed is None else self._closed[:, 0, 0] == 0

    @property
    def num_pending(self) -> int:
        """Candidates written and neither kept nor forgotten yet."""
        return self._num

    @property
    def host_lengths(self) -> list[int]:
        """The lengths of the rows, known without asking the device."""
        return self._host_lengths

    @property
    def is_uniform(self) -> bool:
        """Whether all rows stand at the same length."""
        return len(set(self._host_lengths)) <= 1

    def begin(self, num: int, ancestors: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Make room for `num` candidates per row.

        Args:
            num: candidates T.
            ancestors: [T, T] or [R, T, T] bool, true where candidate t may look at candidate u
                (itself included); None for a chain.

        Returns:
            Slots [R, T] of the candidates, and the additive mask [R or 1, 1, T, S] of what they may
            look at (None for everything).

        Raises:
            StateError: a tree does not fit. A chain may run past the end: what runs over
                shares the last slot, and nothing before it can see that.
        """
        slots, mask = self._begin(num, ancestors)
        if mask is not None:
            carry(mask, look(self.keys, self.lengths, ancestors, num, self._columns))
        return slots, mask

    def _begin(self, num: int, ancestors: Tensor | None) -> tuple[Tensor, Tensor | None]:
        self._num, self._is_chain = num, ancestors is None
        offsets = self._order[:num] if num <= self.capacity else torch.arange(num)
        slots = self.lengths[:, None] + offsets
        self._first = self._host_lengths[0]
        furthest = max(self._host_lengths) + num
        self._end = min(furthest, self.capacity)
        if self.is_uniform and furthest <= self.capacity:
            self._slots = None
            visible = slice(0, furthest)
            if ancestors is not None:
                mask = self._tree_mask(slots, ancestors, furthest)
            elif num == 1:
                mask = None if self._closed is None else self._closed[..., visible]
            else:
                mask = self._chain_mask(slots[:1], furthest)
                if self._closed is not None:
                    mask = mask + self._closed[..., visible]
            return slots, mask
        if furthest > self.capacity:
            if ancestors is not None:
                raise StateError(
                    f"a tree of {num} candidates does not fit: the cache has room for "
                    f"{self.capacity - max(self._host_lengths)} more positions"
                )
            slots = slots.clamp(max=self.capacity - 1)
        self._slots = slots
        furthest = min(furthest, self.capacity)
        if ancestors is not None:
            return slots, self._tree_mask(slots, ancestors, furthest)
        mask = self._chain_mask(slots, furthest)
        if self._closed is not None:
            mask = mask + self._closed[..., :furthest]
        return slots, mask

    def begin_unmasked(self, num: int) -> None:
        """Make room for the first `num` positions of all rows, whose mask the caller has."""
        self._num, self._is_chain, self._slots = num, True, None
        self._first, self._end = 0, num

    def begin_fixed(self, slots: Tensor, visible: int, ancestors: Tensor | None = None) -> Tensor:
        """Make room for candidates at slots that only the device knows; nothing is read back.

        Args:
            slots: [R, T] int64, one behind the other; those past the end share the last slot.
            visible: S, positions that are looked at at most.
            ancestors: [T, T] or [R, T, T] bool, as in `begin`; None for chains.

        Returns:
            The additive mask [R, 1, T, S].
        """
        self._num, self._slots, self._end = 0, slots.clamp(max=self.capacity - 1), visible
        if ancestors is not None:
            mask = self._tree_mask(self._slots, ancestors, visible)
        else:
            mask = self._ragged_mask(self._slots, visible)
            mask = mask if self._closed is None else mask + self._closed[..., :visible]
        return carry(mask, look(self.keys, slots[:, 0], ancestors, slots.shape[1], self._columns))

    def keep_fixed(self, kept: Tensor, counts: Tensor, begin: Tensor) -> None:
        """Move what stays of candidates behind `begin` [R] together, see `commit`; nothing is read."""
        compact_(self.keys, self.values, begin, kept, counts)

    def _chain_mask(self, slots: Tensor, visible: int) -> Tensor:
        """[R, 1, T, visible]: everything up to each candidate's own slot, slots [R, T]."""
        causal = self._causal_table()
        if causal is not None and len(slots) == 1 and self.is_uniform:
            here = slice(self._first, self._first + slots.shape[1])
            return causal[None, None, here, :visible]
        return self._ragged_mask(slots, visible)

    def _causal_table(self) -> Tensor | None:
        """[S, S], what each position may look at, made when first asked for; None where it is large.

        What is compiled or captured does not make it: it would be made again in every pass.
        """
        if self._causal is None and self.capacity <= LARGEST_TABLE:
            is_caught = self.keys.is_cuda and torch.cuda.is_current_stream_capturing()
            if not (torch.compiler.is_compiling() or is_caught):
                table = self.keys.new_zeros(self.capacity, self.capacity)
                order = self._order
                self._causal = table.masked_fill_(order > order[:, None], float("-inf"))
        return self._causal

    def _ragged_mask(self, slots: Tensor, visible: int) -> Tensor:
        causal = self._causal_table()
        if causal is not None:
            return causal[slots, :visible][:, None]
        mask = torch.zeros(*slots.shape, visible, device=slots.device, dtype=self.keys.dtype)
        return mask.masked_fill_(self._order[:visible] > slots[..., None], float("-inf"))[:, None]

    def begin_at(self, slots: Tensor, sees: Tensor) -> Tensor:
        """Make room for candidates at slots of the caller's choice, whatever stood there before.

        Such candidates are never pending: what is written stays until it is written again, and
        `sees` decides what counts.

        Args:
            slots: [R, T] int64.
            sees: [R, T, S] bool, what each candidate may look at; S may be less than the capacity.

        Returns:
            The additive mask [R, 1, T, S].
        """
        self._num, self._slots, self._end = 0, slots, sees.shape[2]
        mask = torch.zeros(sees.shape, device=sees.device, dtype=self.keys.dtype)
        mask = mask.masked_fill_(~sees, float("-inf"))[:, None]
        return mask if self._closed is None else mask + self._closed[..., : self._end]

    def _tree_mask(self, slots: Tensor, ancestors: Tensor, visible: int) -> Tensor:
        """[R, 1, T, visible]: the committed prefix and each candidate's ancestors."""
        rows, num = slots.shape
        prefix = self._order[:visible] < slots[:, :1]
        sees = prefix[:, None].expand(rows, num, visible).clone()
        sees.scatter_(2, slots[:, None].expand(rows, num, num), ancestors.expand(rows, num, num))
        mask = torch.zeros(sees.shape, device=sees.device, dtype=self.keys.dtype)
        mask = mask.masked_fill_(~sees, float("-inf"))[:, None]
        return mask if self._closed is None else mask + self._closed[..., :visible]

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the candidates' keys and values [R, H, T, D] of one layer.

        Returns:
            Everything visible to them, two views [R, H, S, D].
        """
        stored_keys, stored_values = self.keys[layer], self.values[layer]
        if self._slots is None:
            stored_keys[:, :, self._first : self._end] = keys
            stored_values[:, :, self._first : self._end] = values
            return stored_keys[:, :, : self._end], stored_values[:, :, : self._end]
        rows = torch.arange(len(self.lengths), device=keys.device)[:, None]
        stored_keys[rows, :, self._slots] = keys.transpose(1, 2)
        stored_values[rows, :, self._slots] = values.transpose(1, 2)
        return stored_keys[:, :, : self._end], stored_values[:, :, : self._end]

    def commit(self, kept: Tensor, counts: Tensor) -> None:
        """Keep candidates `kept[r, :counts[r]]` of each row, in that order, and forget the rest.

        Args:
            kept: [R, K] int64.
            counts: [R] int64.
        """
        if not bool(self._stands(kept, counts)):
            compact_(self.keys, self.values, self.lengths, kept, counts)
        self.advance(counts, counts.tolist())

    def _stands(self, kept: Tensor, counts: Tensor) -> Tensor:
        """Whether all that is kept is where it belongs: one bool."""
        order = self._order[: kept.shape[1]]
        return ((kept == order) | (order >= counts[:, None])).all()

    def keep(self, kept: Tensor, counts: Tensor, given: Sequence[int]) -> None:
        """`commit` with `counts` known on the host as `given`: nothing is read back."""
        stands = self._stands(kept, counts) if kept.is_cpu else None
        if stands is None or not stands.numpy():
            compact_(self.keys, self.values, self.lengths, kept, counts)
        self.advance(counts, given)

    def advance(self, counts: Tensor, given: Sequence[int]) -> None:
        """Keep the first `counts` [R] candidates of each row, `given` on the host."""
        self.lengths = self.lengths + counts
        self._host_lengths = [old + new for old, new in zip(self._host_lengths, given, strict=True)]
        self._num = 0

    def cut(self, lengths: Sequence[int]) -> None:
        """Forget all but the first `lengths` committed positions of the rows, for good."""
        self._host_lengths, self._num = list(lengths), 0
        self.lengths = torch.tensor(self._host_lengths, device=self.lengths.device)

    def rewind(self, num: int) -> tuple[Tensor, Tensor]:
        """Step back by `num` positions in every row; what stood there, for `restore`."""
        slots = self.lengths[:, None] - num + self._order[:num]
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        kept = (self.keys[:, rows, :, slots].clone(), self.values[:, rows, :, slots].clone())
        self.lengths = self.lengths - num
        self._host_lengths = [length - num for length in self._host_lengths]
        return kept

    def restore(self, kept: tuple[Tensor, Tensor], lengths: Tensor) -> None:
        """Undo a `rewind`: the rows stand at `lengths` [R] again, as if nothing had been written."""
        num = kept[0].shape[1]
        slots = lengths[:, None] - num + self._order[:num]
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        self.keys[:, rows, :, slots], self.values[:, rows, :, slots] = kept
        self.lengths, self._num = lengths, 0
        self._host_lengths = [length + num for length in self._host_lengths]

    def select(self, rows: Tensor) -> None:
        """Keep the given rows [R'] and drop the others.

        They move together in place, one layer after another: nothing of the cache's size is made.
        """
        kept = rows.tolist()
        unmoved = next((i for i, row in enumerate(kept) if row != i), len(kept))
        if len(kept) > self.keys.shape[1]:
            self._stored = self.keys[:, rows], self.values[:, rows]
            self.keys, self.values = self._stored
        elif unmoved < len(kept):
            for layer in range(len(self.keys)):
                for stored in (self.keys[layer], self.values[layer]):
                    stored[unmoved : len(kept)] = stored[rows[unmoved:]]
        self.keys, self.values = self.keys[:, : len(kept)], self.values[:, : len(kept)]
        self.lengths = self.lengths[rows]
        self._host_lengths = [self._host_lengths[row] for row in kept]
        if self._closed is not None:
            self._closed = self._closed[rows]

    def shift(self, num: int) -> None:
        """Move all rows right by `num` positions, which nothing ever looks at."""
        if num == 0:
            return
        self.keys = torch.nn.functional.pad(self.keys, (0, 0, num, 0))
        self.values = torch.nn.functional.pad(self.values, (0, 0, num, 0))
        self._stored = self.keys, self.values
        closed = self._open() if self._closed is None else self._closed
        self._closed = torch.nn.functional.pad(closed, (num, 0), value=float("-inf"))
        self.lengths = self.lengths + num
        self._host_lengths = [length + num for length in self._host_lengths]
        self._reach(self.capacity + num)

    def widen(self, capacity: int) -> None:
        """Have room for `capacity` positions, where there is less."""
        more = capacity - self.capacity
        if more <= 0:
            return
        self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, more))
        self.values = torch.nn.functional.pad(self.values, (0, 0, 0, more))
        self._stored = self.keys, self.values
        if self._closed is not None:
            self._closed = torch.nn.functional.pad(self._closed, (0, more))
        self._reach(capacity)

    def _open(self) -> Tensor:
        """[R, 1, 1, S], a mask that closes nothing."""
        return self.keys.new_zeros(len(self.lengths), 1, 1, self.capacity)

    def join(self, other: KVCache, order: Sequence[int]) -> None:
        """Take in the rows of another cache of the same capacity.

        One layer after another: nothing of the cache's size is made as long as there is room that
        rows have left.

        Args:
            other: not used any more.
            order: of all rows, the others' counted behind the own ones.
        """
        num, room = len(order), self._stored[0].shape[1]
        if num > room:
            rows = max(num, 2 * room)
            self._stored = tuple(
                part.new_zeros(len(part), rows, *part.shape[2:]) for part in self._stored
            )
        index = torch.tensor(list(order), device=self.lengths.device)
        for stored, own, theirs in zip(
            self._stored, (self.keys, self.values), (other.keys, other.values), strict=True
        ):
            for layer in range(len(own)):
                stored[layer, :num] = torch.cat([own[layer], theirs[layer]])[index]
        self.keys, self.values = (stored[:, :num] for stored in self._stored)
        if self._closed is not None or other._closed is not None:
            parts = [self, other]
            masks = [part._open() if part._closed is None else part._closed for part in parts]
            self._closed = torch.cat(masks)[index]
        self.lengths = torch.cat([self.lengths, other.lengths])[index]
        both = self._host_lengths + other._host_lengths
        self._host_lengths = [both[row] for row in order]
        self._num = 0


def interleaved(own: int, others: int, branches: int) -> list[int]:
    """Rows of two groups, each branch by branch, as one group branch by branch.

    Args:
        own: images of the first group.
        others: images of the second, whose rows are counted behind.
        branches: rows of each image.
    """
    first = [[branch * own + row for row in range(own)] for branch in range(branches)]
    behind = branches * own
    second = [
        [behind + branch * others + row for row in range(others)] for branch in range(branches)
    ]
    return [row for pair in zip(first, second, strict=True) for part in pair for row in part]
