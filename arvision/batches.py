"""Calls for more images than fit into memory at once: drawn in parts, told as one.

Noise is a function of identity, so an image is the same in any part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .contracts import Samples, Stats, StepCallback
from .memory import check_memory, items_that_fit

COPIES = 8
"""Laws of a pass that live at once: logits, their sorted and shaped copies, in float64 where it matters."""


ALIKE = ("tokens", "lossless", "cost_table", "iterations")
"""Statistics that say of all parts the same."""


@dataclass(frozen=True)
class ImageMemory:
    """Bytes per image, estimated from above.

    Attributes:
        kept: until the call returns: picture, tokens, statistics.
        working: while it is drawn and decoded: cache, laws, the decoder's planes.
    """

    kept: float
    working: float


def image_memory(model: Any, tokenizer: Any, is_guided: bool, output_type: str) -> ImageMemory:
    """What an image of this model takes.

    Args:
        model: of any kind.
        tokenizer: its image tokenizer, None for none.
        is_guided: whether a second row leads away from nothing.
        output_type: of the pipeline.
    """
    network = model.transformer if hasattr(model, "transformer") else model.network
    config, item = _sizes(network), next(network.parameters()).element_size()
    depths = ("num_layers", "num_hidden_layers", "encoder_depth", "decoder_depth")
    layers = sum(config.get(name) or 0 for name in depths)
    width = config.get("hidden_size") or 0
    scales = getattr(model, "scales", None)
    at_once = _area(scales[-1]) if scales else min(64, model.num_tokens)
    laws = at_once * (getattr(model, "vocab_size", None) or 2 * config.get("num_bits", 16)) * 8
    cache = model.num_tokens * layers * width * 2 * item
    # Of a scale, all tokens go through the layers at once.
    working = (1 + is_guided) * (cache + 12 * at_once * width * item) + COPIES * laws
    kept = 80.0 * model.num_tokens  # tokens, and Python's lists of when each became final
    if tokenizer is not None and output_type != "latent":
        sizes = _sizes(tokenizer)
        grid = scales[-1] if scales else getattr(model, "grid", None)
        halvings = len(sizes["ch_mult"]) - 1 if sizes.get("ch_mult") else 4
        pixels = (_area(grid) if grid else model.num_tokens) * 4**halvings
        kept += pixels * (3 if output_type == "pil" else 12)
        working += pixels * (12 + 6 * (sizes.get("ch") or 128) * item)
    return ImageMemory(kept, working)


def _sizes(network: Any) -> dict[str, Any]:
    """Of a network of diffusers or of transformers, there those of its language model."""
    config = getattr(network, "config", {})
    found = dict(config) if isinstance(config, Mapping) else config.to_dict()
    return found.get("text_config") or found


def _area(scale: Any) -> int:
    """Tokens of a scale, which is a side or a height and a width."""
    return scale * scale if isinstance(scale, int) else scale[0] * scale[1]


def split(num: int, memory: ImageMemory, device: Any) -> list[slice]:
    """Parts of `num` images that fit into memory, of even size.

    Raises:
        InputError: what is kept of all images would not fit, or a single one would not.
    """
    check_memory(f"{num:,} images in one call", num * memory.kept, "num_images")
    check_memory("one image", memory.working, "the size, or take a dtype of fewer bytes", device)
    parts = -(-num // items_that_fit(memory.working, device))
    size = -(-num // parts)
    return [slice(first, min(num, first + size)) for first in range(0, num, size)]


def draw_parts(
    parts: Sequence[slice],
    draw: Callable[[slice, StepCallback], Samples],
    finish: Callable[[slice, Samples], Any],
    on_step: StepCallback,
) -> tuple[Samples, Any]:
    """Draw part after part.

    Args:
        parts: of the call.
        draw: one of them.
        finish: makes pictures of a part.
        on_step: told of all as of one run.

    Returns:
        All tokens with their statistics, and all pictures. After an interruption the
        images of later parts are as empty as those of an interrupted run.
    """
    passes = finished = 0
    drawn: list[Samples] = []
    pictures = []
    for part in parts:
        if drawn and drawn[-1].stats["interrupted"]:
            samples = _not_begun(drawn[0], part.stop - part.start)
        else:
            samples = draw(part, _onwards(on_step, passes, finished, part, parts[-1].stop))
        passes += samples.stats["forward_passes"]
        finished += sum(samples.stats["lengths"])
        pictures.append(finish(part, samples))
        drawn.append(samples)
    if len(drawn) == 1:
        return drawn[0], pictures[0]
    stats = joined([samples.stats for samples in drawn])
    return Samples(torch.cat([samples.tokens for samples in drawn]), stats), _together(pictures)


def _together(parts: list[Any]) -> Any:
    """The pictures of all parts of a call: lists, arrays or tensors."""
    if isinstance(parts[0], list):
        return [picture for part in parts for picture in part]
    return torch.cat(parts) if isinstance(parts[0], Tensor) else np.concatenate(parts)


def _onwards(
    on_step: StepCallback, passes: int, finished: int, part: slice, total: int
) -> StepCallback:
    """`on_step`, told of a part as of the continuation of those before."""

    def tell(step: int, figures: dict[str, Any]) -> bool:
        whole = figures["total"] // (part.stop - part.start) * total
        now = {"finished": finished + figures["finished"], "total": whole}
        return bool(on_step(passes + step, figures | now))

    return tell


def _not_begun(like: Samples, num: int) -> Samples:
    """Images as an interrupted run leaves those that it did not begin."""
    shape, places = like.tokens.shape[1:], like.tokens.shape[1]
    vectors = (
        None
        if like.embeddings is None
        else like.embeddings[:1].new_zeros(num, *like.embeddings.shape[1:])
    )
    stats = Stats(
        forward_passes=0,
        passes_per_image=[0] * num,
        commit_pass=[[0] * places for _ in range(num)],
        lengths=[0] * num,
        complete=[False] * num,
        interrupted=True,
    )
    return Samples(like.tokens.new_zeros(num, *shape), stats, vectors)


def joined(parts: Sequence[Stats]) -> Stats:
    """The statistics of parts of one call: counts added up, lists behind each other."""
    found = Stats()
    for name, first in parts[0].items():
        values = [stats[name] for stats in parts if name in stats]
        if name in ALIKE:
            found[name] = first
        elif name == "peak_memory":
            found[name] = max((value for value in values if value is not None), default=None)
        elif isinstance(first, list):
            found[name] = list(chain.from_iterable(values))
        elif isinstance(first, bool):
            found[name] = any(values)
        elif isinstance(first, int | float):
            found[name] = sum(values)
        else:
            found[name] = first
    passes = found["passes_per_image"]
    found["tokens_per_pass"] = found["tokens"] * len(passes) / max(1e-9, sum(passes))
    if "acceptance_rate" in found:
        found["acceptance_rate"] = found["accepted"] / max(1, found["drafted"])
    return found
