"""The HTTP application around a studio."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..api import load
from ..errors import ArvisionError, one_line, unknown_name
from . import images, sglang
from .guards import Guard
from .limits import Limits
from .schemas import error_body
from .studio import Studio
from .waiting import GoneError, LateError, in_words, status_of

HEADERS = {429: {"Retry-After": "1"}, 503: {"Retry-After": "5"}}


def make_app(studio: Studio, token: str | None = None) -> FastAPI:
    """An ASGI application with OpenAI's image endpoints, `/health`, `/metrics` and, for GLM-Image,
    SGLang's `/generate`.

    It draws on until everything that was ordered is drawn when it is shut down.

    Args:
        studio: draws.
        token: that requests must bear (`Authorization: Bearer ...`), apart from `/health`.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(studio.close, studio.limits.timeout)

    app = FastAPI(title="arvision", lifespan=lifespan)
    app.state.studio = studio
    app.include_router(images.router)
    if sglang.serves(studio):
        app.include_router(sglang.router)
    app.add_api_route("/health", _health, methods=["GET"])
    app.add_api_route("/metrics", _metrics, methods=["GET"], response_class=Response)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    for cls in (ArvisionError, GoneError, LateError, MemoryError, RuntimeError):
        app.add_exception_handler(cls, _failed)
    app.add_middleware(Guard, limits=studio.limits, metrics=studio.metrics, token=token)
    return app


def application(
    model: str, name: str, limits: Limits, token: str | None, device: str, dtype: Any
) -> FastAPI:
    """Load a model and make its application, as each process of a server does.

    Args:
        model: see `arvision.load`.
        name: of the model in requests.
        limits: see there.
        token: see `make_app`.
        device: see `arvision.load`.
        dtype: likewise.
    """
    pipe = load(model, device=device, dtype=dtype)
    return make_app(Studio(pipe, name, limits), token)


async def _health(request: Request) -> Response:
    """200 while pictures that are ordered now will be drawn."""
    studio: Studio = request.app.state.studio
    engine = studio.engine
    content = {
        "status": "ok" if engine.is_alive else "stopping",
        "model": studio.name,
        "waiting": engine.num_waiting,
        "drawing": engine.num_drawing,
    }
    return JSONResponse(content, 200 if engine.is_alive else 503)


async def _metrics(request: Request) -> Response:
    """Counters in Prometheus' text format."""
    studio: Studio = request.app.state.studio
    return Response(studio.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _refused(status: int, message: str, kind: str, param: str | None = None) -> JSONResponse:
    body = error_body(one_line(message), kind, param)
    return JSONResponse(body, status, headers=HEADERS.get(status))


async def _failed(request: Request, error: Any) -> JSONResponse:
    kind, message = in_words(error)
    return _refused(status_of(error)[0], message, kind)


async def _http(request: Request, error: Any) -> JSONResponse:
    message, path = str(error.detail), request.url.path
    if message == "Not Found":
        message = str(unknown_name("path", path, request.app.openapi()["paths"]))
    elif message == "Method Not Allowed":
        allowed = (error.headers or {}).get("Allow", "another method")
        message = f"{request.method} {path}: expected {allowed}"
    return _refused(error.status_code, message, "invalid_request_error")


async def _invalid(request: Request, error: Any) -> JSONResponse:
    """The first thing that is wrong with a body, in one line."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return _refused(422, "the body is no JSON", "invalid_request_error")
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    param = ".".join(where) or None
    message = f"{param or 'the body'}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    return _refused(422, message, "invalid_request_error", param)
