"""Jacobi decoding with a tree of fixed shape, for maximal coupling.

Every level of the tree is a position, with one law for all its candidates: that of the last pass, or
a first one. The first child of a place is the draft of the chain, which has that law given all that
came before; its siblings are drawn from the same law without the ones before them, afresh in every
round. So siblings are tried in turn by the rule without replacement, which is exact whatever the
shape of the tree, as long as that depends only on what was drawn before and on siblings that were
tried.

Behind the first place where no sibling stands the drafts of the chain meet the laws of this pass in
maximal coupling, one place at a time, as in a chain.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..contracts import Conditions
from .jacobi import JacobiDrafter
from .noise import Noise
from .tree import TokenTree, chain_length, topology
from .tree_rules import without_replacement
from .verify import Round, Verdict, maximal_coupling

FIRST = (0.53, 0.085, 0.05, 0.035, 0.025, 0.02)
"""Chance that a sibling stands, by its number, at the first place of a pass (`llamagen-fashion`)."""

LATER = (0.78, 0.04, 0.025, 0.015, 0.01, 0.01)
"""The same at later places, behind candidates that stand."""


@lru_cache(maxsize=64)
def static_parents(num: int, levels: int) -> tuple[int, ...]:
    """Parents of a chain of `levels` candidates and of the likeliest others, `num` in all.

    Args:
        num: candidates.
        levels: of the chain, and at most of all.
    """
    parents = list(range(-1, levels - 1))
    heap: list[tuple[float, int, int, int, int]] = []
    entered = 0

    def offer(product: float, level: int, rank: int, parent: int) -> None:
        nonlocal entered
        chances = FIRST if level == 0 else LATER
        if level < levels and rank < len(chances):
            heapq.heappush(heap, (-product * chances[rank], entered, level, rank, parent))
            entered += 1

    reached = 1.0
    for level in range(levels):
        offer(reached, level, 1, level - 1)
        reached *= (FIRST if level == 0 else LATER)[0]
    while heap and len(parents) < num:
        value, _, level, rank, parent = heapq.heappop(heap)
        chances = FIRST if level == 0 else LATER
        parents.append(parent)
        offer(-value / chances[rank], level, rank + 1, parent)
        offer(-value, level + 1, 0, len(parents) - 1)
    return tuple(parents)


@lru_cache(maxsize=64)
def sibling_numbers(parents: tuple[int, ...], device: torch.device) -> Tensor:
    """[T] int64, which child of its parent each candidate is."""
    seen: Counter[int] = Counter()
    numbers = []
    for parent in parents:
        numbers.append(seen[parent])
        seen[parent] += 1
    return torch.tensor(numbers, device=device)


@lru_cache(maxsize=64)
def spines(parents: tuple[int, ...], levels: int, device: torch.device) -> Tensor:
    """[T + 1, levels + 1] int64: the law of each level if the walk ends at a place (0: the root).

    Up to that place they are those of its path; behind it those of its first children; where it has
    none those of the chain.
    """
    children: dict[int, int] = {}
    for child, parent in enumerate(parents):
        children.setdefault(parent, child)
    table = []
    for end in range(-1, len(parents)):
        path = []
        node = end
        while node >= 0:
            path.insert(0, node)
            node = parents[node]
        node = end
        while node in children:
            node = children[node]
            path.append(node)
        path += range(len(path), levels)
        table.append([0, *(place + 1 for place in path)])
    return torch.tensor(table, device=device)


class StaticTreeDrafter:
    """The chain of a Jacobi drafter, with siblings.

    Args:
        chain: it keeps laws.
        shape: parents of so many candidates on so many levels, a chain of all levels first.
    """

    branches = True
    renewed = ("_tables",)

    has_fixed_shapes = repeats_laws = True

    def __init__(
        self,
        chain: JacobiDrafter,
        shape: Callable[[int, int], tuple[int, ...]] = static_parents,
    ) -> None:
        self._chain, self._shape = chain, shape

    def start(self, noise: Noise, vocab_size: int, num_tokens: int) -> None:
        """Forget everything of an earlier batch."""
        self._noise, self._vocab_size = noise, vocab_size
        self._levels = 0
        # What a captured pass looks at must not be dropped by others meanwhile.
        self._tables: dict[Any, Tensor] = {}
        self._chain.start(noise, vocab_size, num_tokens)

    def attach(self, state: object, conditions: Conditions) -> None:
        """See `arvision.decoding.loop.Attached`."""
        self._chain.attach(state, conditions)

    def fix(self, num: int) -> None:
        """Nothing that is kept depends on the number of candidates."""

    def carry(self) -> list[Tensor]:
        """What the chain's drafter keeps; see `arvision.decoding.drafter.Carries`."""
        return self._chain.carry()

    def restore(self, carried: list[Tensor]) -> None:
        """Go on from what a pass left."""
        self._chain.restore(carried)

    def propose(self, tokens: Tensor, lengths: Tensor, num: int, round_number: int) -> TokenTree:
        """See `arvision.decoding.loop.Drafter`."""
        # Also past the end of an image: its tree does not depend on how far others are.
        levels = self._levels = min(chain_length(num + 1), num)
        chain = self._chain.propose(tokens, lengths, levels, round_number)
        if num == levels:
            return chain
        parents = self._shape(num, levels)
        shape = topology(parents, lengths.device)
        assert chain.logq is not None
        siblings = self._siblings(chain, lengths, shape.children.shape[1], round_number)
        numbers = sibling_numbers(parents, lengths.device)
        numbers = self._tables.setdefault(parents, numbers)
        drafts = siblings[:, shape.depths, numbers]
        return TokenTree(drafts, chain.logq[:, shape.depths], torch.tensor(parents))

    def _siblings(self, chain: TokenTree, lengths: Tensor, num: int, round_number: int) -> Tensor:
        """[B, D, num] tokens: the chain's, and others drawn without replacement; -1 for none."""
        drafts, law = chain.tokens, chain.logq
        assert law is not None
        num_others = min(num, law.shape[-1]) - 1
        places = lengths[:, None] + torch.arange(drafts.shape[1], device=lengths.device)
        uniforms = self._noise.uniform(places, "draft", round_number, self._vocab_size)
        gumbel = -(-uniforms.log()).log()
        scores = law.double().scatter(-1, drafts[..., None], float("-inf")) + gumbel
        best = scores.topk(num_others, dim=-1)
        others = torch.where(best.values.isfinite(), best.indices, -1)
        missing = others.new_full((*others.shape[:2], num - 1 - num_others), -1)
        return torch.cat([drafts[..., None], others, missing], dim=-1)

    def observe(self, batch: Round, verdict: Verdict) -> None:
        """Show the chain's drafter the places that matter to it, as a chain."""
        if batch.topology is None or verdict.path is None:
            self._chain.observe(batch, verdict)
            return
        assert batch.draft_logp is not None
        levels, rows = self._levels, torch.arange(len(batch.drafts), device=verdict.counts.device)
        last = verdict.path.gather(1, (verdict.counts - 2).clamp(min=0)[:, None])[:, 0]
        end = torch.where(verdict.counts > 1, last + 1, 0)
        parents = batch.topology.parents
        table = self._tables.setdefault((parents, levels), spines(parents, levels, end.device))
        spine = table[end]
        chain = Round(
            batch.drafts[:, :levels],
            batch.draft_logp[:, :levels],
            batch.target_logp[rows[:, None], spine],
            batch.positions[:, :1] + torch.arange(levels + 1, device=end.device),
            batch.noise,
            batch.number,
        )
        coupled = maximal_coupling(chain).tokens
        final = torch.arange(levels + 1, device=end.device) < verdict.counts[:, None]
        tokens = torch.where(final, verdict.tokens[:, : levels + 1], coupled)
        self._chain.observe(chain, replace(verdict, tokens=tokens, path=None))

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows`."""
        self._noise = self._noise.select(rows)
        self._chain.select(rows)


def tree_coupling(batch: Round) -> Verdict:
    """Siblings in turn in a tree, maximal coupling in a chain."""
    return maximal_coupling(batch) if batch.topology is None else without_replacement(batch)
