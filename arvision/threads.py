"""The number of CPU threads, lowered while a model draws that measures fastest on few."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch


class Threads:
    """The process's number of CPU threads, lowered for some draws and restored by each.

    torch keeps a number for the process, which new threads take, and one for each thread. The
    number before the first of several draws is the one that every draw restores: what a later one
    reads may be the work of the first.
    """

    def __init__(self) -> None:
        self._lock, self._going, self._before = threading.Lock(), 0, 1

    @contextlib.contextmanager
    def at_most(self, wanted: int) -> Iterator[None]:
        """Run on that many threads at most."""
        with self._lock:
            if self._going == 0:
                self._before = torch.get_num_threads()
            self._going += 1
            torch.set_num_threads(min(wanted, self._before))
        try:
            yield
        finally:
            with self._lock:
                self._going -= 1
                torch.set_num_threads(self._before)


THREADS = Threads()
