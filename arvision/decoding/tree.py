"""Candidates with parents: which of them may look at which, and how deep they stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..contracts import Edit
from ..errors import InputError, StateError


def check_parents(parents: Tensor, num: int) -> None:
    """Refuse a list of parents that is not a tree in topological order.

    Args:
        parents: [T] int64, -1 for the committed prefix.
        num: T.

    Raises:
        InputError: another shape, or a parent that does not come before its child.
    """
    if parents.shape != (num,):
        raise InputError(f"parents {tuple(parents.shape)}: expected [{num}], one per candidate")
    order = torch.arange(num, device=parents.device)
    wrong = ((parents >= order) | (parents < -1)).nonzero()
    if len(wrong):
        child = int(wrong[0])
        raise InputError(
            f"candidate {child} has parent {int(parents[child])}: expected -1 (the committed "
            f"prefix) or an earlier candidate"
        )


def check_path(kept: Tensor, counts: Tensor, parents: Tensor | None, num: int, batch: int) -> None:
    """Refuse candidates to keep that are not a path behind the committed prefix.

    Args:
        kept: [B, K] int64, indices into the candidates.
        counts: [B] int64, how many of each row count.
        parents: [T] int64 of the candidates; None for a chain.
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
    parent = kept - 1 if parents is None else parents.to(kept.device)[kept.clamp(0, num - 1)]
    if bool((used & (parent != before)).any()):
        raise StateError("kept is not a path: each kept candidate must follow its parent")


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
    if bool(((positions < -1) | (positions >= num_tokens)).any()):
        raise InputError(f"positions: expected -1 (padding) or 0..{num_tokens - 1}")


def ancestor_mask(parents: Tensor) -> Tensor:
    """[T, T] bool, true where candidate t descends from (or is) candidate u; parents [T]."""
    return topology(tuple(parents.tolist()), parents.device).ancestors


def depths(parents: Tensor) -> Tensor:
    """[T] int64, number of ancestors of each candidate among the candidates; parents [T]."""
    return topology(tuple(parents.tolist()), parents.device).depths


@dataclass(frozen=True)
class TokenTree:
    """What a drafter proposes in one round: candidates behind the last known token.

    Attributes:
        tokens: [B, T] int64; -1 where a row has no draft (then none of its descendants is one).
        logq: [B, T, V], the law that each draft was drawn from (for siblings the same: the law
            before any of them was taken out); None for drafts that were not drawn but chosen.
        parents: [T] int64 on the CPU, `parents[t] < t`, -1 for the last known token; one topology
            for all rows. None for a chain, which is -1, 0, 1, ...
        edit: what the pass should change inside the network, for states that are `Editable`.
    """

    tokens: Tensor
    logq: Tensor | None = None
    parents: Tensor | None = None
    edit: Edit | None = None

    def __post_init__(self) -> None:
        if self.parents is not None:
            check_parents(self.parents, self.tokens.shape[1])


@dataclass(frozen=True)
class Topology:
    """What follows from the parents of T candidates.

    Attributes:
        parents: T integers.
        depths: [T] int64, 0 for children of the last known token.
        ancestors: [T, T] bool, each candidate's ancestors and itself.
        laws: [T] int64, which law judges a candidate: 0 for the one after the last known token,
            t + 1 for the one after candidate t.
        children: [T + 1, C] int64, the candidates that each law judges, in order; -1 for none.
        num_levels: the largest depth plus one.
    """

    parents: tuple[int, ...]
    depths: Tensor
    ancestors: Tensor
    laws: Tensor
    children: Tensor
    num_levels: int


@lru_cache(maxsize=256)
def topology(parents: tuple[int, ...], device: torch.device) -> Topology:
    """The `Topology` of parents that `check_parents` accepts."""
    num = len(parents)
    mask = np.eye(num, dtype=bool)
    children: list[list[int]] = [[] for _ in range(num + 1)]
    for child, parent in enumerate(parents):
        children[parent + 1].append(child)
        if parent >= 0:
            mask[child] |= mask[parent]
    widest = max(1, max(map(len, children)))
    table = [row + [-1] * (widest - len(row)) for row in children]
    depths = mask.sum(1) - 1
    return Topology(
        parents=parents,
        depths=torch.from_numpy(depths).to(device),
        ancestors=torch.from_numpy(mask).to(device),
        laws=torch.tensor(parents, dtype=torch.int64, device=device) + 1,
        children=torch.tensor(table, dtype=torch.int64, device=device),
        num_levels=int(depths.max()) + 1 if num else 0,
    )


