"""New text, handed out as it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

OnText = Callable[[int, str], Any]
"""Told the row and the text that was added to it."""


def until(text: str, strings: Sequence[str]) -> str:
    """`text` up to the first of some stop strings."""
    places = [text.find(string) for string in strings]
    return text[: min((place for place in places if place >= 0), default=len(text))]


class Flow:
    """Hands new text to those who asked for it."""

    def __init__(
        self,
        decode: Callable[[list[int]], str] | None,
        stream: OnText | None,
        streamer: Any,
        strings: Sequence[str],
        ids: Sequence[Tensor],
    ) -> None:
        if stream is not None and decode is None:
            raise InputError("stream needs a tokenizer: pass tokenizer=...")
        self._decode, self._stream, self._streamer = decode, stream, streamer
        self._strings = strings
        self._told = [0] * len(ids)
        self._texts = [""] * len(ids)
        if streamer is not None:
            streamer.put(ids[0][None])

    @property
    def is_wanted(self) -> bool:
        """Whether anybody asked."""
        return self._stream is not None or self._streamer is not None

    def on_step(self, number: int, progress: dict[str, Any]) -> None:
        """After a pass."""
        lengths = progress["lengths"].tolist()
        if lengths != self._told:
            self._tell(
                [row[:num] for row, num in zip(progress["tokens"].tolist(), lengths, strict=True)],
                is_last=False,
            )

    def tell_rest(self, tokens: list[list[int]]) -> None:
        """All tokens are there."""
        if self.is_wanted:
            self._tell(tokens, is_last=True)

    def end(self) -> None:
        """The run is over."""
        if self._streamer is not None:
            self._streamer.end()

    def _tell(self, tokens: list[list[int]], is_last: bool) -> None:
        for row, ids in enumerate(tokens):
            if self._streamer is not None and len(ids) > self._told[row]:
                self._streamer.put(torch.tensor(ids[self._told[row] :]))
            self._told[row] = len(ids)
            if self._stream is None or self._decode is None:
                continue
            text = until(self._decode(ids), self._strings)
            # The bytes of a character, or the start of a stop string, may still be under way.
            if not is_last:
                held = max([0, *(len(string) - 1 for string in self._strings)])
                text = text[: len(text) - held] if held else text
                if text.endswith("\N{REPLACEMENT CHARACTER}"):
                    continue
            if len(text) > len(self._texts[row]):
                self._stream(row, text[len(self._texts[row]) :])
                self._texts[row] = text
