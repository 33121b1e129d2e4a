"""Candidates with parents: which of them may look at which, and how deep they stand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..contracts import Edit
from ..errors import InputError, StateError
from ..kernels.dispatch import none_left as none_left


def check_parents(parents: Tensor, num: int) -> None:
    """Refuse a list of parents that is not a tree in topological order.

    Args:
        parents: [T] int64, -1 for the committed prefix; or [B, T], a tree for every row.
        num: T.

    Raises:
        InputError: another shape, or a parent that does not come before its child.
    """
    if parents.dim() not in (1, 2) or parents.shape[-1] != num:
        raise InputError(
            f"parents {tuple(parents.shape)}: expected [{num}], one per candidate, or that for "
            "every row"
        )
    known = (parents if parents.is_cpu else parents.cpu()).numpy()
    wrong = np.argwhere((known >= np.arange(num)) | (known < -1))
    if len(wrong):
        place = tuple(wrong[0])
        raise InputError(
            f"candidate {place[-1]} has parent {int(known[place])}: expected -1 (the committed "
            f"prefix) or an earlier candidate"
        )


def is_no_tree(parents: Tensor) -> Tensor:
    """What `check_parents` refuses, told where the parents lie: one bool."""
    order = torch.arange(parents.shape[-1], device=parents.device)
    return ((parents >= order) | (parents < -1)).any()


def check_path(kept: Tensor, counts: Tensor, parents: Tensor | None, num: int, batch: int) -> None:
    """Refuse candidates to keep that are not a path behind the committed prefix.

    Args:
        kept: [B, K] int64, indices into the candidates.
        counts: [B] int64, how many of each row count.
        parents: [T] or [B, T] int64 of the candidates; None for a chain.
        num: T.
        batch: B.

    Raises:
        StateError: other shapes, an index out of range, or a parent that is not kept.
    """
    if kept.dim() != 2 or len(kept) != batch or counts.shape != (batch,):
        raise StateError(
            f"kept {tuple(kept.shape)} and counts {tuple(counts.shape)}: expected [{batch}, K] and "
            f"[{batch}]"
        )
    places = torch.arange(kept.shape[1], device=kept.device)
    used = places < counts[:, None]
    if int(counts.max()) > kept.shape[1] or bool((used & ((kept < 0) | (kept >= num))).any()):
        raise StateError(f"kept must name candidates 0..{num - 1}, as many as counts says")
    before = kept.roll(1, dims=1).masked_fill(places == 0, -1)
    parent = kept - 1
    if parents is not None:
        own = parents.to(kept.device).expand(batch, num)
        parent = own.gather(1, kept.clamp(0, num - 1))
    if bool((used & (parent != before)).any()):
        raise StateError("kept is not a path: each kept candidate must follow its parent")


def listed(parents: Tensor) -> tuple[int, ...]:
    """Parents [T] on the host, where they mostly lie."""
    return tuple((parents if parents.is_cpu else parents.cpu()).numpy().tolist())


def is_chain(parents: Sequence[int]) -> bool:
    """Whether parents are -1, 0, 1, ...: a tree without branches."""
    return all(parent == place - 1 for place, parent in enumerate(parents))


def check_placed(
    tokens: Tensor, positions: Tensor, visible: Tensor, shape: tuple[int, int], num_tokens: int
) -> None:
    """Refuse what does not fit `arvision.contracts.FeedsAnywhere`.

    Args:
        tokens: [B, T].
        positions: [B, T], -1 for padding.
        visible: [B, T, N].
        shape: B and T.
        num_tokens: N.

    Raises:
        InputError: another shape, or a position out of range.
    """
    if tokens.shape != shape or positions.shape != shape:
        raise InputError(
            f"tokens {tuple(tokens.shape)} at positions {tuple(positions.shape)}: expected "
            f"[{shape[0]}, T] both"
        )
    if visible.shape != (*shape, num_tokens):
        raise InputError(f"visible {tuple(visible.shape)}: expected {[*shape, num_tokens]}")
    known = (positions if positions.is_cpu else positions.cpu()).numpy()
    if ((known < -1) | (known >= num_tokens)).any():
        raise InputError(f"positions: expected -1 (padding) or 0..{num_tokens - 1}")


def ancestor_mask(parents: Tensor) -> Tensor:
    """[T, T] bool, true where candidate t descends from (or is) candidate u; parents [T].

    For trees of the rows, parents [B, T], it is [B, T, T].
    """
    return topology_of(parents).ancestors


def depths(parents: Tensor) -> Tensor:
    """Number of ancestors of each candidate among the candidates, int64 like parents."""
    return topology_of(parents).depths


@dataclass(frozen=True)
class TokenTree:
    """What a drafter proposes in one round: candidates behind the last known token.

    Attributes:
        tokens: [B, T] int64; -1 where a row has no draft (then none of its descendants is one).
        logq: [B, T, V], the law that each draft was drawn from (for siblings the same: the law
            before any of them was taken out); None for drafts that were not drawn but chosen.
        parents: [T] int64 on the CPU, `parents[t] < t`, -1 for the last known token, one topology
            for all rows; or [B, T] where the tokens are, a tree for every row. None for a chain,
            which is -1, 0, 1, ...
        edit: what the pass should change inside the network, for states that are `Editable`.
        num_levels: levels of the deepest tree, where rows have their own and the drafter knows; None
            to take T for it.
        most_children: the most of any candidate, likewise.
        rows: tokens and parents of each row on the host, without padding, where they were made there.
    """

    tokens: Tensor
    logq: Tensor | None = None
    parents: Tensor | None = None
    edit: Edit | None = None
    num_levels: int | None = None
    most_children: int | None = None
    rows: Sequence[tuple[list[int], list[int]]] | None = None

    def __post_init__(self) -> None:
        # What lies on an accelerator is looked at there, and read with the round's verdict.
        if self.parents is not None and self.parents.is_cpu and not torch.compiler.is_compiling():
            check_parents(self.parents, self.tokens.shape[1])

    def shortened(self, most: Sequence[int]) -> TokenTree:
        """The same with at most `most[b]` candidates in row b, the first ones.

        Parents come before their children and elder siblings before younger ones, so that what is
        left is a tree, and as lawful as before where `most` does not depend on what was drawn.
        """
        limits = torch.tensor(most, device=self.tokens.device)[:, None]
        order = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        rows = self.rows
        if rows is not None:
            pairs = zip(rows, most, strict=True)
            rows = [(tokens[:num], above[:num]) for (tokens, above), num in pairs]
        return replace(self, tokens=self.tokens.where(order < limits, -1), rows=rows)

    def topology(self, device: torch.device) -> Topology | None:
        """How the candidates hang together; None for a chain."""
        above = self.parents
        if above is None:
            return None
        if above.dim() == 2:
            return topology_of(above.to(device), self.num_levels, self.most_children)
        own = listed(above)
        return None if is_chain(own) else topology(own, device)


@dataclass(frozen=True)
class Topology:
    """What follows from the parents of T candidates.

    Rows share one topology, or have one each: then all tensors have a dimension B in front.

    Attributes:
        depths: [T] int64, 0 for children of the last known token.
        ancestors: [T, T] bool, each candidate's ancestors and itself.
        laws: [T] int64, which law judges a candidate: 0 for the one after the last known token,
            t + 1 for the one after candidate t.
        num_levels: the largest depth of a candidate plus one, or more: where rows have trees of
            their own, as many as their drafter tells of, else T. Padding may stand deeper.
        listed: parents on the host, of a topology that rows share; None where rows have their own.
        most_children: of any candidate or more, where rows have their own and the drafter knows.
    """

    is_constant = True

    depths: Tensor
    ancestors: Tensor
    laws: Tensor
    num_levels: int
    listed: tuple[int, ...] | None = None
    most_children: int | None = None

    @cached_property
    def children(self) -> Tensor:
        """[T + 1, C] int64, the candidates that each law judges, in order; -1 for none."""
        laws, num = self.laws, self.laws.shape[-1]
        if num == 0:
            return laws.new_full((*laws.shape[:-1], 1, 1), -1)
        order = torch.arange(num, device=laws.device)
        is_child = laws[..., None, :] == torch.arange(num + 1, device=laws.device)[:, None]
        table = torch.where(is_child, order, num).sort(-1).values
        if self.listed is not None:
            table = table[..., : max(Counter(self.listed).values())]
        elif self.most_children is not None:
            table = table[..., : self.most_children]
        return torch.where(table < num, table, -1)

    @cached_property
    def rooted(self) -> Topology:
        """See `with_root`, made once."""
        return self.with_root()

    def with_root(self) -> Topology:
        """The same with the last known token in front, as candidate 0."""
        if self.listed is not None:
            return topology((-1, *(parent + 1 for parent in self.listed)), self.laws.device)
        ancestors = torch.nn.functional.pad(self.ancestors, (1, 0, 1, 0))
        ancestors[..., 0] = True
        ahead = torch.nn.functional.pad(self.depths + 1, (1, 0))
        laws = torch.nn.functional.pad(self.laws + 1, (1, 0))
        return Topology(ahead, ancestors, laws, self.num_levels + 1)

    @cached_property
    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Laws, depths and ancestors as bits, as `arvision.kernels.verify.follow` takes them."""
        order = torch.arange(self.laws.shape[-1], device=self.laws.device)
        return self.laws, self.depths, (self.ancestors.long() << order).sum(-1)

    @property
    def parents(self) -> tuple[Any, ...]:
        """T integers, -1 for the last known token; lists of them where rows have their own."""
        return tuple((self.laws - 1).tolist()) if self.listed is None else self.listed

    @property
    def is_shared(self) -> bool:
        """Whether one topology is that of all rows."""
        return self.laws.dim() == 1


