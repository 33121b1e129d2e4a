"""The target drafts for itself on a shorter context."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from ....errors import InputError


class RetrievedContext:
    """The parts of a long prompt that have most to do with its end, for a draft to read.

    Parts of `chunk` tokens are ranked by the tokens that they share with the last `query` ones,
    weighted by rarity (BM25's inverse document frequency); the best are kept in their order, with
    the first and the last part.

    Args:
        num_tokens: length of what is kept; shorter prompts are kept whole.
        chunk: tokens of a part.
        query: tokens at the end that say what is asked.

    Raises:
        InputError: a value out of range.

    Paper: Chen et al., "Long-Context Inference with Retrieval-Augmented Speculative Decoding", 2025
    (RAPID), section 3.1.
    """

    def __init__(self, num_tokens: int = 512, chunk: int = 64, query: int = 64) -> None:
        if chunk < 1 or query < 1 or num_tokens < 2 * chunk:
            raise InputError(
                f"num_tokens {num_tokens}, chunk {chunk}, query {query}: expected num_tokens of at "
                "least two chunks"
            )
        self.num_tokens, self.chunk, self.query = num_tokens, chunk, query

    def __call__(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """The shorter prompts."""
        return [self._shorten(list(prompt)) for prompt in prompts]

    def _shorten(self, prompt: list[int]) -> list[int]:
        if len(prompt) <= self.num_tokens:
            return prompt
        starts = range(0, len(prompt), self.chunk)
        parts = [prompt[start : start + self.chunk] for start in starts]
        frequency = Counter(token for part in parts for token in set(part))
        asked = set(prompt[-self.query :])

        def score(part: list[int]) -> float:
            return sum(math.log(len(parts) / frequency[token]) for token in set(part) & asked)

        room = self.num_tokens // self.chunk
        kept = {0, *range(len(parts) - max(1, min(room - 1, self.query // self.chunk)), len(parts))}
        for place in sorted(range(len(parts)), key=lambda place: -score(parts[place])):
            if len(kept) >= room:
                break
            kept.add(place)
        return [token for place in sorted(kept) for token in parts[place]]
