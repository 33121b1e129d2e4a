"""SGLang's contract for an external autoregressive stage: `POST /generate`.

SGLang's diffusion server started with `--srt-encoder-url http://host:port` sends the ids of a prompt
and the grids of GLM-Image's tokens, the picture's first and then its previews', and takes the tokens
in drawing order: previews first.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

from fastapi import APIRouter, Request

from ..errors import InputError
from ..models import GlmImage
from .order import Order
from .schemas import GenerateBody, ImageData, SamplingParams
from .studio import Studio
from .waiting import ordered

router = APIRouter()


@router.post("/generate", response_model=None)
async def generate(request: Request, body: GenerateBody) -> Any:
    """Draw GLM-Image's tokens; one answer, or a list for a list of prompts."""
    studio: Studio = request.app.state.studio
    is_batch = isinstance(body.input_ids[0], list)
    prompts: list[Any] = body.input_ids if is_batch else [body.input_ids]
    images: list[Any] = body.image_data if is_batch else [body.image_data]
    said = body.sampling_params
    params = said if isinstance(said, list) else [said] * len(prompts)
    for noun, given in (("image_data", images), ("sampling_params", params)):
        if len(given) != len(prompts):
            raise InputError(f"{len(given)} {noun} for {len(prompts)} prompts: expected one each")
    if len(prompts) > studio.limits.queue:
        raise InputError(f"{len(prompts)} prompts: expected at most {studio.limits.queue}")
    orders, wanted = [], []
    for ids, image, how in zip(prompts, images, params, strict=True):
        order, num = await asyncio.to_thread(_order, studio, ids, image, how)
        orders.append(order)
        wanted.append(num)
    async with ordered(request, orders) as tickets:
        found = await tickets.all()
    end = int(studio.pipe.model.base.config.image_end_token_id)
    answers = [
        _answer(order, one.tokens.tolist(), num, end, one.seconds)
        for order, one, num in zip(orders, found, wanted, strict=True)
    ]
    return answers if is_batch else answers[0]


def _order(studio: Studio, ids: list[int], image: Any, how: SamplingParams) -> tuple[Order, int]:
    """The order, and how many ids are answered."""
    grids = _grids(image)
    num = sum(rows * columns for rows, columns in grids)
    most = num + 1 if how.max_new_tokens is None else how.max_new_tokens
    if not num <= most <= num + 1:
        raise InputError(
            f"max_new_tokens {most}: the grids hold {num} tokens, expected {num} or {num + 1} (with "
            "the end of the image)"
        )
    seed = random.getrandbits(62) if how.sampling_seed is None else how.sampling_seed
    order = studio.order_tokens(
        ids,
        grids,
        temperature=how.temperature,
        top_k=max(0, how.top_k),
        top_p=how.top_p,
        seed=seed,
    )
    return order, most


def _grids(image: Any) -> list[tuple[int, int]]:
    """Rows and columns in drawing order."""
    if not isinstance(image, list) or len(image) != 1 or not isinstance(image[0], ImageData):
        raise InputError(
            "image_data: expected one entry with image_grid_thw, the picture's grid and then those of "
            "its previews; source images are not taken"
        )
    grids = [(int(grid[1]), int(grid[2])) for grid in image[0].image_grid_thw]
    for time, rows, columns in image[0].image_grid_thw:
        if time != 1 or not (1 <= rows <= 512 and 1 <= columns <= 512):
            raise InputError(f"image_grid_thw {[time, rows, columns]}: expected [1, rows, columns]")
    return grids[::-1]


def _answer(order: Order, tokens: list[int], num: int, end: int, seconds: float) -> dict[str, Any]:
    """One sequence as SGLang reads it."""
    output = [*tokens, end][:num]
    return {
        "text": "",
        "output_ids": output,
        "meta_info": {
            "id": f"{order.identity[0]:016x}",
            "finish_reason": {"type": "length", "length": len(output)},
            "prompt_tokens": len(order.condition),
            "completion_tokens": len(output),
            "cached_tokens": 0,
            "reasoning_tokens": 0,
            "e2e_latency": seconds,
        },
    }


def serves(studio: Studio) -> bool:
    """Whether the studio's model is the one of this contract."""
    return isinstance(studio.pipe.model, GlmImage)
