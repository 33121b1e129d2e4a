"""Lines for the terminal, and paths and numbers from it."""

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


def set_threads(threads: int | None) -> None:
    """Set the process's number of CPU threads; None leaves it.

    Raises:
        InputError: no number from 1 to 1024.
    """
    if threads is None:
        return
    import torch

    from ..errors import check_count

    torch.set_num_threads(check_count("threads", threads, 1024))
