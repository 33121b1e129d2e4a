"""OpenAI's endpoints: `POST /v1/images/generations` and `GET /v1/models`."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse

from ..errors import InputError
from .order import Drawn
from .schemas import ImageBody
from .studio import Studio, to_bytes
from .waiting import Tickets, in_words, ordered

router = APIRouter()
STARTED = int(time.time())


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The one model that this server has."""
    studio: Studio = request.app.state.studio
    entry = {"id": studio.name, "object": "model", "created": STARTED, "owned_by": "arvision"}
    return {"object": "list", "data": [entry]}


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """That model by its name."""
    listed = (await models(request))["data"]
    _check_model(request.app.state.studio, name)
    return listed[0]


def _check_model(studio: Studio, name: str | None) -> None:
    if name is not None and name != studio.name:
        raise HTTPException(404, f"model {name!r}: this server has {studio.name!r}")


@router.post("/v1/images/generations", response_model=None)
async def generations(request: Request, body: ImageBody) -> Any:
    """Draw pictures of a prompt."""
    studio: Studio = request.app.state.studio
    _check_model(studio, body.model)
    if body.response_format == "url":
        raise InputError('response_format "url": pictures are not kept, expected "b64_json"')
    if body.partial_images and not body.stream:
        raise InputError(
            f"partial_images {body.partial_images} without stream: expected stream true"
        )
    if body.stream and body.n != 1:
        raise InputError(f"n {body.n} with stream: expected 1")
    seed = random.getrandbits(62) if body.seed is None else body.seed
    events: asyncio.Queue[Any] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def show(picture: Any) -> None:
        loop.call_soon_threadsafe(events.put_nowait, picture)

    orders = await asyncio.to_thread(
        studio.order,
        body.prompt,
        body.n,
        size=body.size,
        seed=seed,
        negative_prompt=body.negative_prompt,
        guidance_scale=body.guidance_scale,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        sampler=body.sampler,
        previews=body.partial_images,
        on_preview=show if body.partial_images else None,
    )
    async with ordered(request, orders) as tickets:
        if body.stream:
            first = await tickets.first_of(events)
            told = _events(tickets, events, first, body.output_format, seed)
            tickets.hand_over()
            return StreamingResponse(tickets.watched(told), media_type="text/event-stream")
        found = await tickets.all()
    data = await asyncio.to_thread(
        lambda: [{"b64_json": _encoded(one.image, body.output_format)} for one in found]
    )
    return JSONResponse(
        {
            "created": int(time.time()),
            "data": data,
            "size": _size_of(found[0].image),
            "output_format": body.output_format,
            "seed": seed,
            "usage": _usage(found),
        }
    )


async def _events(
    tickets: Tickets, events: asyncio.Queue[Any], first: Any, format: str, seed: int
) -> AsyncIterator[str]:
    """Previews and then the picture, as server-sent events."""
    number, found = 0, first
    while not isinstance(found, Drawn):
        facts = {"partial_image_index": number, **_shared(found, format, seed)}
        encoded = await asyncio.to_thread(_encoded, found, format)
        yield _event("image_generation.partial_image", {"b64_json": encoded, **facts})
        number += 1
        try:
            found = await tickets.first_of(events)
        except Exception as error:
            kind, message = in_words(error)
            yield _event("error", {"error": {"message": message, "type": kind}})
            return
    encoded = await asyncio.to_thread(_encoded, found.image, format)
    facts = {**_shared(found.image, format, seed), "usage": _usage([found])}
    yield _event("image_generation.completed", {"b64_json": encoded, **facts})


def _shared(picture: Any, format: str, seed: int) -> dict[str, Any]:
    now = int(time.time())
    return {"created_at": now, "size": _size_of(picture), "output_format": format, "seed": seed}


def _event(name: str, content: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps({'type': name, **content})}\n\n"


def _encoded(picture: Any, format: str) -> str:
    return base64.b64encode(to_bytes(picture, format)).decode()


def _size_of(picture: Any) -> str:
    return f"{picture.width}x{picture.height}"


def _usage(found: list[Drawn]) -> dict[str, Any]:
    """Tokens drawn, passes that the pictures took part in, and seconds."""
    tokens = sum(len(one.tokens) for one in found)
    return {
        "input_tokens": 0,
        "output_tokens": tokens,
        "total_tokens": tokens,
        "passes": [one.passes for one in found],
        "waited": [round(one.waited, 4) for one in found],
        "seconds": [round(one.seconds, 4) for one in found],
    }