@lru_cache(maxsize=256)
def topology(parents: tuple[int, ...], device: torch.device) -> Topology:
    """The `Topology` of parents that `check_parents` accepts."""
    num = len(parents)
    mask = np.eye(num, dtype=bool)
    for child, parent in enumerate(parents):
        if parent >= 0:
            mask[child] |= mask[parent]
    depths = mask.sum(1) - 1
    return Topology(
        depths=torch.from_numpy(depths).to(device),
        ancestors=torch.from_numpy(mask).to(device),
        laws=torch.tensor(parents, dtype=torch.int64, device=device) + 1,
        num_levels=int(depths.max()) + 1 if num else 0,
        listed=parents,
    )


def topology_of(
    parents: Tensor, num_levels: int | None = None, most_children: int | None = None
) -> Topology:
    """The `Topology` of parents [T], or of one tree for every row, [B, T].

    That of one tree is made once. Those of rows are made where the parents lie, and nothing is read
    from there: `num_levels` and `most_children` are as in `TokenTree`.
    """
    if parents.dim() == 1:
        return topology(listed(parents), parents.device)
    num = parents.shape[1]
    order = torch.arange(num, device=parents.device)
    # Steps up and standing still; squared often enough it counts the ways to each ancestor.
    reach = ((parents[..., None] == order) | (order == order[:, None])).float()
    for _ in range(max(0, num - 1).bit_length()):
        reach = reach.bmm(reach).clamp(max=1)
    ancestors = reach > 0
    depths = ancestors.sum(-1) - 1
    return Topology(depths, ancestors, parents + 1, num_levels or num, most_children=most_children)


