"""Suffix decoding: what followed the longest matches, in the text itself and in past outputs."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

from torch import Tensor

from ...decoding.noise import Noise
from ...errors import InputError
from .base import TextDrafter, register

GAP = -1
"""Stands between the texts of an automaton; no text holds it, so no match crosses it."""

MOST_LINKS = 64
"""Suffixes of a new token whose counts grow: text of one token repeated has as many as tokens."""

MOST_CONTEXTS = 8
"""Matches that are weighed against each other in each automaton."""


class SuffixAutomaton:
    """All substrings of some texts, with how often each occurs, in at most two states per token.

    A state stands for substrings that end at the same places. Its link leads to the longest suffix
    of these that also ends elsewhere, so the links from the last state lead through all earlier
    occurrences of the end of the text, longest match first.
    """

    def __init__(self) -> None:
        self.edges: list[dict[int, int]] = [{}]
        self.links: list[int] = [-1]
        self.lengths: list[int] = [0]
        self.counts: list[int] = [0]
        self.last = 0
        self.num_tokens = 0

    def _state(self, length: int, edges: dict[int, int], link: int, count: int) -> int:
        self.edges.append(edges)
        self.links.append(link)
        self.lengths.append(length)
        self.counts.append(count)
        return len(self.edges) - 1

    def append(self, token: int) -> None:
        """The text goes on with a token."""
        self.num_tokens += 1
        new = self._state(self.lengths[self.last] + 1, {}, 0, 0)
        place = self.last
        while place >= 0 and token not in self.edges[place]:
            self.edges[place][token] = new
            place = self.links[place]
        if place >= 0:
            self.links[new] = self._parted(place, token)
        self.last = new
        for _ in range(MOST_LINKS):
            if new <= 0:
                break
            self.counts[new] += 1
            new = self.links[new]

    def _parted(self, place: int, token: int) -> int:
        """The state of exactly the substring that `token` makes of the longest one of `place`."""
        after = self.edges[place][token]
        if self.lengths[after] == self.lengths[place] + 1:
            return after
        twin = self._state(
            self.lengths[place] + 1,
            dict(self.edges[after]),
            self.links[after],
            self.counts[after],
        )
        while place >= 0 and self.edges[place].get(token) == after:
            self.edges[place][token] = twin
            place = self.links[place]
        self.links[after] = twin
        return twin

    def find(self, text: Sequence[int]) -> Iterator[tuple[int, int]]:
        """States of the suffixes of `text` that occur, and the suffixes' lengths, longest first."""
        place, length = 0, 0
        for token in text:
            while place > 0 and token not in self.edges[place]:
                place = self.links[place]
                length = self.lengths[place]
            if token in self.edges[place]:
                place, length = self.edges[place][token], length + 1
        while place > 0:
            yield place, length
            place = self.links[place]
            length = self.lengths[place]

    def earlier(self) -> Iterator[tuple[int, int]]:
        """The same of the automaton's own text, whole text and its last place left out."""
        place = self.links[self.last]
        while place > 0:
            yield place, self.lengths[place]
            place = self.links[place]

    def after(self, place: int) -> tuple[list[tuple[int, int, float]], int]:
        """What follows a state: tokens, their states and shares; and the state that this is told of.

        Where the text ends with the state, its longest suffix that goes on speaks for it.
        """
        while place > 0 and not self.edges[place]:
            place = self.links[place]
        counts = {
            token: (state, self.counts[state])
            for token, state in reversed(self.edges[place].items())  # what is newer first
            if token != GAP
        }
        total = sum(count for _, count in counts.values())
        return [
            (token, state, count / total) for token, (state, count) in counts.items() if count
        ], place

    def tree(self, place: int, num: int, max_depth: int) -> tuple[list[int], list[int], float]:
        """The `num` likeliest continuations of a state: tokens, parents, and expected number right.

        A candidate's worth is the product of the shares along its path, so a parent comes before
        its children.
        """
        tokens: list[int] = []
        parents: list[int] = []
        worth = 0.0
        heap: list[tuple[float, int, int, int, int, int]] = []
        entered = 0

        def push(state: int, parent: int, value: float, depth: int) -> None:
            nonlocal entered
            for token, following, share in self.after(state)[0]:
                entered += 1
                heapq.heappush(heap, (-value * share, entered, token, following, parent, depth))

        push(place, -1, 1.0, 1)
        while heap and len(tokens) < num:
            value, _, token, state, parent, depth = heapq.heappop(heap)
            tokens.append(token)
            parents.append(parent)
            worth -= value
            if depth < max_depth:
                push(state, len(tokens) - 1, -value, depth + 1)
        return tokens, parents, worth


