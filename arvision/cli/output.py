"""Lines for the terminal."""

from __future__ import annotations

import typer

from ..errors import one_line


def tell(text: str = "", *, err: bool = False) -> None:
    """Print lines; control characters, which names from anywhere may hold, as Python escapes them."""
    typer.echo("\n".join(one_line(line, most=None) for line in text.split("\n")), err=err)
