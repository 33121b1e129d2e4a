"""How files begin that the package writes, so that what only has such a name is left alone."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import InputError

STARTS = {
    ".json": (b"{", b"["),
    ".jsonl": (b"{", b"["),
    ".npy": (b"\x93NUMPY",),
    ".npz": (b"PK",),
    ".png": (b"\x89PNG",),
    ".pt": (b"PK",),
}
"""How files of a kind begin, by the end of their name; a file with another beginning is not ours."""


def check_kind(goal: Path) -> None:
    """Leave alone what has a name of ours and is something else.

    Raises:
        InputError: see above.
    """
    wanted = STARTS.get(goal.suffix.lower())
    if wanted is None or not os.path.isfile(goal):
        return
    with open(goal, "rb") as file:
        start = file.read(64).lstrip()
    if start and not start.startswith(wanted):
        raise InputError(
            f"{goal} is no {goal.suffix} file: it is left as it is, expected another name"
        )
