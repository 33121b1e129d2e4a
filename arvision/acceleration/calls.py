"""What `accelerate` puts in the place of a call, and how `restore` takes it back."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from ..contracts import Stats
from ..errors import InputError
from ..models.transformers_image.network import base_of, device_of
from ..samplers import SAMPLERS, get_sampler
from ..samplers.base import LAW
from ..text import custom_generate as text_entry
from ..text.model import check_network
from .glm_pipeline import generate_prior_tokens
from .images import Plan, emu3_entry, glm_entry, janus_images

DRAWN = "arvision_stats"
"""Attribute with the statistics of the last run."""


def accelerate(obj: Any, sampler: str = "sjd", **options: Any) -> Any:
    """Let our samplers draw what a pipeline or a network of transformers draws, in place.

    The call stays the caller's: arguments, generation configuration, seeds, streamers, results.
    With the default options its law does too, restricted to image codes where it draws an image; a
    greedy call gives the very same picture. Calls that draw no image go to the original.

    Args:
        obj: diffusers' `GlmImagePipeline` (text to image, and editing); a network of transformers
            that draws images with its `generate` (`GlmImageForConditionalGeneration`,
            `JanusForConditionalGeneration`, `Emu3ForConditionalGeneration`), also wrapped by peft;
            or any causal language model that `arvision.generate` drives.
        sampler: how images are drawn, see `arvision.list_samplers`.
        **options: of the sampler, such as `window=32`; for a language model those of
            `arvision.custom_generate`, such as `drafter="eagle"`.

    Returns:
        `obj`. Its `arvision_stats` are the statistics of its last run (None before the first).

    Raises:
        InputError: an object or an option that is not known, a sampler that draws no tokens, or a
            network that is spread over several devices.
    """
    restore(obj)
    names = {cls.__name__ for cls in type(obj).__mro__}
    if "GlmImagePipeline" in names:
        plan = Plan(*_image_options(sampler, options))
        network = base_of(obj.vision_language_encoder)
        _ = device_of(network)
        obj.generate_prior_tokens = functools.wraps(type(obj).generate_prior_tokens)(
            functools.partial(generate_prior_tokens, obj, network, plan, _note(obj))
        )
        setattr(obj, DRAWN, None)
        return obj
    network = base_of(obj)
    names = {cls.__name__ for cls in type(network).__mro__}
    if "ChameleonForConditionalGeneration" in names:
        raise InputError(
            "ChameleonForConditionalGeneration: its generate draws no images; expected "
            "arvision.models.Chameleon(network), which does"
        )
    if "JanusForConditionalGeneration" in names:
        _ = device_of(network)
        plan = Plan(*_image_options(sampler, options))
        call = functools.partial(janus_images, network, plan, _note(network))
    elif names & {"GlmImageForConditionalGeneration", "Emu3ForConditionalGeneration"}:
        _ = device_of(network)
        plan = Plan(*_image_options(sampler, options))
        entry = glm_entry if "GlmImageForConditionalGeneration" in names else emu3_entry
        call = functools.partial(entry, network, plan, _note(network))
    else:
        check_network(network)
        call = _text_call(network, sampler, options, _note(network))
    network.generate = functools.wraps(type(network).generate)(call)
    setattr(network, DRAWN, None)
    return obj


def restore(obj: Any) -> Any:
    """Undo `accelerate`; nothing happens to an object that was not accelerated. Returns `obj`."""
    for owner in (obj, base_of(obj)):
        for name in ("generate", "generate_prior_tokens", DRAWN):
            getattr(owner, "__dict__", {}).pop(name, None)
    return obj


def _note(owner: Any) -> Callable[[Stats], None]:
    return lambda stats: setattr(owner, DRAWN, stats)


def _image_options(sampler: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Checked sampler and options of an object that draws images."""
    entry = SAMPLERS.entry(sampler)
    if "token" not in entry.facts["drives"]:
        fitting = ", ".join(e.name for e in SAMPLERS if "token" in e.facts["drives"])
        raise InputError(f"sampler {sampler!r} draws no tokens: expected one of {fitting}")
    for name in LAW:  # a call says these itself
        if name in options:
            raise InputError(f"{name}: the call's own generation configuration says it")
    get_sampler(sampler, **options)
    return sampler, options


def _text_call(
    network: Any, sampler: str, options: dict[str, Any], note: Callable[[Stats], None]
) -> Callable[..., Any]:
    """`generate` of a language model with our drafters."""
    if sampler != "sjd":
        raise InputError(
            f"sampler {sampler!r}: {type(network).__name__} writes text, expected drafter=... "
            "(see arvision.list_drafters)"
        )
    known = set(inspect.signature(text_entry.custom_generate).parameters)
    for name in options:
        if name not in known or name in ("model", "input_ids", "record", "text_streamer"):
            raise InputError(
                f"option {name!r}: expected one of arvision.custom_generate, such as drafter or "
                "rule"
            )
    own = functools.partial(type(network).generate, network)

    def generate(*arguments: Any, **named: Any) -> Any:
        if named.get("custom_generate") is not None or named.get("assistant_model") is not None:
            return own(*arguments, **named)
        ours = {**options, "custom_generate": text_entry.custom_generate, "record": note}
        streamer = named.pop("streamer", None)
        return own(*arguments, **{**ours, **named}, text_streamer=streamer)

    return generate
