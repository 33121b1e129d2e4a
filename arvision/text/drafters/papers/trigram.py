"""A law of the next token that adapts to the target, and a search that drafts from it."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ....decoding.tree import TokenTree
from ....decoding.verify import Round, Verdict
from ....errors import InputError
from ..base import TextDrafter, register

BACKOFF = 0.3
"""Weight of what follows the last token alone against what follows the last two."""

FIRST, SECOND = 1.25, 19652.0
"""Constants of the exploration term, as Schrittwieser et al., "Mastering Atari, Go, Chess and Shogi by
Planning with a Learned Model", 2020, have them."""

LARGEST = 1e100
"""Weights are scaled down from here on."""


class _Row:
    """What follows a context: weights whose shares are probabilities, the newest with at least `rate`."""

    __slots__ = ("_best", "increment", "total", "weights")

    def __init__(self) -> None:
        self.weights: dict[int, float] = {}
        self.total, self.increment = 0.0, 1.0
        self._best: list[tuple[int, float]] | None = None

    def add(self, token: int, rate: float) -> None:
        """P := (1 - r) P + r [token], with r = max(rate, 1 / number of tokens so far)."""
        if rate > 0:
            self.increment = max(self.increment, self.total * rate / (1 - rate))
        if self.increment > LARGEST:
            self.weights = {other: weight / LARGEST for other, weight in self.weights.items()}
            self.total, self.increment = self.total / LARGEST, self.increment / LARGEST
        self.weights[token] = self.weights.get(token, 0.0) + self.increment
        self.total += self.increment
        self._best = None

    def best(self, num: int) -> list[tuple[int, float]]:
        """The `num` likeliest tokens with their probabilities; asked for again, they are at hand."""
        if self._best is None or len(self._best) < min(num, len(self.weights)):
            found = heapq.nlargest(num, self.weights.items(), key=lambda item: item[1])
            self._best = [(token, weight / self.total) for token, weight in found]
        return self._best[:num]


class Trigrams:
    """The law of a token after two tokens, and after one: sparse, and it adapts.

    Counted at first; each further token moves the laws of its contexts towards itself, so that what
    the target says now weighs at least `rate` against all that was counted before.

    Args:
        rate: least weight of the newest token, 0 (counts for ever) to below 1.
    """

    def __init__(self, rate: float = 0.0) -> None:
        self.rate = rate
        self._rows: dict[tuple[int, ...], _Row] = {}

    def add(self, text: Sequence[int], start: int = 0) -> None:
        """Learn the tokens `text[start:]` after what stands before them."""
        for place in range(max(1, start), len(text)):
            for size in range(1, min(place, 2) + 1):
                context = tuple(text[place - size : place])
                self._rows.setdefault(context, _Row()).add(text[place], self.rate)

    def law(self, before: int, last: int, num: int) -> list[tuple[int, float]]:
        """The `num` likeliest tokens after (before, last), with probabilities."""
        mixed: dict[int, float] = {}
        for context, weight in (((before, last), 1.0 - BACKOFF), ((last,), BACKOFF)):
            row = self._rows.get(context)
            if row is not None:
                for token, share in row.best(num):
                    mixed[token] = mixed.get(token, 0.0) + weight * share
        return heapq.nlargest(num, mixed.items(), key=lambda item: item[1])


class _Node:
    """A place in the search: the tokens that may follow, how often each was tried, what it gave."""

    __slots__ = ("below", "gains", "law", "visits")

    def __init__(self, law: list[tuple[int, float]]) -> None:
        self.law = law
        self.visits, self.gains = [0] * len(law), [0.0] * len(law)
        self.below: dict[int, _Node] = {}

    def choose(self, exploration: float) -> int:
        """The child of the largest score: Q + E P sqrt(N) / (1 + n), Q what it gave on average."""
        total = sum(self.visits)
        weight = exploration * (FIRST + math.log((total + SECOND + 1) / SECOND)) * total**0.5
        best, found = -1.0, 0
        for place, (_, share) in enumerate(self.law):
            tried = self.visits[place]
            score = weight * share / (1 + tried) + (self.gains[place] / tried if tried else 0.0)
            if score > best:
                best, found = score, place
        return found