def best_tree(acceptance: Sequence[float], num: int, max_depth: int) -> Tensor:
    """Parents [num] of the tree with the most expected accepted drafts.

    The k-th best guess at any place is taken to be right with probability `acceptance[k]`,
    whatever its place; a candidate is then accepted with the product along its path, and the best
    tree of n candidates holds the n largest products. Siblings stand in the order of their rank.

    Args:
        acceptance: probabilities by rank, descending.
        num: candidates.
        max_depth: levels at most.

    Paper: Chen et al., "Sequoia: Scalable, Robust, and Hardware-aware Speculative Decoding", 2024,
    section 3.1 (there by dynamic programming; with positional acceptance the greedy choice is
    the same tree).
    """
    import heapq

    # (minus the product, order of entry, depth, rank, parent in `parents`)
    heap = [(-acceptance[0], 0, 0, 0, -1)]
    parents: list[int] = []
    entered = 1
    while heap and len(parents) < num:
        value, _, depth, rank, parent = heapq.heappop(heap)
        own = len(parents)
        parents.append(parent)
        if rank + 1 < len(acceptance):
            sibling = value / acceptance[rank] * acceptance[rank + 1]
            heapq.heappush(heap, (sibling, entered, depth, rank + 1, parent))
            entered += 1
        if depth + 1 < max_depth:
            heapq.heappush(heap, (value * acceptance[0], entered, depth + 1, 0, own))
            entered += 1
    return torch.tensor(parents, dtype=torch.int64)


def join_rows(rows: Sequence[tuple[list[int], list[int]]], device: torch.device) -> TokenTree:
    """One tree for a batch out of one tree per row.

    A place of the common tree is a path of child numbers (first child, second child, ...); a row
    that has no candidate there is padded with -1. Rows whose trees all are chains give a chain.

    Args:
        rows: tokens and parents of each row's tree.
        device: of the result.
    """
    if len(rows) == 1:
        tokens, parents = rows[0]
        common, places = parents, [list(range(len(parents)))]
    else:
        common, places = common_places([parents for _, parents in rows])
    drafts = np.full((len(rows), len(common)), -1, dtype=np.int64)
    for row, (tokens, _) in enumerate(rows):
        drafts[row, places[row]] = tokens
    return TokenTree(
        torch.from_numpy(drafts).to(device),
        parents=None if is_chain(common) else torch.tensor(common, dtype=torch.int64),
    )


def common_places(all_parents: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """Parents of the smallest tree that holds all of these, and where each row's nodes are."""
    common: list[int] = []
    index: dict[tuple[int, int], int] = {}
    places = []
    for parents in all_parents:
        mine: list[int] = []
        num_children: dict[int, int] = {}
        for parent in parents:
            above = -1 if parent < 0 else mine[parent]
            number = num_children.get(parent, 0)
            num_children[parent] = number + 1
            place = index.get((above, number))
            if place is None:
                place = index[above, number] = len(common)
                common.append(above)
            mine.append(place)
        places.append(mine)
    return common, places


def without_padding(tree: TokenTree) -> TokenTree:
    """The tree without the candidates that no row has."""
    used = (tree.tokens >= 0).any(0)
    if bool(used.all()):
        return tree
    keep = used.nonzero()[:, 0]
    parents = tree.parents
    if parents is not None:
        renumbered = (used.cumsum(0) - 1).cpu()
        own = parents[keep.cpu()]
        parents = torch.where(own < 0, own, renumbered[own.clamp(min=0)])
    logq = None if tree.logq is None else tree.logq[:, keep]
    return TokenTree(tree.tokens[:, keep], logq, parents)