def best_tree(
    acceptance: Sequence[float] | Sequence[Sequence[float]], num: int, max_depth: int
) -> Tensor:
    """Parents [num] of the tree with the most expected accepted drafts.

    The k-th best guess at a place is taken to be right with probability `acceptance[k]`, or
    `acceptance[level][k]`, whatever stands before it; a candidate is then accepted with the product
    along its path, and the best tree of n candidates holds the n largest products. Siblings stand in
    the order of their rank.

    Args:
        acceptance: probabilities by rank, descending; the same for all levels, or by level.
        num: candidates.
        max_depth: levels at most.

    Paper: Chen et al., "Sequoia: Scalable, Robust, and Hardware-aware Speculative Decoding", 2024,
    section 3.1 (there by dynamic programming; with positional acceptance the greedy choice is
    the same tree); by level: Cai et al., "Medusa", 2024, section 2.3.3.
    """
    import heapq

    rates: Any = acceptance
    levels: list[Sequence[float]] = list(rates)
    if not isinstance(rates[0], Sequence):
        levels = [rates] * max_depth
    # (minus the product, order of entry, the parent's product, level, rank, parent in `parents`)
    heap = [(-levels[0][0], 0, 1.0, 0, 0, -1)]
    parents: list[int] = []
    entered = 1
    while heap and len(parents) < num:
        value, _, above, level, rank, parent = heapq.heappop(heap)
        own = len(parents)
        parents.append(parent)
        if rank + 1 < len(levels[level]):
            sibling = -above * levels[level][rank + 1]
            heapq.heappush(heap, (sibling, entered, above, level, rank + 1, parent))
            entered += 1
        if level + 1 < min(max_depth, len(levels)):
            child = value * levels[level + 1][0]
            heapq.heappush(heap, (child, entered, -value, level + 1, 0, own))
            entered += 1
    return torch.tensor(parents, dtype=torch.int64)


