"""What stands before every request: a token, a bound on its size, a bound on how slowly it comes."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from typing import Any

from .limits import Limits
from .metrics import Metrics
from .schemas import error_body

OPEN_PATHS = ("/health",)
"""Asked without a token, by whatever watches the server."""

PATHS = ("/v1/images/generations", "/v1/models", "/generate", "/health", "/metrics")
"""Under which answers are counted."""


class Guard:
    """ASGI middleware; see above.

    Args:
        app: what follows.
        limits: bounds.
        metrics: counts answers.
        token: that requests must bear; None for none.
    """

    def __init__(self, app: Any, limits: Limits, metrics: Metrics, token: str | None) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._token = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or refuse it before anything reads it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in PATHS else "other"
        has_begun = False

        async def counted(message: Any) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                self._metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        try:
            await self._app(scope, await self._body(scope, receive), counted)
        except _Refusal as refusal:
            await _answer(counted, refusal)
        except Exception as error:
            if has_begun:
                raise
            await _answer(
                counted,
                _Refusal(500, f"the server failed ({type(error).__name__})", "server_error"),
            )

    async def _body(self, scope: Any, receive: Any) -> Any:
        """A `receive` whose body is here already.

        Raises:
            _Refusal: no token, too many bytes, or too few of them in time.
        """
        headers = dict(scope["headers"])
        if self._token is not None and scope["path"] not in OPEN_PATHS:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, self._token):
                raise _Refusal(
                    401,
                    "no valid bearer token: expected the header Authorization: Bearer <token>",
                    "authentication_error",
                )
        most = self._limits.body
        body, more = b"", True
        until = time.monotonic() + self._limits.upload
        while more:
            try:
                message = await asyncio.wait_for(receive(), until - time.monotonic())
            except asyncio.TimeoutError:
                raise _Refusal(
                    408, f"the request did not come within {self._limits.upload:g} s"
                ) from None
            if message["type"] == "http.disconnect":
                break
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > most:
                raise _Refusal(413, f"a body of more than {most:,} bytes: expected fewer")
        is_given = False

        async def again() -> Any:
            nonlocal is_given
            if is_given:
                return await receive()
            is_given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return again


class _Refusal(Exception):
    def __init__(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


async def _answer(send: Any, refusal: _Refusal) -> None:
    body = json.dumps(error_body(str(refusal), refusal.kind)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
