"""Candidates with parents: which of them may look at which, and how deep they stand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ..contracts import Edit
from ..errors import InputError, StateError


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
    order = torch.arange(num, device=parents.device)
    wrong = ((parents >= order) | (parents < -1)).nonzero()
    if len(wrong):
        place = tuple(wrong[0].tolist())
        raise InputError(
            f"candidate {place[-1]} has parent {int(parents[place])}: expected -1 (the committed "
            f"prefix) or an earlier candidate"
        )


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
    """

    tokens: Tensor
    logq: Tensor | None = None
    parents: Tensor | None = None
    edit: Edit | None = None
    num_levels: int | None = None

    def __post_init__(self) -> None:
        if self.parents is not None:
            check_parents(self.parents, self.tokens.shape[1])


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
    """

    depths: Tensor
    ancestors: Tensor
    laws: Tensor
    num_levels: int

    @cached_property
    def children(self) -> Tensor:
        """[T + 1, C] int64, the candidates that each law judges, in order; -1 for none."""
        laws, num = self.laws, self.laws.shape[-1]
        if num == 0:
            return laws.new_full((*laws.shape[:-1], 1, 1), -1)
        is_child = one_hot(laws, num + 1).transpose(-1, -2) > 0  # [..., T + 1, T]
        order = torch.arange(num, device=laws.device)
        table = torch.where(is_child, order, num).sort(-1).values
        table = table[..., : int(is_child.sum(-1).max())]
        return torch.where(table < num, table, -1)

    @cached_property
    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Laws, depths and ancestors as bits, as `arvision.kernels.verify.follow` takes them."""
        order = torch.arange(self.laws.shape[-1], device=self.laws.device)
        return self.laws, self.depths, (self.ancestors.long() << order).sum(-1)

    @property
    def parents(self) -> tuple[Any, ...]:
        """T integers, -1 for the last known token; lists of them where rows have their own."""
        return tuple((self.laws - 1).tolist())

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
    )


def topology_of(parents: Tensor, num_levels: int | None = None) -> Topology:
    """The `Topology` of parents [T], or of one tree for every row, [B, T].

    That of one tree is made once. Those of rows are made where the parents lie, and nothing is read
    from there: `num_levels` is their number of levels, where it is known.
    """
    if parents.dim() == 1:
        return topology(tuple(parents.tolist()), parents.device)
    num = parents.shape[1]
    above = one_hot(parents + 1, num + 1)[..., 1:].float()
    reach = above + torch.eye(num, device=parents.device)
    for _ in range(max(0, num - 1).bit_length()):
        reach = (reach @ reach).clamp(max=1)  # paths of twice as many steps
    ancestors = reach > 0
    return Topology(ancestors.sum(-1) - 1, ancestors, parents + 1, num_levels or num)


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


def with_root(parents: Tensor) -> Tensor:
    """Parents of the last known token and of the candidates behind it, [1 + T] or [B, 1 + T]."""
    return torch.cat([torch.full_like(parents[..., :1], -1), parents + 1], dim=-1)


def layout_of(
    tree: TokenTree, device: torch.device
) -> tuple[Tensor | None, Tensor | None, Topology | None]:
    """How a pass is laid out: parents [1 + T] of the root and the drafts, how far behind the known
    tokens each law stands [1 + T], and the topology of the drafts; None for a chain, and the first
    two [B, 1 + T] where rows have trees of their own."""
    above = tree.parents
    if above is None or (above.dim() == 1 and is_chain(above.tolist())):
        return None, None, None
    shape = topology_of(above.to(device), tree.num_levels)
    root = torch.zeros_like(shape.depths[..., :1])
    return with_root(shape.laws - 1), torch.cat([root, shape.depths + 1], dim=-1), shape


def without_padding(tree: TokenTree) -> TokenTree:
    """A tree that all rows share, without the candidates that no row has."""
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
