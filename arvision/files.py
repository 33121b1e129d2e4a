"""Writing files so that nothing is ever half written."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import InputError


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error.

    The suffix is kept, so that libraries that look at it write the right format.

    Raises:
        InputError: `path` is a folder, or its parent cannot be made.
    """
    goal = Path(path)
    if goal.is_dir():
        raise InputError(f"{goal} is a folder: expected a file name")
    try:
        goal.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{goal.parent} cannot be made ({error.strerror})") from error
    handle, name = tempfile.mkstemp(prefix=f".{goal.stem}-", suffix=goal.suffix, dir=goal.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        os.replace(temporary, goal)
    finally:
        temporary.unlink(missing_ok=True)
