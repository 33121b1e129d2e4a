"""Drafts copied from the text itself: prompt lookup, and the input followed from end to end."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ...errors import InputError
from .base import TextDrafter, Trie, register

FIRST_SHARE = 0.6
"""Part of the candidates that the best match gets before other matches get theirs."""


class _Index:
    """Where each n-gram of a text ends, latest last."""

    def __init__(self, max_ngram: int) -> None:
        self._sizes = range(1, max_ngram + 1)
        self._ends: dict[tuple[int, ...], list[int]] = {}
        self._num = 0

    def update(self, text: list[int]) -> None:
        """Index what was added to `text`."""
        for end in range(self._num + 1, len(text) + 1):
            for size in self._sizes:
                if end >= size:
                    self._ends.setdefault(tuple(text[end - size : end]), []).append(end)
        self._num = len(text)

    def ends(self, gram: list[int]) -> list[int]:
        """Positions behind the occurrences of an n-gram."""
        return self._ends.get(tuple(gram), [])


@register("prompt_lookup", summary="what followed the last n-gram earlier in the text")
class PromptLookup(TextDrafter):
    """What followed the last n tokens where they stood before, in the prompt or the output.

    The longest n-grams are looked up first, latest occurrence first; several continuations share a
    tree. A continuation that runs into the end of the text goes on with itself, as in a list.

    Args:
        max_ngram: longest n-gram looked up.
        min_ngram: shortest.
        max_branches: continuations per pass.
        num_draft: candidates per pass.

    Raises:
        InputError: a value out of range.

    Paper: Saxena, "Prompt Lookup Decoding", 2023; Yang et al., "Inference with Reference: Lossless
    Acceleration of Large Language Models", 2023.
    """

    def __init__(
        self, max_ngram: int = 3, min_ngram: int = 1, max_branches: int = 3, num_draft: int = 10
    ) -> None:
        if not 1 <= min_ngram <= max_ngram or max_branches < 1 or num_draft < 1:
            raise InputError(
                f"max_ngram {max_ngram}, min_ngram {min_ngram}, max_branches {max_branches}, "
                f"num_draft {num_draft}: expected 1 <= min_ngram <= max_ngram, the others >= 1"
            )
        self.max_ngram, self.min_ngram = max_ngram, min_ngram
        self.max_branches, self.num_draft = max_branches, num_draft

    @property
    def branches(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether several continuations may be drafted."""
        return self.max_branches > 1

    def begin(self, state: object) -> None:
        """Index the prompts."""
        self._indices = [_Index(self.max_ngram) for _ in self.histories]

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows`."""
        super().select(rows)
        self._indices = [self._indices[row] for row in rows.tolist()]

    def tree_of(self, row: int, num: int) -> tuple[list[int], list[int]]:
        """Continuations of the longest n-grams found."""
        text, index = self.histories[row], self._indices[row]
        index.update(text)
        paths: list[list[int]] = []
        for size in range(min(self.max_ngram, len(text)), self.min_ngram - 1, -1):
            for end in reversed(index.ends(text[-size:])):
                if end < len(text) and len(paths) < self.max_branches:
                    paths.append(_copy(text, end, num))
            if len(paths) == self.max_branches:
                break
        trie = Trie(num)
        if paths:
            # The best match goes furthest, and takes up what the others leave.
            trie.add(paths[0][: max(1, round(FIRST_SHARE * num))])
            for path in paths[1:]:
                trie.add(path[: max(1, num // 4)])
            trie.add(paths[0])
        return trie.tree


def _copy(text: list[int], start: int, num: int) -> list[int]:
    """`num` tokens from `start` on; past the end the copied part repeats."""
    part = text[start : start + num]
    return [part[place % len(part)] for place in range(num)]


@register("input_copy", summary="the input copied on from where the output agrees with it")
class InputCopy(TextDrafter):
    """The input from the last agreement on: for answers that mostly repeat their input.

    A pointer walks along the input with the output. Where they part, the longest end of the output
    that stands in the input (nearest behind the pointer, else anywhere) puts it back.

    Args:
        max_match: longest end of the output that is looked for.
        num_draft: candidates per pass.

    Paper: Ge et al., "Lossless Acceleration for Seq2seq Generation with Aggressive Decoding", 2022,
    section 3.1 (input-guided).
    """

    branches: ClassVar[bool] = False

    def __init__(self, max_match: int = 8, num_draft: int = 16) -> None:
        if max_match < 1 or num_draft < 1:
            raise InputError(f"max_match {max_match}, num_draft {num_draft}: expected both >= 1")
        self.max_match, self.num_draft = max_match, num_draft

    def begin(self, state: object) -> None:
        """The inputs are the prompts."""
        self._inputs = [list(text) for text in self.histories]
        self._pointers: list[int | None] = [None] * len(self._inputs)

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows`."""
        super().select(rows)
        self._inputs = [self._inputs[row] for row in rows.tolist()]
        self._pointers = [self._pointers[row] for row in rows.tolist()]

    def learn(self, row: int, new: list[int]) -> None:
        """Move the pointer along, or find a new place for it."""
        source, pointer = self._inputs[row], self._pointers[row]
        if pointer is not None and source[pointer : pointer + len(new)] == new:
            self._pointers[row] = pointer + len(new)
        else:
            self._pointers[row] = self._find(source, self.histories[row][len(source) :], pointer)

    def _find(self, source: list[int], output: list[int], near: int | None) -> int | None:
        for size in range(min(self.max_match, len(output)), 0, -1):
            end = output[-size:]
            found = [
                place + size
                for place in range(len(source) - size + 1)
                if source[place] == end[0] and source[place : place + size] == end
            ]
            if found:
                ahead = [place for place in found if near is not None and place >= near]
                return (ahead or found)[0]
        return near

    def tree_of(self, row: int, num: int) -> tuple[list[int], list[int]]:
        """A chain of the input."""
        pointer = self._pointers[row]
        part = [] if pointer is None else self._inputs[row][pointer : pointer + num]
        return part, list(range(-1, len(part) - 1))
