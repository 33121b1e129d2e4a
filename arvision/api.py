"""Strings to objects: `load` and `sample`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from .errors import CheckpointError, InputError
from .folders import ASSETS, find_model, parse_device, parse_dtype
from .pipeline import ARPipeline, SampleOutput
from .samplers import BaseSampler, get_sampler
from .samplers.base import join_options, parse_sampler


def load(
    name_or_path: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
) -> ARPipeline:
    """Load a pipeline.

    Args:
        name_or_path: an embedded model (see `list_models`), a folder written by `save_pretrained`,
            or a hub id "owner/name".
        device: None for an accelerator where there is one, else the CPU.
        dtype: None for float32 on a CPU, bfloat16 elsewhere.

    Raises:
        InputError: an unknown name, device or dtype.
        CheckpointError: a folder that is not a complete pipeline.
    """
    place = parse_device(device)
    kind = parse_dtype(dtype, place)
    return _load(str(find_model(name_or_path)), kind).to(place)


def _load(source: str, dtype: torch.dtype) -> ARPipeline:
    try:
        with _quietly():
            shared = _shared_parts(Path(source), dtype)
            return ARPipeline.from_pretrained(source, dtype=dtype, **shared)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{source}: cannot be loaded as a pipeline ({reason})") from error


def _shared_parts(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Parts that an embedded model takes from another one, so that the wheel ships them once."""
    card = folder / "card.json"
    shared = json.loads(card.read_text()).get("shared", {}) if card.exists() else {}
    parts = {}
    for part, owner in shared.items():
        if not (folder / part).exists():
            whole = ARPipeline.from_pretrained(str(ASSETS / owner), dtype=dtype)
            parts[part] = whole.components[part]
    return parts


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the libraries' bars over two or three small components."""
    switches = [(diffusers_logging, diffusers_logging.is_progress_bar_enabled())]
    switches.append((transformers_logging, transformers_logging.is_progress_bar_enabled()))
    for switch, _ in switches:
        switch.disable_progress_bar()
    try:
        yield
    finally:
        for switch, was_shown in switches:
            if was_shown:
                switch.enable_progress_bar()


@lru_cache(maxsize=4)
def _load_cached(name: str, device: str, dtype: torch.dtype) -> ARPipeline:
    return load(name, device, dtype)


def _find_draft(name: str, device: torch.device, dtype: torch.dtype) -> ARPipeline:
    return _load_cached(name, str(device), dtype)


ARPipeline.find = staticmethod(_find_draft)


def sample(
    model: str | Path | ARPipeline,
    prompt: Any,
    sampler: str | BaseSampler | None = None,
    *,
    num_images: int = 1,
    seed: Any = 0,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    progress: bool = True,
    output_type: str = "pil",
    **sampler_options: Any,
) -> SampleOutput:
    """Draw images in one call.

    Args:
        model: an embedded name, a folder, a hub id, or a loaded pipeline.
        prompt: a class id, class name or caption, or a list of them.
        sampler: a name (see `list_samplers`), one with options such as "sjd:window=32", or a
            sampler object; None for the model's own kind of
            sampler, and for a token model whose own is "ar" the faster "sjd", which draws the same.
        num_images: images of each prompt.
        seed: image k has identity (seed, k); or a list with a seed or a pair (seed, k) per image.
        guidance_scale: weight of the condition; None for the model's recommendation, as below.
        temperature: divides the logits; 0 is greedy.
        top_k: tokens kept, 0 for all.
        top_p: mass kept, 1 for all.
        device: for a model given by name; None for an accelerator where there is one.
        dtype: likewise; None for float32 on a CPU and bfloat16 elsewhere.
        progress: show a progress bar.
        output_type: "pil", "np", "pt" or "latent".
        **sampler_options: passed to the sampler, such as `window=32`.

    Raises:
        InputError: an argument that is unknown or out of range, before the model is called.

    Example:
        >>> import arvision
        >>> out = arvision.sample("llamagen-fashion", "sneaker", seed=7, progress=False)
        >>> out.images[0].size
        (32, 32)
    """
    if isinstance(model, ARPipeline):
        pipe = model
        if device is not None or dtype is not None:
            raise InputError("device and dtype belong to load: this pipeline is loaded already")
    else:
        place = parse_device(device)
        pipe = _load_cached(str(model), str(place), parse_dtype(dtype, place))
    own = pipe.sampler.name
    usual = "sjd" if own == "ar" and pipe.kind == "token" else own
    wanted = usual if sampler is None else sampler
    if isinstance(wanted, str):
        chosen = get_sampler(wanted, **sampler_options)
    else:
        chosen = wanted.with_options(**sampler_options) if sampler_options else wanted
    written = parse_sampler(wanted)[1] if isinstance(wanted, str) else {}
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    join_options(str(wanted), written, {k: v for k, v in given.items() if v is not None})
    for name, value in given.items():
        is_open = value is None and isinstance(wanted, str) and name not in written
        if is_open and name in chosen.config:
            given[name] = pipe.config[name]
    kept = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=not progress)
    try:
        out = pipe(
            prompt,
            num_images_per_prompt=num_images,
            guidance_scale=guidance_scale,
            seed=seed,
            sampler=chosen,
            output_type=output_type,
            **given,
        )
    finally:
        pipe.set_progress_bar_config(**(kept or {}))
    assert isinstance(out, SampleOutput)
    return out
