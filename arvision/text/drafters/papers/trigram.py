"""A law of the next token from counts of three tokens in a row, and a tree that explores it."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ....decoding.tree import TokenTree
from ....decoding.verify import Round, Verdict
from ....errors import InputError
from ..base import TextDrafter, Trie, register

BACKOFF = 0.3
"""Weight of what follows the last token alone against what follows the last two."""


class Trigrams:
    """Counts of tokens after two tokens, and after one."""

    def __init__(self) -> None:
        self._pairs: dict[tuple[int, int], Counter[int]] = {}
        self._singles: dict[int, Counter[int]] = {}

    def add(self, text: Sequence[int], start: int = 0) -> None:
        """Count the tokens `text[start:]` after what stands before them."""
        for place in range(max(1, start), len(text)):
            token = text[place]
            self._singles.setdefault(text[place - 1], Counter())[token] += 1
            if place >= 2:
                pair = (text[place - 2], text[place - 1])
                self._pairs.setdefault(pair, Counter())[token] += 1

    def law(self, before: int, last: int, num: int) -> list[tuple[int, float]]:
        """The `num` likeliest tokens after (before, last), with probabilities."""
        mixed: dict[int, float] = {}
        for counts, weight in (
            (self._pairs.get((before, last)), 1.0 - BACKOFF),
            (self._singles.get(last), BACKOFF),
        ):
            if counts:
                total = counts.total()
                for token, count in counts.most_common(num):
                    mixed[token] = mixed.get(token, 0.0) + weight * count / total
        return heapq.nlargest(num, mixed.items(), key=lambda item: item[1])


@register("trigram", summary="counts of three tokens in a row, explored as a tree (ADED)")
class TrigramDrafter(TextDrafter):
    """A tree over an adaptive trigram law, balanced between likely and little tried branches.

    The counts come from a corpus, from the prompt and from what the target made final, and stay
    with the object. Each added candidate is the one with the largest

        value of its path + exploration * probability * sqrt(visits of its parent) / (1 + visits),

    where a path's value is its probability, and visits and successes of earlier passes correct it.

    Args:
        corpus: lists of ids to count first.
        num_draft: candidates per pass.
        max_depth: levels.
        width: children of a candidate.
        exploration: weight of little tried branches; 0 takes the likeliest only.

    Raises:
        InputError: a value out of range.

    Paper: Liu et al., "Adaptive Draft-Verification for Efficient Large Language Model Decoding",
    2024 (ADED), sections 3.1-3.3.
    """

    def __init__(
        self,
        corpus: Iterable[Sequence[int]] = (),
        num_draft: int = 12,
        max_depth: int = 8,
        width: int = 4,
        exploration: float = 0.1,
    ) -> None:
        if min(num_draft, max_depth, width) < 1 or exploration < 0:
            raise InputError(
                f"num_draft {num_draft}, max_depth {max_depth}, width {width}, exploration "
                f"{exploration}: expected numbers >= 1, and exploration >= 0"
            )
        self.num_draft, self.max_depth, self.width = num_draft, max_depth, width
        self.exploration = exploration
        self.counts = Trigrams()
        self._tried: Counter[tuple[int, int, int]] = Counter()
        self._right: Counter[tuple[int, int, int]] = Counter()
        for text in corpus:
            self.counts.add(text)

    def begin(self, state: object) -> None:
        """Count the prompts."""
        for text in self.histories:
            self.counts.add(text)

    def learn(self, row: int, new: list[int]) -> None:
        """Count what became final, and note which guesses would have been right."""
        text = self.histories[row]
        start = len(text) - len(new)
        for place in range(max(2, start), len(text)):
            before, last, token = text[place - 2 : place + 1]
            for guess, _ in self.counts.law(before, last, self.width):
                self._tried[before, last, guess] += 1
                self._right[before, last, guess] += guess == token
        self.counts.add(text, start)

    def _worth(self, before: int, last: int, token: int, probability: float, visits: int) -> float:
        tried = self._tried[before, last, token]
        value = (probability + self._right[before, last, token]) / (1 + tried)
        return value + self.exploration * probability * visits**0.5 / (1 + tried)

    def tree_of(self, row: int, num: int) -> tuple[list[int], list[int]]:
        """The candidates of the largest worth."""
        text = self.histories[row]
        trie = Trie(num)
        if len(text) < 2:
            return trie.tree
        heap: list[tuple[float, int, int, int, int, int]] = []
        number = 0

        def open_node(node: int, value: float, before: int, last: int, depth: int) -> None:
            nonlocal number
            law = self.counts.law(before, last, self.width)
            visits = sum(self._tried[before, last, token] for token, _ in law)
            for token, probability in law:
                worth = value * min(1.0, self._worth(before, last, token, probability, visits))
                heapq.heappush(heap, (-worth, number, node, last, token, depth))
                number += 1

        open_node(-1, 1.0, text[-2], text[-1], 1)
        while heap and not trie.is_full:
            worth, _, parent, before, token, depth = heapq.heappop(heap)
            node = trie.child(parent, token)
            if node is not None and depth < self.max_depth:
                open_node(node, -worth, before, token, depth + 1)
        return trie.tree


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
    why_not_fixed = None

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
