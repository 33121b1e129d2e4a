"""Files of texts: prompts in lines, tables, JSON lines or JSON; and captions of pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from .errors import InputError
from .files import user_path
from .schema import check_fields, check_value, parse_json, read_text

DELIMITERS = {".csv": ",", ".tsv": "\t"}
"""Tables by their suffix, and what separates their columns."""


class PromptRecord(TypedDict):
    """A record of a prompt file; benchmarks add names of their own."""

    prompt: str


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """Prompts as records with "prompt", from a file in UTF-8 (with or without a byte order mark).

    The suffix says what it is: `.csv` and `.tsv` are tables whose first row names a column `prompt`;
    `.jsonl` has an object (or a string) per line; `.json` a list of them, or HPSv2's lists by style,
    whose records get "style"; anything else a prompt per line. Only line feeds, alone or behind a
    carriage return, end lines: other separators may stand within a prompt.

    Raises:
        InputError: unreadable, empty, or a record without a prompt.
    """
    path = user_path(path)
    try:
        text = read_text(path)
    except OSError as error:
        raise InputError(f"{path}: expected prompts ({error})") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    suffix = path.suffix.lower()
    if suffix in DELIMITERS:
        found: Any = _table(text, DELIMITERS[suffix], path)
    elif suffix == ".jsonl":
        found = [parse_json(line, f"{path}, line {n}") for n, line in lines if line]
    elif suffix == ".json":
        found = parse_json(text, str(path))
    else:
        found = [line for _, line in lines if line]
    check_value(found, list[Any] | dict[str, list[str]], f"{path}: prompts")
    if isinstance(found, dict):
        found = [{"prompt": p, "style": s} for s, prompts in found.items() for p in prompts]
    records = [{"prompt": item} if isinstance(item, str) else item for item in found]
    for number, record in enumerate(records, 1):
        name = f"{path}, record {number}"
        if not check_fields(record, PromptRecord, name)["prompt"].strip():
            raise InputError(f"{name}: an empty prompt")
    if not records:
        raise InputError(f"{path}: expected a prompt or more, found none")
    return records


class CaptionRecord(TypedDict):
    """A picture, by its name within a folder, and what it shows."""

    file: str
    text: str


def read_captions(path: str | Path) -> list[CaptionRecord]:
    """Captions of pictures, from a table (`.csv`, `.tsv`) or JSON lines (`.jsonl`) in UTF-8.

    Each record has "file", a name within a folder, and "text"; a picture may have several.

    Raises:
        InputError: unreadable, empty, another suffix, or a record without a file or a text.
    """
    path = user_path(path)
    suffix = path.suffix.lower()
    if suffix not in (*DELIMITERS, ".jsonl"):
        raise InputError(f"{path}: expected captions in a .csv, .tsv or .jsonl file")
    try:
        text = read_text(path)
    except OSError as error:
        raise InputError(f"{path}: expected captions ({error})") from error
    if suffix in DELIMITERS:
        found: Any = _table(text, DELIMITERS[suffix], path, ("file", "text"))
    else:
        lines = [(n, line.strip()) for n, line in enumerate(text.split("\n"), 1)]
        found = [parse_json(line, f"{path}, line {n}") for n, line in lines if line]
    for number, record in enumerate(found, 1):
        name = f"{path}, record {number}"
        check_fields(record, CaptionRecord, name)
        for part in ("file", "text"):
            if not record[part].strip():
                raise InputError(f"{name}: {part} is empty")
    if not found:
        raise InputError(f"{path}: expected a caption or more, found none")
    return found


def is_plain(path: str | Path) -> bool:
    """Whether a prompt file has a prompt per line, which cannot hold line ends."""
    return Path(path).suffix.lower() not in (*DELIMITERS, ".jsonl", ".json")


def _table(
    text: str, delimiter: str, path: Path, wanted: Sequence[str] = ("prompt",)
) -> list[dict[str, str]]:
    """Rows of a table, its columns named by the first row."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: expected a table ({error})") from error
    names = [name.strip() for name in rows[0][1]] if rows else []
    for column in wanted if rows else ():
        if names.count(column) != 1:
            raise InputError(
                f"{path}: columns {', '.join(names)[:200]}: expected one of them to be named {column}"
            )
    for number, row in rows[1:]:
        if len(row) != len(names):
            raise InputError(f"{path}, line {number}: {len(row)} cells, expected {len(names)}")
    return [dict(zip(names, row, strict=True)) for _, row in rows[1:]]
