"""Counts of n-grams of texts, and a model's law mixed with the probabilities that they give."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, shown
from ..files import user_path
from ..schema import read_text

WEIGHTS = (0.05, 0.1, 0.2, 0.3, 0.35)
"""Of what follows the last 1, 2, ... 5 tokens, in the mixture of n-gram models; longer ones are surer.
The paper mixes the same five orders; these weights are ours."""

FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that keys of n-grams, polynomials in it, differ but for one in 2^64 pairs or so."""

MOST_TEXT = 1 << 28
"""Bytes of a file of texts."""


class NGrams:
    """How often tokens followed the last 1, 2, ... tokens in some texts.

    Counts are sorted arrays of keys, about 24 bytes per place of the texts and order.

    Args:
        texts: lists of ids.
        weights: of the orders, from bigrams on.
    """

    def __init__(self, texts: Iterable[Sequence[int]], weights: Sequence[float] = WEIGHTS) -> None:
        self.weights = tuple(weights)
        rows = [np.asarray(text, dtype=np.uint64) + np.uint64(1) for text in texts]
        self._grams, self._contexts = [], []
        for size in range(1, len(self.weights) + 1):
            self._grams.append(_counted([_keys(row, size + 1) for row in rows]))
            self._contexts.append(_counted([_keys(row[:-1], size) for row in rows]))

    def probabilities(self, context: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """Mixed probabilities [len(tokens)] of tokens after a context, 0 where none was ever seen."""
        found = np.zeros(len(tokens))
        following = np.asarray(tokens, dtype=np.uint64) + np.uint64(1)
        for size, weight in enumerate(self.weights, 1):
            if len(context) < size:
                break
            last = np.asarray(context[-size:], dtype=np.uint64) + np.uint64(1)
            key = _keys(last, size)
            total = _count(self._contexts[size - 1], key)[0]
            if total:
                with np.errstate(over="ignore"):
                    keys = key * FACTOR + following
                found += weight * _count(self._grams[size - 1], keys) / total
        return found


def _keys(row: np.ndarray, size: int) -> np.ndarray:
    """Keys of all `size` neighbours in a row of ids, in order."""
    if len(row) < size:
        return np.zeros(0, dtype=np.uint64)
    keys = np.zeros(len(row) - size + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for place in range(size):
            keys = keys * FACTOR + row[place : place + len(keys)]
    return keys


def _counted(keys: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    together = np.concatenate(keys) if keys else np.zeros(0, dtype=np.uint64)
    return np.unique(together, return_counts=True)


def _count(table: tuple[np.ndarray, np.ndarray], keys: np.ndarray) -> np.ndarray:
    """How often keys stand in a table."""
    known, counts = table
    if not len(known):
        return np.zeros(len(keys), dtype=np.int64)
    place = np.searchsorted(known, keys).clip(max=len(known) - 1)
    return np.where(known[place] == keys, counts[place], 0)


def mixed(logp: Sequence[float], shares: np.ndarray, alpha: float, delta: float) -> np.ndarray:
    """(1 - alpha) log p + alpha log p_n, with `delta` in the place of probabilities p_n that are 0.

    Args:
        logp: of the model, of some tokens.
        shares: what n-grams say of these tokens, see `NGrams.probabilities`.
        alpha: weight of the n-grams.
        delta: see above.

    Paper: Shen et al., "Superposed Decoding", 2024, section 3.2 (n-gram interpolation).
    """
    return (1 - alpha) * np.asarray(logp) + alpha * np.log(np.where(shares > 0, shares, delta))


def as_ngrams(given: Any, tokenizer: Any) -> NGrams | None:
    """n-grams from what a user gave: a file of text, texts, lists of ids, or `NGrams`.

    Raises:
        InputError: something else, texts without a tokenizer, or a file that cannot be read.
    """
    if given is None or isinstance(given, NGrams):
        return given
    if isinstance(given, str | Path):
        path = user_path(given)
        try:
            given = [read_text(path, MOST_TEXT)]
        except OSError as error:
            raise InputError(f"ngrams {path}: {error.strerror}") from error
    is_listed = isinstance(given, list | tuple) and len(given) > 0
    if is_listed and all(isinstance(text, str) for text in given):
        if tokenizer is None:
            raise InputError("ngrams are texts: pass tokenizer=..., or lists of ids")
        texts = [
            tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in given
        ]
        return NGrams(texts)
    try:
        return NGrams([[int(token) for token in text] for text in given])
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"ngrams {shown(given)}: expected a file of text, a list of texts, or lists of ids"
        ) from error
