"""Trees whose candidates carry pseudo tokens: which candidates, and who carries how many of them.

What the accepted candidate of a pass carried is what the next tree can be made from. So there is a
tree for each *state*, the number of guesses at hand, and where a pass ends decides the next state.

Paper: Chen et al., "Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM
Inference", 2024 (PPD), section 4: candidates by accumulated accuracy, pseudo tokens where they are
worth the most, the gain in the steady state of the trees, and the size of the most gain per second.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ....decoding.tree import best_tree, listed

Rates = tuple[tuple[float, ...], ...]
"""How often guess r of pseudo token k is right, by k and r."""

SIZES = (1, 2, 3, 5, 7, 11, 15, 23, 31, 47, 63)
"""Candidates and pseudo tokens of a pass that `best_size` chooses from."""


@dataclass(frozen=True, eq=False)
class GuessTree:
    """Places of a pass: the last known token (place 0), candidates, and the pseudo tokens of both.

    Attributes:
        parents: [T] of all places but the first, as `TokenTree` has them.
        guesses: level and rank of the guess that each candidate is.
        owners: [T + 1], the place whose pseudo token a place is; its own for tokens.
        numbers: [T + 1], which pseudo token; -1 for tokens.
        members: [T + 1], which of its members; 0 for tokens.
        carried: pseudo tokens of each place of a token, the first included.
        speakers: [C + 1, K, E], the places of these pseudo tokens; 0 where there is none.
    """

    parents: tuple[int, ...]
    guesses: tuple[tuple[int, int], ...]
    owners: tuple[int, ...]
    numbers: tuple[int, ...]
    members: tuple[int, ...]
    carried: tuple[int, ...]
    speakers: np.ndarray

    @property
    def size(self) -> int:
        """Candidates and pseudo tokens."""
        return len(self.parents)


def with_pseudo(
    parents: Sequence[int],
    carried: Sequence[int],
    num_members: int,
    most: int,
    guesses: Sequence[tuple[int, int]] = (),
) -> GuessTree:
    """Tokens with pseudo tokens behind them, each member in a chain of its own.

    Args:
        parents: of the candidates, -1 for the place before them.
        carried: pseudo tokens of that place and of each candidate.
        num_members: E.
        most: K.
        guesses: see `GuessTree`.
    """
    num = len(parents) + 1
    above, owners = list(parents), list(range(num))
    numbers, members = [-1] * num, [0] * num
    speakers = np.zeros((num, most, num_members), dtype=np.int64)
    for place, steps in enumerate(carried):
        for member in range(num_members):
            parent = place - 1
            for number in range(steps):
                above.append(parent)
                parent = len(above) - 1
                owners.append(place)
                numbers.append(number)
                members.append(member)
                speakers[place, number, member] = len(above)
    return GuessTree(
        parents=tuple(above),
        guesses=tuple(guesses),
        owners=tuple(owners),
        numbers=tuple(numbers),
        members=tuple(members),
        carried=tuple(carried),
        speakers=speakers,
    )


def guesses_of(parents: Sequence[int]) -> list[tuple[int, int]]:
    """Level of each candidate, and its number among its siblings."""
    found: list[tuple[int, int]] = []
    for place, parent in enumerate(parents):
        level = found[parent][0] + 1 if parent >= 0 else 0
        found.append((level, list(parents[:place]).count(parent)))
    return found


def ends(parents: Sequence[int], rates: Rates) -> list[float]:
    """Probability that the accepted path ends at the first place, and at each candidate."""
    reached, left = [1.0], [1.0]
    for (level, rank), parent in zip(guesses_of(parents), parents, strict=True):
        own = reached[parent + 1] * rates[level][rank]
        reached.append(own)
        left.append(own)
        left[parent + 1] -= own
    return left


def gain(parents: Sequence[int], rates: Rates) -> float:
    """Expected tokens of a pass: its own token, and the candidates accepted before it."""
    depth = [0] + [level + 1 for level, _ in guesses_of(parents)]
    return 1.0 + sum(d * p for d, p in zip(depth, ends(parents, rates), strict=True))


def loads(left: Sequence[float], worth: Sequence[float], room: int) -> list[int]:
    """Pseudo tokens for each place, `room` in all, where they add the most expected worth.

    Args:
        left: probabilities that the path ends at a place.
        worth: of the state with 0, 1, ... K guesses.
        room: pseudo tokens, all members of one counted once.
    """
    carried, most = [0] * len(left), len(worth) - 1

    def step(place: int) -> float:
        """What the next pseudo token of a place adds; a step that pays later counts with it."""
        own, have = worth[carried[place]], carried[place]
        slopes = [(worth[n] - own) / (n - have) for n in range(have + 1, most + 1)]
        return left[place] * max(slopes)

    heap = [(-step(place), place) for place in range(len(left))] if most else []
    heapq.heapify(heap)
    while heap and room:
        _, place = heapq.heappop(heap)
        carried[place] += 1
        room -= 1
        if carried[place] < most:
            heapq.heappush(heap, (-step(place), place))
    return carried


def state_tree(rates: Rates, state: int, size: int, num_members: int, worth: Sequence[float]):
    """The tree of at most `size` places for `state` guesses: every number of candidates is tried."""
    most = len(worth) - 1
    whole = listed(best_tree(rates[:state], size, state)) if state else ()
    best: tuple[float, tuple[int, ...], list[int]] = (0.0, (), [0])
    for num in range(len(whole) + 1):
        left = ends(whole[:num], rates)
        carried = loads(left, worth, (size - num) // num_members)
        value = gain(whole[:num], rates)
        value += sum(p * worth[n] for p, n in zip(left, carried, strict=True))
        if value > best[0]:
            best = value, whole[:num], carried
    _, parents, carried = best
    return with_pseudo(parents, carried, num_members, most, guesses_of(parents))


def steady_gain(trees: Sequence[GuessTree], rates: Rates) -> float:
    """Tokens of a pass in the long run, where each pass's end decides the next one's tree."""
    moves, gains = np.zeros((len(trees), len(trees))), []
    for state, tree in enumerate(trees):
        parents = tree.parents[: len(tree.guesses)]
        gains.append(gain(parents, rates))
        for probability, carried in zip(ends(parents, rates), tree.carried, strict=True):
            moves[state, carried] += probability
    share = np.full(len(trees), 1 / len(trees))
    for _ in range(200):
        share = 0.5 * share + 0.5 * (share @ moves)
    return float(share @ np.array(gains))


@lru_cache(maxsize=64)
def dynamic_trees(rates: Rates, size: int, num_members: int) -> tuple[GuessTree, ...]:
    """A tree of at most `size` places for each state 0, 1, ... K.

    What a state is worth is what its tree gives; as trees depend on it, they are made twice.
    """
    most = len(rates)
    halves = [best_tree(rates[:state], max(1, size // 2), state) for state in range(1, most + 1)]
    worth = [1.0, *(gain(listed(half), rates) for half in halves)]
    trees: list[GuessTree] = []
    for _ in range(2):
        trees = [state_tree(rates, state, size, num_members, worth) for state in range(most + 1)]
        worth = [gain(tree.parents[: len(tree.guesses)], rates) for tree in trees]
    return tuple(trees)


def best_size(rates: Rates, num_members: int, seconds: Callable[[int], float]) -> int:
    """Places behind the last known token with which a pass gives the most tokens per second.

    Args:
        rates: see `Rates`.
        num_members: E.
        seconds: of a pass with that many places, the first included.
    """

    def speed(size: int) -> float:
        return steady_gain(dynamic_trees(rates, size, num_members), rates) / seconds(size + 1)

    return max(SIZES, key=lambda size: (speed(size), -size))


@lru_cache(maxsize=64)
def unit_trees(most: int, num_members: int, behind_all: bool) -> tuple[GuessTree, ...]:
    """Chains of 0, 1, ... K candidates with K pseudo tokens behind the last one, or behind all."""
    trees = []
    for num in range(most + 1):
        carried = [most if behind_all else 0] * num + [most]
        guesses = [(level, 0) for level in range(num)]
        chain = list(range(-1, num - 1))
        trees.append(with_pseudo(chain, carried, num_members, most, guesses))
    return tuple(trees)
