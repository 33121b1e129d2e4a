"""Trees of one shape for all rows, filled level by level in few operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .tree import Topology, is_chain, listed, topology


@dataclass(frozen=True)
class Level:
    """The M candidates of one level, children of P places of the level before.

    Attributes:
        parents: P candidates; (-1,) for the last known token.
        above: [P] int64, which of the level before each parent is, from 0.
        places: [M] int64, which of the P parents each candidate hangs on.
        ranks: [M] int64, which child of its parent it is.
        widest: children of a parent at most.
    """

    parents: tuple[int, ...]
    above: Tensor
    places: Tensor
    ranks: Tensor
    widest: int

    def pick(self, children: Tensor) -> Tensor:
        """The candidates [B, M] out of the best children [B, P, W] of all parents."""
        return children[:, self.places, self.ranks]


def by_level(parents: Tensor) -> Tensor:
    """The same tree [T] with its candidates numbered level by level, siblings in their order."""
    own = listed(parents)
    depths: list[int] = []
    for parent in own:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    order = sorted(range(len(own)), key=lambda node: depths[node])
    number = {-1: -1} | {node: place for place, node in enumerate(order)}
    return torch.tensor([number[own[node]] for node in order], dtype=torch.int64)


def levels_of(parents: Sequence[int], device: torch.device) -> list[Level]:
    """The levels of a tree whose candidates are numbered as `by_level` does."""
    levels, before, first = [], [-1], 0
    while first < len(parents):
        nodes = [node for node in range(first, len(parents)) if parents[node] in before]
        above = sorted({parents[node] for node in nodes})
        seen = dict.fromkeys(above, 0)
        places, ranks = [], []
        for node in nodes:
            places.append(above.index(parents[node]))
            ranks.append(seen[parents[node]])
            seen[parents[node]] += 1
        tables = [[before.index(parent) for parent in above], places, ranks]
        own, hangs, rank = (torch.tensor(table, device=device) for table in tables)
        levels.append(Level(tuple(above), own, hangs, rank, max(seen.values())))
        before, first = nodes, first + len(nodes)
    return levels


@dataclass(frozen=True)
class Plan:
    """How a tree of one shape is filled.

    Attributes:
        parents: [T], numbered level by level.
        levels: of the tree.
        fed: for each level, how what the draft reads before it hangs together: the last known token
            and the levels above; None for a chain.
    """

    parents: Tensor
    levels: list[Level]
    fed: list[Topology | None]

    @classmethod
    def of(cls, parents: Tensor, device: torch.device) -> Plan:
        """The plan of a tree [T]."""
        own, levels, fed, num = listed(parents), levels_of(listed(parents), device), [], 0
        for level in levels:
            shape = (-1, *(parent + 1 for parent in own[:num]))
            fed.append(None if is_chain(own) else topology(shape, device))
            num += len(level.places)
        return cls(parents, levels, fed)