class PastOutputs:
    """Outputs of earlier runs, shared by all rows: an old and a young automaton, both bounded.

    An automaton cannot forget; when the young one is full it becomes the old one, and what the old
    one knew goes.

    Args:
        capacity: tokens that both hold at most.

    Raises:
        InputError: a capacity below 2.
    """

    def __init__(self, capacity: int = 100_000) -> None:
        if capacity < 2:
            raise InputError(f"capacity {capacity}: expected at least 2 tokens")
        self.capacity = capacity
        self.parts = [SuffixAutomaton()]

    def add(self, output: Sequence[int]) -> None:
        """Remember an output, of a long one the end."""
        room = self.capacity // 2
        output = output[-max(1, room - 1) :]
        if self.parts[-1].num_tokens and self.parts[-1].num_tokens + len(output) + 1 > room:
            self.parts = [self.parts[-1], SuffixAutomaton()]
        young = self.parts[-1]
        for token in output:
            young.append(token)
        if len(output) + 1 <= room:
            young.append(GAP)

    @property
    def num_tokens(self) -> int:
        """Tokens remembered, the gaps between outputs among them."""
        return sum(part.num_tokens for part in self.parts)


@register("suffix", summary="what followed the longest matches, here and in past outputs")
class SuffixDecoding(TextDrafter):
    """A tree of the most frequent continuations of the longest suffixes that occurred before.

    Two sources: the row's own text (prompt and output), and the outputs of earlier texts, which
    stay with the object. In each, several lengths of match compete; of all trees the one with the
    most expected tokens is drafted. A tree has at most `factor` candidates per token matched: long
    matches are trusted further.

    Args:
        num_draft: candidates per pass at most.
        factor: candidates per token of a match.
        max_match: longest match that is looked for in past outputs.
        max_depth: levels of the tree.
        past: past outputs to start from and to add to; None for none yet.

    Raises:
        InputError: a value out of range.

    Paper: Oliaro et al., "SuffixDecoding: Extreme Speculative Decoding for Emerging AI
    Applications", 2024, sections 3.1-3.3 (there a tree of a bounded depth; an automaton holds
    the same substrings and counts).
    """

    def __init__(
        self,
        num_draft: int = 16,
        factor: float = 4.0,
        max_match: int = 32,
        max_depth: int = 16,
        past: PastOutputs | None = None,
    ) -> None:
        if min(num_draft, max_match, max_depth) < 1 or not factor > 0:
            raise InputError(
                f"num_draft {num_draft}, factor {factor}, max_match {max_match}, max_depth "
                f"{max_depth}: expected numbers >= 1, and factor above 0"
            )
        if past is not None and not isinstance(past, PastOutputs):
            raise InputError(f"past {past!r}: expected arvision.text.drafters.PastOutputs")
        self.num_draft, self.factor = num_draft, factor
        self.max_match, self.max_depth = max_match, max_depth
        self.past = past or PastOutputs()
        self._outputs: list[list[int]] = []
        self._known_vocabulary: int | None = None

    def start(self, noise: Noise, vocab_size: int, num_tokens: int) -> None:
        """Remember what the last run left; outputs in another vocabulary are forgotten."""
        self._remember(self._outputs)
        if self._known_vocabulary not in (None, vocab_size):
            self.past = PastOutputs(self.past.capacity)
        self._known_vocabulary = vocab_size
        super().start(noise, vocab_size, num_tokens)
        self._outputs = [[] for _ in self.histories]

    def begin(self, state: object) -> None:
        """Read the prompts."""
        self._texts = [SuffixAutomaton() for _ in self.histories]
        for text, history in zip(self._texts, self.histories, strict=True):
            for token in history:
                text.append(token)

    def learn(self, row: int, new: list[int]) -> None:
        """A row's text grows."""
        for token in new:
            self._texts[row].append(token)

    def hear(self, new: Sequence[list[int]], told: Sequence[list[int]]) -> None:
        """Write down outputs up to their very end, which no round begins with."""
        for output, tokens in zip(self._outputs, new, strict=True):
            output += tokens
        super().hear(new, told)

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows`; the outputs of the others are past."""
        super().select(rows)
        keep = rows.tolist()
        self._remember(out for row, out in enumerate(self._outputs) if row not in keep)
        self._outputs = [self._outputs[row] for row in keep]
        self._texts = [self._texts[row] for row in keep]

    def _remember(self, outputs: Sequence[list[int]] | Iterator[list[int]]) -> None:
        for output in outputs:
            if output:
                self.past.add(output)

    def tree_of(self, row: int, num: int) -> tuple[list[int], list[int]]:
        """The tree of the most expected tokens."""
        best: tuple[list[int], list[int], float] = [], [], 0.0
        own = self._texts[row]
        sources = [(own, own.earlier())]
        end = self.histories[row][-self.max_match :]
        sources += [(part, part.find(end)) for part in self.past.parts]
        for automaton, matches in sources:
            for _, (place, length) in zip(range(MOST_CONTEXTS), matches, strict=False):
                room = min(num, max(1, round(self.factor * length)))
                if room <= best[2]:  # shorter matches have no more room
                    break
                found = automaton.tree(place, room, self.max_depth)
                if found[2] > best[2]:
                    best = found
        return best[:2]
