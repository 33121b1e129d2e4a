"""Every exception that the package raises on purpose.

A message is one line: what was given, what was expected, the nearest names that exist.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import operator
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MOST_SHOWN = 600
"""Characters of a message; of a longer one the middle is left out."""


def one_line(text: object, most: int | None = MOST_SHOWN) -> str:
    """A text as it may stand on a terminal: one line without control characters, of bounded length.

    Names and prompts come from anywhere; what would move the cursor or colour the screen is written
    as Python escapes it.

    Args:
        text: to show.
        most: characters; None for any number.
    """
    line = str(text)
    if most is not None and len(line) > most:
        first, last = most // 3, most // 2
        left_out = len(line) - first - last
        line = f"{line[:first]}... [{left_out:,} characters] ...{line[-last:]}"
    if not line.isprintable():
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line


class ArvisionError(Exception):
    """Base of the package's errors; their messages are what `one_line` leaves."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class InputError(ArvisionError, ValueError):
    """An argument that the caller can mend: a name, a range, a shape."""


class CheckpointError(ArvisionError, ValueError):
    """A weight file that is truncated, unsafe, or does not fit the model."""


class StateError(ArvisionError, RuntimeError):
    """A decode state was used in an order that its contract does not allow."""


class DiskError(ArvisionError, OSError):
    """The disk is full or fails; nothing half written is left."""


class MissingDependencyError(ArvisionError, ImportError):
    """An optional package is needed; the message names the install line."""


@contextlib.contextmanager
def optional(extra: str, purpose: str) -> Iterator[None]:
    """Around imports of packages that not every user needs.

    Args:
        extra: of this package, that brings them; see `pyproject.toml`.
        purpose: what needs them, the subject of the message.

    Raises:
        MissingDependencyError: one is not installed; names the install line.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f'{purpose} needs {error.name}: pip install "arvision[{extra}]"'
        ) from error


def plain_numbers(value: Any) -> Any:
    """A number or an array of NumPy or torch as Python's number or list; anything else as it is."""
    return value.tolist() if hasattr(value, "dtype") and hasattr(value, "tolist") else value


def as_integer(value: Any) -> int | None:
    """The integer that `value` is, of Python, NumPy or torch, or a whole float; None if it is none.

    A tensor or an array counts with one element; booleans and texts do not.

    Raises:
        InputError: an integer so long that Python does not even write it.
    """
    if hasattr(value, "dtype"):
        value = plain_numbers(value.reshape(-1)) if hasattr(value, "reshape") else value
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(value, bool):
        return None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    try:
        found = operator.index(value)
    except TypeError:
        return None
    if found.bit_length() > 1024:
        raise InputError(f"an integer of {found.bit_length():,} bits: expected at most 1,024")
    return found


def check_count(name: str, value: object, most: int | None = None) -> int:
    """An integer of at least 1, see `as_integer`.

    Args:
        name: of the argument, for messages.
        value: what the caller gave.
        most: the largest that makes sense; None for any.

    Raises:
        InputError: `value` is none.
    """
    found = as_integer(value)
    if found is None or found < 1:
        raise InputError(f"{name} {shown(value)}: expected an integer >= 1")
    if most is not None and found > most:
        raise InputError(f"{name} {shown(value)}: expected an integer from 1 to {most:,}")
    return found


def shown(value: object) -> str:
    """A value as Python writes it, for a message; its beginning, where that is long."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write numbers of more than 4,300 digits
        return f"<a very long {type(value).__name__}>"
    return text if len(text) <= 200 else f"{text[:80]}... [{len(text):,} characters]"


def unknown_name(kind: str, given: object, known: Iterable[str]) -> InputError:
    """An `InputError` for a name that is not in `known`, with the nearest ones first.

    Args:
        kind: what the name stands for, such as "sampler".
        given: what the caller wrote.
        known: the names that exist.
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(given)[:100], names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return InputError(
        f"unknown {kind} {shown(given)}: {hint}expected one of {', '.join(names) or 'none'}"
    )


def renamed(kind: str, given: str, old: Mapping[str, str]) -> str:
    """Today's name for `given`, with a `FutureWarning` where that is a word of an earlier release.

    Args:
        kind: what the name stands for, such as "coupling".
        given: what the caller wrote.
        old: old names to new ones.
    """
    if given not in old:
        return given
    warnings.warn(
        f"{kind} {given!r} is called {old[given]!r} now; the old word goes with the next release",
        FutureWarning,
        stacklevel=4,
    )
    return old[given]


@functools.cache
def warn_once(message: str) -> None:
    """A `UserWarning`, the first time that these words are said in this process."""
    warnings.warn(message, UserWarning, stacklevel=3)
