"""Draws that are going on, and how one is told to stop."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(eq=False)
class Call:
    """One draw that is going on: whose thread, and whether it was told to stop."""

    thread: int
    is_interrupted: bool = False


class Interruptible:
    """A pipeline whose draws can be stopped, each by the thread that makes it, or all at once."""

    _calls: list[Call]

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` in a callback to stop the run after the current pass.

        It stops the draw of the thread that sets it; set outside of any draw, as a server does that
        shuts down, it stops all that are going on.
        """
        return self._interrupt

    @property
    def _interrupt(self) -> bool:
        return any(call.is_interrupted for call in self._reached())

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        for call in self._reached():
            call.is_interrupted = bool(value)

    def _reached(self) -> list[Call]:
        """The newest draw of this thread, or else all."""
        going = list(self._calls)
        own = [call for call in going if call.thread == threading.get_ident()]
        return own[-1:] or going

    @contextlib.contextmanager
    def _call(self) -> Iterator[Call]:
        """A draw that is going on."""
        call = Call(threading.get_ident())
        self._calls.append(call)
        try:
            yield call
        finally:
            self._calls.remove(call)
