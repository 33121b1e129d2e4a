"""Ranks, barriers and gathering, for runs under `torchrun` or `accelerate launch`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) without a launcher."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def processes() -> Iterator[int]:
    """Join the process group (gloo) that a launcher describes, if any; gives this process's rank.

    The group is left at the end of the block, unless it was joined before.
    """
    rank, size = rank_and_size()
    joins = size > 1 and not dist.is_initialized()
    if joins:
        dist.init_process_group("gloo")
    try:
        yield rank
    finally:
        if joins:
            dist.destroy_process_group()


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def gather(value: Any) -> list[Any] | None:
    """Every process's `value` in rank order on rank 0; None elsewhere."""
    rank, size = rank_and_size()
    if size == 1 or not dist.is_initialized():
        return [value]
    found: list[Any] | None = [None] * size if rank == 0 else None
    dist.gather_object(value, found)
    return found


def local_device() -> torch.device:
    """The accelerator of this process where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")
