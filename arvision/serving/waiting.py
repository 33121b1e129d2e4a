"""Between a request and the engine: wait, give up in time, and drop what nobody wants any more."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request

from ..errors import ArvisionError, InputError
from .limits import BusyError, ClosedError
from .order import Drawn, Order
from .studio import Studio

LOOKS_EVERY = 0.2
"""Seconds between two looks at whether the client is still there."""


class GoneError(Exception):
    """The client left."""


class LateError(Exception):
    """The request took longer than the server allows."""


STATUS: dict[type[BaseException], tuple[int, str]] = {
    BusyError: (429, "rate_limit_error"),
    ClosedError: (503, "server_error"),
    InputError: (422, "invalid_request_error"),
    LateError: (504, "timeout_error"),
    GoneError: (499, "client_closed"),
    MemoryError: (503, "server_error"),
}
"""Status and kind of each error."""


def status_of(error: BaseException) -> tuple[int, str]:
    """Status and kind that an error is told with."""
    for cls, found in STATUS.items():
        if isinstance(error, cls):
            return found
    return 500, "server_error"


def in_words(error: BaseException) -> tuple[str, str]:
    """Kind and one line of an error, without what only the server's owner should read."""
    status, kind = status_of(error)
    if status == 500 and not isinstance(error, ArvisionError):
        return kind, f"the picture could not be drawn ({type(error).__name__})"
    return kind, str(error)


class Tickets:
    """Pictures that a request waits for.

    Args:
        request: whose client may leave.
        orders: in the queue.
        studio: whose.
    """

    def __init__(self, request: Request, orders: Sequence[Order], studio: Studio) -> None:
        self._request, self.orders, self._studio = request, orders, studio
        self._answers = [asyncio.wrap_future(order.answer) for order in orders]
        self._until = time.monotonic() + studio.limits.timeout
        self._is_handed_over = False

    async def all(self) -> list[Drawn]:
        """All pictures.

        Raises:
            GoneError: the client left.
            LateError: it took too long.
        """
        waits = asyncio.gather(*self._answers)
        await self._until_done([waits])
        return waits.result()

    async def first_of(self, events: asyncio.Queue[Any]) -> Any:
        """The next preview, or the only picture; raises as `all` does."""
        event = asyncio.ensure_future(events.get())
        try:
            await self._until_done([event, self._answers[0]])
            if event.done():
                return event.result()
        finally:
            event.cancel()
        return self._answers[0].result()

    async def _until_done(self, waits: list[Any]) -> None:
        while True:
            left = self._until - time.monotonic()
            if left <= 0:
                limit = self._studio.limits.timeout
                raise LateError(f"no picture within {limit:g} s: try again later")
            done, _ = await asyncio.wait(
                waits, timeout=min(LOOKS_EVERY, left), return_when=asyncio.FIRST_COMPLETED
            )
            if done:
                return
            if await self._request.is_disconnected():
                raise GoneError("the client left")

    async def watched(self, events: AsyncIterator[str]) -> AsyncIterator[str]:
        """Events of these pictures, which are dropped when the stream ends before they do."""
        try:
            async for event in events:
                yield event
        finally:
            self.drop()

    def hand_over(self) -> None:
        """From now on a stream drops what is not finished."""
        self._is_handed_over = True

    def drop(self) -> None:
        """Leave unfinished what is not finished, and count what is."""
        metrics = self._studio.metrics
        left = []
        for order, answer in zip(self.orders, self._answers, strict=True):
            if not answer.done():
                left.append(order)
            elif not answer.cancelled() and answer.exception() is None:
                metrics.waited.observe(answer.result().waited)
                metrics.seconds.observe(answer.result().seconds)
        if left:
            self._studio.engine.drop(left)


@contextlib.asynccontextmanager
async def ordered(request: Request, orders: Sequence[Order]) -> AsyncIterator[Tickets]:
    """Queue pictures; what is not finished at the end is dropped, unless a stream goes on.

    Raises:
        BusyError: the queue is full.
        ClosedError: the server is stopping.
    """
    studio: Studio = request.app.state.studio
    tickets = Tickets(request, orders, studio)
    studio.engine.submit(orders)
    try:
        yield tickets
    finally:
        if not tickets._is_handed_over:
            tickets.drop()
