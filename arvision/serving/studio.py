"""From what a request says to pictures that the engine can draw, and back to bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..glm_pipeline import GlmPipeline
from ..image_pipeline import ImageModelPipeline
from ..inputs import as_prompts, check_numbers, expand_prompts, resolve_seeds
from ..models import GlmImage
from ..models.pixels import written
from ..pipeline import ARPipeline
from ..previews import check_preview, preview
from ..samplers import get_sampler
from ..samplers.base import parse_sampler, strangers_sampler
from .engine import Engine
from .limits import Limits
from .metrics import Metrics
from .order import Order

MOST_SIZES = 8
"""Sizes of one network whose models are kept at hand."""

FORMATS = ("png", "jpeg", "webp")

LAWS = {
    "temperature": (0.01, 100.0, "0 or a number from 0.01 to 100"),
    "guidance_scale": (0.0, 1000.0, "a number from 0 to 1000"),
}
"""Numbers with which a law stays a law in float32."""


class Studio:
    """A pipeline, its engine and its counters: everything of a server but HTTP.

    Args:
        pipe: draws.
        name: of the model, as requests call it.
        limits: see there.
    """

    def __init__(self, pipe: ARPipeline, name: str, limits: Limits | None = None) -> None:
        self.pipe, self.name, self.limits = pipe, name, limits or Limits()
        self._models: dict[Any, Any] = {}
        self.metrics = Metrics()
        self.engine = Engine(pipe, self._render, self.limits, self.metrics.add)
        self.metrics.watch(self.engine)

    def model_at(self, key: Any, make: Callable[[], Any]) -> Any:
        """One model object for each size, so that equal ones share a lane."""
        if key not in self._models:
            if len(self._models) >= MOST_SIZES:
                self._models.pop(next(iter(self._models)))
            self._models[key] = make()
        return self._models[key]

    def order(
        self,
        prompt: str,
        n: int = 1,
        *,
        size: str | None = None,
        seed: int | None = None,
        negative_prompt: str | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        sampler: str | None = None,
        previews: int = 0,
        on_preview: Callable[[Any], None] | None = None,
    ) -> list[Order]:
        """Pictures of a prompt, not yet queued; the arguments are those of a pipeline's call.

        Args:
            prompt: a class name, a class id as text, or a caption.
            n: pictures.
            size: "HEIGHTxWIDTH"; None or "auto" for the model's own.
            seed: picture k has the identity (seed, k), as in a call of the pipeline.
            negative_prompt: what guidance leads away from.
            guidance_scale: None for the recommended one.
            temperature: likewise.
            top_k: likewise.
            top_p: likewise.
            sampler: such as "sjd:window=16"; None for the pipeline's own.
            previews: unfinished pictures on the way.
            on_preview: is given each.

        Raises:
            InputError: what a pipeline refuses, or a limit.
        """
        if len(prompt) > self.limits.prompt:
            raise InputError(
                f"prompt of {len(prompt):,} characters: expected at most {self.limits.prompt:,}"
            )
        if n > self.limits.images:
            raise InputError(f"n {n}: expected at most {self.limits.images}")
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        changes = {
            name: check_numbers(name, value, is_whole=name == "top_k", is_one=True)
            for name, value in given.items()
            if value is not None
        }
        chosen = self._sampler(sampler, changes)
        scale = self.pipe.config["guidance_scale"] if guidance_scale is None else guidance_scale
        scale = check_numbers("guidance_scale", scale)
        for name, value in (("temperature", temperature), ("guidance_scale", guidance_scale)):
            low, high, expected = LAWS[name]
            if value is not None and value != 0 and not low <= value <= high:
                raise InputError(f"{name} {value!r}: expected {expected}")
        self.pipe.check_sampler(chosen)
        model, call = self._sized(size)
        if previews:
            check_preview(previews, model, on_preview)
        self.pipe._check_effect(chosen, model, given | {"guidance_scale": guidance_scale})
        prompts = self._prompts(prompt, negative_prompt, scale)
        chosen = self.pipe.bind(chosen, model)
        return [
            Order(
                condition,
                condition,
                identity,
                model,
                chosen,
                scale,
                call,
                previews=previews,
                on_preview=on_preview,
            )
            for condition, identity in zip(prompts * n, resolve_seeds(seed, None, n), strict=True)
        ]

    def _sampler(self, spec: str | None, changes: dict[str, Any]) -> Any:
        if spec is None:
            return self.pipe.sampler.with_options(**changes) if changes else self.pipe.sampler
        chosen, own = strangers_sampler(spec), parse_sampler(spec)[1]
        return chosen.with_law(self.pipe.config, {*own, *changes}).with_options(**changes)

    def _prompts(self, prompt: str, negative: str | None, scale: Any) -> list[Any]:
        """The prompt as the pipeline takes it, one entry."""
        if isinstance(self.pipe, GlmPipeline):
            return as_prompts(prompt, negative)
        if isinstance(self.pipe, ImageModelPipeline):
            return self.pipe._prompts(prompt, negative, None, scale)
        if negative is not None:
            return list(as_prompts(prompt, negative))
        return list(expand_prompts(prompt, 1))

    def _sized(self, size: str | None) -> tuple[Any, dict[str, Any]]:
        """The model of a size, and what a call of the pipeline says of it."""
        height = width = None
        if size not in (None, "auto"):
            found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", str(size))
            if found is None:
                raise InputError(f'size {size!r}: expected "auto" or WIDTHxHEIGHT such as 32x32')
            width, height = int(found[1]), int(found[2])
            if max(width, height) > self.limits.pixels:
                raise InputError(
                    f"size {size}: expected at most {self.limits.pixels} pixels a side"
                )
        if isinstance(self.pipe, ImageModelPipeline):
            model = self.model_at(
                (height, width), lambda: self.pipe.model.at_size(height, width, 0)
            )
            sides = {"height": height, "width": width} if height is not None else {}
            # The diffusion decoder of GLM-Image takes the pictures of a call together.
            whole = isinstance(self.pipe, GlmPipeline)
            return model, sides | ({"num_images_per_prompt": 1} if whole else {})
        model = self.model_at(None, lambda: self.pipe.model)
        if width is not None and (width, height) != self.size:
            own = "x".join(map(str, self.size))
            raise InputError(f"size {size}: this model draws {own} only")
        return model, {}

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the model's own pictures."""
        if isinstance(self.pipe, ImageModelPipeline):
            height, width = self.pipe.model.picture_size
            return width, height
        if not hasattr(self, "_size"):
            model = self.model_at(None, lambda: self.pipe.model)
            self._size = _picture_size(model, self.pipe)
        return self._size

    def order_tokens(
        self,
        ids: Sequence[int],
        grids: Sequence[tuple[int, int]],
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
    ) -> Order:
        """Tokens of GLM-Image for a whole prompt, without a picture.

        Args:
            ids: of the prompt, which ends in the image start.
            grids: rows and columns in drawing order.
            temperature: of the codes.
            top_k: likewise.
            top_p: likewise.
            seed: the identity is (seed, 0).

        Raises:
            InputError: another model, or a prompt that is none.
        """
        own = self.pipe.model
        if not isinstance(own, GlmImage):
            raise InputError(
                f"{type(own).__name__} is no GLM-Image: expected a server of its "
                "vision_language_encoder for /generate"
            )
        key = tuple(grids)
        model = self.model_at(key, lambda: GlmImage(own.network, own.processor, grids=list(grids)))
        prompt = torch.tensor(list(ids))
        model._ids(prompt, ())  # refuses what is no prompt
        law = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        sampler = get_sampler("ar", **law)
        return Order(prompt, prompt, (seed, 0), model, sampler, 1.0, wants_image=False)

    def _render(self, model: Any, tokens: Tensor, length: int | None) -> Any:
        """A picture of tokens [N], of which the first `length` are final; grey where none are."""
        if length is None:
            with torch.no_grad():
                return written(model.decode(tokens[None]), "pil")[0]
        is_final = torch.arange(len(tokens), device=tokens.device) < length
        return preview(model, tokens[None], is_final[None])[0]

    def close(self, timeout: float | None = None) -> bool:
        """Draw what was ordered and end, see `Engine.close`."""
        return self.engine.close(timeout)


def _picture_size(model: Any, pipe: ARPipeline) -> tuple[int, int]:
    """Width and height of a model's pictures, from one that it makes of any tokens."""
    shape = (1, model.num_tokens)
    if pipe.kind == "continuous":
        tokens = torch.zeros(*shape, model.head.latent_dim)
    else:
        bits = getattr(model, "num_bits", None)
        tokens = torch.zeros(*shape, *(() if bits is None else (bits,)), dtype=torch.int64)
    with torch.no_grad():
        picture = model.decode(tokens.to(model.device))
    return picture.shape[-1], picture.shape[-2]


def to_bytes(picture: Any, format: str) -> bytes:
    """A picture as a file of one of `FORMATS`."""
    held = io.BytesIO()
    picture.save(held, format=format.upper())
    return held.getvalue()
