"""Bodies of requests, and errors in OpenAI's shape."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Seed = Annotated[int, Field(ge=0, lt=1 << 64)]
Side = Annotated[str, Field(max_length=16)]


class ImageBody(BaseModel):
    """`POST /v1/images/generations`: OpenAI's fields, and those of a pipeline's call."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1, description="A class name, a class id, or a caption.")
    model: str | None = Field(None, description="The served model; may be left out.")
    n: int = Field(1, ge=1, le=10_000, description="Pictures.")
    size: Side | None = Field(None, description="WIDTHxHEIGHT, or auto.")
    seed: Seed | None = Field(None, description="Picture k has the identity (seed, k).")
    response_format: Literal["b64_json", "url"] | None = Field(None, description="b64_json only.")
    output_format: Literal["png", "jpeg", "webp"] = "png"
    stream: bool = Field(False, description="Answer with server-sent events.")
    partial_images: int = Field(0, ge=0, le=16, description="Previews, with stream.")
    user: Annotated[str, Field(max_length=256)] | None = Field(None, description="Not looked at.")
    negative_prompt: str | None = None
    guidance_scale: float | None = Field(None, ge=0, allow_inf_nan=False)
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=0, lt=1 << 31)
    top_p: float | None = Field(None, gt=0, le=1)
    sampler: Annotated[str, Field(max_length=200)] | None = Field(
        None, description="Such as sjd:window=16."
    )


class SamplingParams(BaseModel):
    """What SGLang says of one sequence; what it says besides is not looked at."""

    model_config = ConfigDict(extra="ignore")

    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    top_k: int = Field(default=-1, ge=-1, lt=1 << 31)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int | None = Field(default=None, ge=1, lt=1 << 24)
    ignore_eos: bool = True
    sampling_seed: Seed | None = None


class ImageData(BaseModel):
    """Grids (time, rows, columns): the picture, then its previews."""

    model_config = ConfigDict(extra="ignore")

    image_grid_thw: Annotated[
        list[Annotated[list[int], Field(min_length=3, max_length=3)]],
        Field(min_length=1, max_length=8),
    ]


Ids = Annotated[list[int], Field(min_length=1, max_length=1 << 16)]


class GenerateBody(BaseModel):
    """`POST /generate`: SGLang's contract for an external autoregressive stage."""

    model_config = ConfigDict(extra="ignore")

    input_ids: Ids | Annotated[list[Ids], Field(min_length=1, max_length=256)]
    image_data: list[ImageData] | Annotated[list[list[ImageData]], Field(max_length=256)]
    sampling_params: SamplingParams | list[SamplingParams] = Field(
        default_factory=lambda: SamplingParams()
    )


def error_body(
    message: str, kind: str = "invalid_request_error", param: str | None = None, code: Any = None
) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
