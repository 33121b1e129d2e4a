"""The file of measured cost tables: shared by processes, read with suspicion, never over other files.

A file holds one table per model, machine and kind of sampler: `{"kind": KIND, "format": FORMAT,
"tables": {key: {images: [[images, window, seconds, tokens per pass], ...]}}}`. What does not hold to
that is measured anew with a warning; a file that is something else altogether is left as it is.
"""

from __future__ import annotations

import json
import math
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, as_integer, plain_numbers
from ..files import locked, read_regular, user_path, write_text

KIND = "arvision pass costs"
FORMAT = 2
HEADER = f'{{\n "kind": "{KIND}"'
"""How every such file begins; what begins so and breaks off is a torn file of ours."""

LARGEST_FILE = 1 << 24
"""Bytes; a file of more is no cost table."""

MEASURING = threading.RLock()
"""Held while passes are timed: two threads at once would time each other. What is timed may measure."""

Table = dict[int, list[list[float]]]
"""Entries [images, window, seconds, tokens per pass] by number of images."""


def check_entry(entry: Any) -> list[float]:
    """The numbers of a row [images, window, seconds] or [images, window, seconds, tokens per pass].

    Raises:
        InputError: another layout, or a number that no measurement gives.
    """
    entry = plain_numbers(entry)
    is_row = isinstance(entry, Sequence) and not isinstance(entry, str) and len(entry) in (3, 4)
    row = [plain_numbers(number) for number in entry] if is_row else []
    counts = [as_integer(number) for number in row[:2]]
    times = [n for n in row[2:] if isinstance(n, int | float) and not isinstance(n, bool)]
    fits = all(count is not None and count >= 1 for count in counts)
    if not row or not fits or len(times) < len(row) - 2 or not all(0 < n < math.inf for n in times):
        raise InputError(
            f"cost table entry {entry!r}: expected [images, window, seconds] or [images, window, "
            "seconds, tokens per pass], the first two whole and from 1 on, all positive and finite"
        )
    return row


class CostFile:
    """The tables of a file.

    Args:
        path: of the file, which need not exist; `~` is the user's home.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = user_path(path)

    def read(self, key: str, windows: Sequence[int]) -> Table:
        """The valid tables of `key`; what is damaged is left out, with a warning.

        Args:
            key: of model, machine and sampler.
            windows: that a table must have, in this order.
        """
        try:
            tables = self._tables()
        except (OSError, InputError) as error:
            self._warn(f"cannot be read ({error}): measuring anew")
            return {}
        return self._valid(tables.get(key, {}), windows)

    def add(self, key: str, measured: Table, windows: Sequence[int]) -> Table:
        """Save tables; of numbers of images that another process saved meanwhile, its tables stay.

        Returns:
            The saved tables, or the measured ones where they cannot be saved, with a warning.
        """
        try:
            with locked(self._path):
                tables = self._tables(for_writing=True)
                saved = measured | self._valid(tables.get(key, {}), windows)
                content = {"kind": KIND, "format": FORMAT, "tables": tables | {key: saved}}
                write_text(self._path, json.dumps(content, indent=1))
        except (OSError, InputError) as error:
            warnings.warn(f"cost table not saved to {self._path} ({error})", stacklevel=2)
            return measured
        return saved

    def _tables(self, for_writing: bool = False) -> dict[str, Any]:
        """All tables by key, not looked at yet; none of an absent or empty file.

        Raises:
            InputError: this is no cost table, or, unless the file may be replaced, one that is
                broken or of another format.
            OSError: it cannot be read.
        """
        text = read_regular(self._path, LARGEST_FILE)
        if not text:
            return {}
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            content = None
        is_torn = content is None and (text.startswith(HEADER) or HEADER.startswith(text))
        if not is_torn and not _is_ours(content):
            raise InputError("this is no cost table: expected another name, it is left as it is")
        known: dict[str, Any] = content or {}
        tables = known.get("tables")
        if known.get("format") == FORMAT and isinstance(tables, dict):
            return tables
        if for_writing:
            return {}
        found = "it is torn" if is_torn else f"format {known.get('format', 1)!r:.20}"
        raise InputError(f"{found}, expected format {FORMAT}")

    def _valid(self, table: Any, windows: Sequence[int]) -> Table:
        """The tables of one key that hold what was asked for."""
        valid: Table = {}
        try:
            for images, entries in table.items():
                rows = [check_entry(entry) for entry in entries]
                starts = [row[:2] for row in rows]
                if starts != [[int(images), window] for window in windows] or any(
                    len(row) != 4 for row in rows
                ):
                    raise InputError(
                        f"entries of {images!s:.20} images: expected windows {windows}"
                    )
                valid[int(images)] = rows
        except (AttributeError, TypeError, ValueError) as error:
            self._warn(f"holds a table that cannot be used ({error}): measuring anew")
        return valid

    def _warn(self, what: str) -> None:
        warnings.warn(f"cost tables {self._path}: the file {what}", stacklevel=4)


def _is_ours(content: Any) -> bool:
    """Whether that is a file of ours, of any format; the first had tables by key and nothing else."""
    if not isinstance(content, dict) or not content:
        return False
    if content.get("kind") == KIND:
        return "tables" in content
    return all(
        isinstance(table, dict) and table and all(images.isdecimal() for images in table)
        for table in content.values()
    )
