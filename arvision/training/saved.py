"""States of a training on the disk: synced, with a hash, named where they are damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..files import check_seal, replacing, seal


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values, whole or not at all.

    Raises:
        DiskError: the disk is full or fails.
    """
    with replacing(path, durable=True) as temporary:
        # Through a file of ours, whose error says why; the library's own says only that it failed.
        with open(temporary, "wb") as file:
            torch.save(state, file)
        seal(temporary)


def load_state(path: Path, advice: str, mmap: bool = False) -> dict[str, Any]:
    """What `save_state` wrote, on the CPU.

    Args:
        path: of the file.
        advice: what to do about a damaged one.
        mmap: leave the tensors on the disk until they are used.

    Raises:
        CheckpointError: a file that was cut or changed.
    """
    check_seal(path, advice)
    return torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)
