"""The option `--fashion-mnist` of commands that need the data set."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..files import user_path


def _use(folder: Path | None) -> None:
    """Name the folder for this process and those that it starts."""
    from ..training.data import FOLDER_VARIABLE

    if folder is not None:
        os.environ[FOLDER_VARIABLE] = str(user_path(folder))


FashionFolder = Annotated[
    Path | None,
    typer.Option(
        "--fashion-mnist",
        callback=_use,
        help="Folder of Fashion-MNIST, where Debian's dataset-fashion-mnist is not installed.",
    ),
]