CHAIN = {2: 1, 4: 3, 8: 6, 16: 11, 32: 18, 64: 26}
"""Candidates of the main chain by candidates of a pass, root included."""


def chain_length(num: int) -> int:
    """Candidates of the main chain of a tree of `num`, root included in `num` only."""
    if num in CHAIN:
        return CHAIN[num]
    below = max((size for size in CHAIN if size < num), default=2)
    above = min((size for size in CHAIN if size > num), default=64)
    if below >= above:
        return max(0, min(num - 1, CHAIN[below]))
    share = math.log(num / below) / math.log(above / below)
    return min(num - 1, round(CHAIN[below] + share * (CHAIN[above] - CHAIN[below])))


def join_rows(rows: Sequence[tuple[list[int], list[int]]], device: torch.device) -> TokenTree:
    """The trees of a batch: each row keeps its own, padded to the largest.

    So a pass holds as many candidates as the largest tree, however many rows there are, and a row's
    candidates stand in the same order in every batch.

    Args:
        rows: tokens and parents of each row's tree.
        device: of the result.
    """
    num = max(len(tokens) for tokens, _ in rows)
    drafts = np.full((len(rows), num), -1, dtype=np.int64)
    # Padding is a chain behind a row's last candidate, so that a row of a chain stays one.
    parents = np.tile(np.arange(-1, num - 1), (len(rows), 1))
    for row, (tokens, above) in enumerate(rows):
        drafts[row, : len(tokens)] = tokens
        parents[row, : len(above)] = above
    return TokenTree(
        torch.from_numpy(drafts).to(device),
        parents=_shared(parents, device),
        num_levels=max(map(_num_levels, (above for _, above in rows))),
        rows=rows,
        most_children=max(Counter(above).most_common(1)[0][1] for above in parents.tolist())
        if num
        else None,
    )


def _num_levels(parents: Sequence[int]) -> int:
    depths: list[int] = []
    for parent in parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 1)
    return max(depths, default=0)


def _shared(parents: np.ndarray, device: torch.device) -> Tensor | None:
    """Parents [B, T] as `TokenTree` has them: None for chains, [T] where all rows have the same."""
    if bool((parents == parents[:1]).all()):
        return None if is_chain(parents[0].tolist()) else torch.from_numpy(parents[0].copy())
    return torch.from_numpy(parents).to(device)


def without_padding(drafts: np.ndarray, parents: np.ndarray, device: torch.device) -> TokenTree:
    """A tree that all rows share, without the candidates that no row has.

    Args:
        drafts: [B, T] int64, -1 for none.
        parents: [T] int64.
        device: of the result.
    """
    keep = np.flatnonzero((drafts >= 0).any(0))
    number = np.full(len(parents) + 1, -1)  # its last entry is that of parent -1
    number[keep] = np.arange(len(keep))
    drafts, own = np.ascontiguousarray(drafts[:, keep]), number[parents[keep]]
    return TokenTree(
        torch.from_numpy(drafts).to(device),
        parents=torch.from_numpy(own),
        rows=[(row, own.tolist()) for row in drafts.tolist()],
    )
