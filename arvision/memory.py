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
    """ "3.2 GiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"


class Peak:
    """The most that lay on an accelerator within a block, `bytes`; None on a CPU.

    Counts of the process start anew, as PyTorch has one maximum for all.
    """

    def __init__(self, device: Any) -> None:
        self.device, self.bytes = device, None

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            import torch

            self.bytes = torch.cuda.max_memory_allocated(self.device)


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