@register("trigram", summary="an adaptive law of three tokens in a row, drafted by search (ADED)")
class TrigramDrafter(TextDrafter):
    """A tree that a Monte-Carlo tree search finds in an adaptive trigram law.

    The law begins with a corpus and the prompts and moves with every token that the target makes
    final. A search walks down from the last two tokens `searches` times, at each place to the child
    of the largest

        Q + E P sqrt(N) / (1 + n),   E = exploration (1.25 + log((N + 19653) / 19652)),

    where P is the child's probability, n how often it was walked through, N the sum of these over
    its siblings, and Q what the walks through it gave on average: the tokens that the law expects to
    be accepted from there on, as a share of the places left. The places walked through most are the
    draft.

    Args:
        corpus: lists of ids to begin with.
        num_draft: candidates per pass.
        max_depth: levels.
        width: children of a candidate.
        exploration: weight of little tried branches; 0 walks the likeliest way only.
        searches: walks per pass.
        rate: least weight of the newest token in the laws of its contexts; 0 counts for ever.

    Raises:
        InputError: a value out of range.

    Paper: Liu et al., "Adaptive Draft-Verification for Efficient Large Language Model Decoding",
    2024 (ADED): the trigram representation and its update, the draft maker and its score.
    """

    def __init__(
        self,
        corpus: Iterable[Sequence[int]] = (),
        num_draft: int = 12,
        max_depth: int = 8,
        width: int = 4,
        exploration: float = 1.0,
        searches: int = 64,
        rate: float = 0.1,
    ) -> None:
        if min(num_draft, max_depth, width, searches) < 1 or exploration < 0 or not 0 <= rate < 1:
            raise InputError(
                f"num_draft {num_draft}, max_depth {max_depth}, width {width}, searches {searches}, "
                f"exploration {exploration}, rate {rate}: expected numbers >= 1, exploration >= 0, "
                "0 <= rate < 1"
            )
        self.num_draft, self.max_depth, self.width = num_draft, max_depth, width
        self.exploration, self.searches = exploration, searches
        self.counts = Trigrams(rate)
        for text in corpus:
            self.counts.add(text)

    def begin(self, state: object) -> None:
        """Learn the prompts."""
        for text in self.histories:
            self.counts.add(text)

    def learn(self, row: int, new: list[int]) -> None:
        """Move the law towards what became final."""
        text = self.histories[row]
        self.counts.add(text, len(text) - len(new))

    def tree_of(self, row: int, num: int) -> tuple[list[int], list[int]]:
        """The places that the search walked through most."""
        text = self.histories[row]
        if len(text) < 2 or num < 1:
            return [], []
        root = _Node(self.counts.law(text[-2], text[-1], self.width))
        for _ in range(self.searches if root.law else 0):
            self._walk(root, text[-2], text[-1])
        # By visits; a place has no more of them than the one above it, which is listed first.
        tokens: list[int] = []
        parents: list[int] = []
        numbers = itertools.count()
        heap: list[tuple[int, int, int, _Node, int]] = []

        def open_below(node: _Node, parent: int) -> None:
            for place, visits in enumerate(node.visits):
                if visits:
                    heapq.heappush(heap, (-visits, next(numbers), parent, node, place))

        open_below(root, -1)
        while heap and len(tokens) < num:
            _, _, parent, node, place = heapq.heappop(heap)
            tokens.append(node.law[place][0])
            parents.append(parent)
            if place in node.below:
                open_below(node.below[place], len(tokens) - 1)
        return tokens, parents

    def _walk(self, root: _Node, before: int, last: int) -> None:
        """One walk down to the last level, or to where the law ends, and what it gave."""
        node, path = root, []
        while node.law:
            place = node.choose(self.exploration)
            path.append((node, place))
            if len(path) == self.max_depth:
                break
            before, last = last, node.law[place][0]
            if place not in node.below:
                node.below[place] = _Node(self.counts.law(before, last, self.width))
            node = node.below[place]
        expected = 0.0
        for level in range(len(path) - 1, -1, -1):
            node, place = path[level]
            expected = node.law[place][1] * (1 + expected)
            node.visits[place] += 1
            node.gains[place] += expected / (self.max_depth - level)


