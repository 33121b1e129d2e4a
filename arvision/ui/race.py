"""Several draws side by side, a pass at a time: whoever has used less time makes the next pass."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Draw = Callable[[Callable[..., Any]], Any]
"""Draws with a callback after each pass (see `ARPipeline.__call__`); returns a `SampleOutput`."""


@dataclass(eq=False)
class Runner:
    """One of the draws, as far as it is.

    Attributes:
        draw: see there.
        seconds: of its own, waiting for the others and making previews left out.
        passes: of the model so far.
        finished: tokens of all pictures that are final.
        pictures: the last preview, in the end the pictures themselves.
        output: what `draw` returned; None before.
        error: what it raised; None for nothing.
    """

    draw: Draw
    seconds: float = 0.0
    passes: int = 0
    finished: int = 0
    pictures: Sequence[Any] = ()
    output: Any = None
    error: Exception | None = None
    turn: threading.Event = field(default_factory=threading.Event)


class Race:
    """Draws that take turns in one process, so that each one's seconds are its own.

    Args:
        draws: of the runners.
    """

    def __init__(self, draws: Sequence[Draw]) -> None:
        self.runners = [Runner(draw) for draw in draws]
        self._going = list(self.runners)
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.is_stopped = False

    def run(self, timeout: float) -> Iterator[None]:
        """Draw; yields whenever a runner has something new to show, and at the end.

        Closing the iterator stops all draws after their passes, and so does the end of the program.

        Args:
            timeout: seconds after which the draws are stopped.
        """
        until = time.monotonic() + timeout
        # No daemons: Python's end waits for the pass that each is in, and does not break into torch.
        threads = [threading.Thread(target=self._run, args=(runner,)) for runner in self.runners]
        for thread in threads:
            thread.start()
        self._pass_on()
        try:
            while self._going:
                try:
                    self._news.get(timeout=max(0.0, until - time.monotonic()))
                except queue.Empty:
                    self.is_stopped = True
                    break
                yield
        finally:
            self.is_stopped |= bool(self._going)
            for thread in threads:
                thread.join()
        yield

    def _pass_on(self) -> None:
        """Give the turn to the runner that has used the least time."""
        if self._going:
            min(self._going, key=lambda runner: runner.seconds).turn.set()

    def _run(self, runner: Runner) -> None:
        runner.turn.wait()
        begun = time.perf_counter()

        def on_step(pipe: Any, step: int, timestep: int, given: dict[str, Any]) -> None:
            nonlocal begun
            spent = time.perf_counter() - begun
            runner.seconds += spent - given.get("preview_seconds", 0.0)
            runner.passes, runner.finished = step, given["finished"]
            if "preview" in given:
                runner.pictures = given["preview"]
                self._news.put(None)
            runner.turn.clear()
            self._pass_on()
            runner.turn.wait()
            if self.is_stopped or not threading.main_thread().is_alive():
                pipe._interrupt = True
            begun = time.perf_counter()

        try:
            runner.output = runner.draw(on_step)
            runner.pictures = runner.output.images
        except Exception as error:  # shown to whoever ordered it
            runner.error = error
        runner.seconds += time.perf_counter() - begun
        self._going.remove(runner)
        self._pass_on()
        self._news.put(None)
