"""How much memory is free, so that what would not fit is split or refused before it is begun."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import psutil

from .errors import InputError

SHARE = 0.5
"""Part of the free memory that a call plans with: estimates are rough, and others need some, too."""

CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def free_bytes(device: Any = "cpu") -> int:
    """Bytes that this process may still take on a device: of the machine, its container, its limits."""
    kind = str(device).partition(":")[0]
    if kind == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    found = [psutil.virtual_memory().available]
    for limit, used in CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # absent, or "max"
            found.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        if most != resource.RLIM_INFINITY:
            found.append(most - psutil.Process(os.getpid()).memory_info().vms)
    return max(0, min(found))


def in_words(size: float) -> str:
    """ "3.2 GB"."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"


def check_memory(what: str, needed: float, lower: str, device: Any = "cpu") -> None:
    """Refuse what the memory cannot hold.

    Args:
        what: needs it, the beginning of the message.
        needed: bytes, estimated.
        lower: what the caller may lower.
        device: where it would lie.

    Raises:
        InputError: more than `SHARE` of the free memory.
    """
    free = free_bytes(device)
    if needed > SHARE * free:
        raise InputError(
            f"{what} would take about {in_words(needed)}, {in_words(free)} are free and half of that is "
            f"used at most: lower {lower}"
        )


def items_that_fit(size: float, device: Any = "cpu") -> int:
    """How many things of `size` bytes fit at once, at least one."""
    return max(1, int(SHARE * free_bytes(device) / max(1.0, size)))