@register("jacobi", summary="the last pass's guesses for what follows (Jacobi window)")
class JacobiWindow(TextDrafter):
    """What the target said behind its final tokens is drafted again: no model, no table.

    A position that enters the window starts with what last followed its left neighbour in the text,
    else with that neighbour itself.

    Args:
        num_draft: candidates per pass.

    Paper: Santilli et al., "Accelerating Transformer Inference for Translation via Parallel
    Decoding", 2023, section 3 (Jacobi decoding); Fu et al., "Break the Sequential Dependency of LLM
    Inference Using Lookahead Decoding", 2024.
    """

    def __init__(self, num_draft: int = 10) -> None:
        if num_draft < 1:
            raise InputError(f"num_draft {num_draft}: expected an integer >= 1")
        self.num_draft = num_draft

    branches = False
    why_not_fixed = None  # pyright: ignore[reportAssignmentType]
    renewed = ("_guesses", "_num_held", "_least_held")

    def begin(self, state: object) -> None:
        """No guesses yet; what follows what in the prompts."""
        after = torch.full((len(self.histories), self.vocab_size), -1)
        for row, text in enumerate(self.histories):
            pairs = dict(itertools.pairwise(text))
            if pairs:
                after[row, list(pairs)] = torch.tensor(list(pairs.values()))
        device = self.noise.device
        self._after = after.to(device)
        self._root = torch.tensor([text[-1:] for text in self.histories], device=device)
        self._guesses, self._num_held = self._root[:, :0], torch.zeros_like(self._root)
        self._least_held = 0

    def carry(self) -> list[Tensor]:
        """What follows what, and the last known token."""
        return [self._after, self._root]

    def restore(self, carried: list[Tensor]) -> None:
        """Go on from what a pass left."""
        self._after, self._root = carried

    def observe(self, batch: Round, verdict: Verdict) -> None:
        """Keep what the pass put behind its final tokens (of a chain only), and what follows what."""
        tokens, counts = verdict.tokens, verdict.counts[:, None]
        num = tokens.shape[1]
        order = torch.arange(num, device=tokens.device)
        before = torch.cat([self._root, tokens[:, :-1]], dim=1)
        # Of pairs that begin alike the last counts; all of them write it.
        is_same = (before[:, :, None] == before[:, None]) & (order < counts)[:, None]
        last = torch.where(is_same, order, -1).amax(-1)
        known = self._after.gather(1, before)
        newest = torch.where(last < 0, known, tokens.gather(1, last.clamp(min=0)))
        self._after.scatter_(1, before, newest)
        end = tokens.gather(1, (counts - 1).clamp(min=0))
        self._root = torch.where(counts > 0, end, self._root)
        is_chain = verdict.path is None
        self._guesses = tokens.gather(1, (counts + order[:-1]).clamp(max=num - 1))
        self._num_held = (num - counts) * is_chain
        most = num if verdict.given is None else max(verdict.given, default=num)
        self._least_held = max(0, num - most) * is_chain

    def propose(self, tokens: Tensor, lengths: Tensor, num: int, round_number: int) -> TokenTree:
        """The guesses, continued."""
        first = min(self._least_held, num)
        chain = [self._root, *(self._guesses[:, place : place + 1] for place in range(first))]
        for place in range(first, num):
            found = self._after.gather(1, chain[-1])
            token = torch.where(found < 0, chain[-1], found)
            if place < self._guesses.shape[1]:
                is_held = place < self._num_held
                token = torch.where(is_held, self._guesses[:, place : place + 1], token)
            chain.append(token)
        return TokenTree(torch.cat(chain, dim=1)[:, 1:])

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows`."""
        super().select(rows)
        self._after, self._root = self._after[rows], self._root[rows]
        self._guesses, self._num_held = self._guesses[rows], self._num_held[rows]
