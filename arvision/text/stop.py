"""Where a text ends: end tokens and stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import InputError

Decode = Callable[[list[int]], str]


def stop_strings(stop: str | Sequence[str] | None, tokenizer: Any) -> tuple[list[str], list[int]]:
    """Strings that end a text, and the ids of those that are special tokens.

    Texts are decoded without special tokens, so such a string would never be seen in one.

    Raises:
        InputError: what is no string, or a special token among other text.
    """
    given = [stop] if isinstance(stop, str) else list(stop or ())
    known = {text: token for token, text in _special_tokens(tokenizer).items()}
    strings, special = [], []
    for text in given:
        if not isinstance(text, str):
            raise InputError(f"stop {text!r}: expected strings (ids belong to stop_token_ids)")
        inside = [token for token in known if token in text]
        if text in known:
            special.append(known[text])
        elif inside:
            raise InputError(
                f"stop {text!r}: the special token {inside[0]!r} among other text: expected it alone"
            )
        else:
            strings.append(text)
    return strings, special


def _special_tokens(tokenizer: Any) -> dict[int, str]:
    """Texts of a tokenizer's special tokens by id: what decoding leaves out."""
    ids = getattr(tokenizer, "all_special_ids", None) or []
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    found = {
        token: str(entry) for token, entry in added.items() if getattr(entry, "special", False)
    }
    missing = [token for token in ids if token is not None and token not in found]
    found |= {token: tokenizer.convert_ids_to_tokens(token) for token in missing}
    return {token: text for token, text in found.items() if text}


class TextEnd:
    """Ends rows at an end token, or at the token that completes a stop string.

    See `arvision.decoding.loop.StopCheck`.

    Args:
        batch: rows B.
        end_ids: tokens that end a text; they belong to it.
        strings: texts that end it.
        decode: ids to text; needed for strings.
        criterion: asked after every token, with the row and its new tokens so far, whether the text
            ends there; None for none.

    Raises:
        InputError: an empty stop string, or strings without `decode`.
    """

    def __init__(
        self,
        batch: int,
        end_ids: Sequence[int] = (),
        strings: Sequence[str] = (),
        decode: Decode | None = None,
        criterion: Callable[[int, list[int]], bool] | None = None,
    ) -> None:
        if any(not text for text in strings):
            raise InputError("stop: expected strings that are not empty")
        if strings and decode is None:
            raise InputError("stop strings need a tokenizer: pass tokenizer=...")
        self._end_ids, self._strings, self._decode = set(end_ids), list(strings), decode
        self._criterion = criterion
        self._drawn: list[list[int]] = [[] for _ in range(batch)]
        self._longest = max(map(len, strings), default=0)

    @property
    def is_needed(self) -> bool:
        """Whether anything can end a row."""
        return bool(self._end_ids or self._strings or self._criterion)

    def __call__(
        self, rows: Sequence[int], tokens: Sequence[Sequence[int]]
    ) -> tuple[list[int], list[bool]]:
        """How many of the new tokens of each row stay, and which rows are finished."""
        stays, finished = [], []
        for row, new in zip(rows, tokens, strict=True):
            kept = self._cut(row, list(new))
            is_end = len(kept) < len(new) or (bool(kept) and self._ends(row, kept))
            met = self._criterion_met(row, kept)
            if met is not None:
                kept, is_end = kept[:met], True
            stays.append(len(kept))
            finished.append(is_end)
            self._drawn[row] += kept
        return stays, finished

    def _ends(self, row: int, kept: list[int]) -> bool:
        return kept[-1] in self._end_ids or self._has_string(self._drawn[row], kept)

    def _criterion_met(self, row: int, kept: list[int]) -> int | None:
        """How many new tokens there are when the criterion is first met, None for never."""
        if self._criterion is None:
            return None
        drawn = self._drawn[row]
        counts = range(1, len(kept) + 1)
        return next((n for n in counts if self._criterion(row, drawn + kept[:n])), None)

    def _cut(self, row: int, new: list[int]) -> list[int]:
        for place, token in enumerate(new):
            if token in self._end_ids:
                new = new[: place + 1]
                break
        if self._strings and self._has_string(self._drawn[row], new):
            for count in range(1, len(new)):
                if self._has_string(self._drawn[row], new[:count]):
                    return new[:count]
        return new

    def _has_string(self, drawn: list[int], new: list[int]) -> bool:
        if not self._strings:
            return False
        assert self._decode is not None
        # A token stands for at least a byte, so that many earlier ones can take part in a string.
        tail = drawn[-4 * self._longest - 8 :]
        text, before = self._decode(tail + new), self._decode(tail)
        return any(text.count(string) > before.count(string) for string in self._strings)
