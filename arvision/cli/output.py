"""Lines for the terminal, and paths from it."""

from __future__ import annotations

from pathlib import Path

import typer

from ..errors import one_line
from ..files import user_path


def tell(text: str = "", *, err: bool = False) -> None:
    """Print lines; control characters, which names from anywhere may hold, as Python escapes them."""
    typer.echo("\n".join(one_line(line, most=None) for line in text.split("\n")), err=err)


def expanded(path: Path | None) -> Path | None:
    """Of an option that names a path: `~`, which shells leave as it is in `--out=~/x`, is the home."""
    return None if path is None else user_path(path)
