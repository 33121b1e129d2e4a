"""Prompts and seeds as users write them: one condition and one identity per image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .contracts import Conditions
from .errors import InputError, check_count


def expand_prompts(prompt: Any, num_images_per_prompt: int) -> Conditions:
    """One condition per image, images of a prompt side by side.

    Raises:
        InputError: no prompt, an empty one, or fewer than one image of each.
    """
    check_count("num_images", num_images_per_prompt)
    prompts = list(prompt) if isinstance(prompt, (list, tuple, range)) else [prompt]
    if not prompts:
        raise InputError("no prompt: expected at least one")
    for entry in prompts:
        if isinstance(entry, str) and not entry.strip():
            raise InputError("empty prompt: expected a class id, a class name or a caption")
    return [entry for entry in prompts for _ in range(num_images_per_prompt)]


def resolve_seeds(
    seed: Any, generator: torch.Generator | Sequence[torch.Generator] | None, num: int
) -> list[tuple[int, int]]:
    """Identity (seed, image) of each of `num` images; see `ARPipeline.__call__`.

    Raises:
        InputError: both a seed and a generator, or lists of another length.
    """
    if seed is not None and generator is not None:
        raise InputError("both seed and generator were given: expected one of them")
    if isinstance(generator, (list, tuple)):
        seed = [_seed_from(one) for one in generator]
    elif seed is None:
        seed = _seed_from(generator)
    if isinstance(seed, int):
        return [(seed, image) for image in range(num)]
    if isinstance(seed, Tensor):
        seed = seed.tolist()
    pairs = [entry if isinstance(entry, tuple) else (entry, 0) for entry in seed]
    if len(pairs) != num:
        raise InputError(f"{len(pairs)} seeds for {num} images: expected one each")
    return pairs


def _seed_from(generator: Any) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))
