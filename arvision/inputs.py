"""Prompts and seeds as users write them: one condition and one identity per image."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .contracts import Conditions
from .decoding.noise import parse_seeds
from .errors import InputError, as_integer, check_count, plain_numbers, shown

MOST_IMAGES = 1_000_000
"""Images of one call, all of whose pictures it returns; `arvision.evaluate` writes more to the disk."""


def check_numbers(name: str, value: Any, is_whole: bool = False, is_one: bool = False) -> Any:
    """A finite number >= 0, or a list of them for each scale, as Python writes it.

    Args:
        name: of the argument, for messages.
        value: of Python, NumPy or torch; arrays of one element count as a number.
        is_whole: whether it must be an integer, such as 2 or 2.0, and no list.
        is_one: whether it must be no list.

    Raises:
        InputError: anything else.
    """
    found = plain_numbers(value)
    if isinstance(found, list) and not isinstance(value, list) and len(found) == 1:
        found = found[0]
    if is_whole:
        number = as_integer(found)
        if number is None or number < 0:
            raise InputError(f"{name} {value!r}: expected an integer >= 0")
        return number
    listed = found if isinstance(found, (list, tuple)) and not is_one else [found]
    plain = [plain_numbers(entry) for entry in listed]
    for entry in plain:
        is_number = isinstance(entry, (int, float)) and not isinstance(entry, bool)
        if not is_number or not 0 <= entry <= sys.float_info.max:
            raise InputError(f"{name} {shown(entry)}: expected a number >= 0")
    return plain if isinstance(found, (list, tuple)) else plain[0]


def expand_prompts(prompt: Any, num_images_per_prompt: Any) -> Conditions:
    """One condition per image, images of a prompt side by side.

    Arrays of integers or texts are lists of prompts, arrays of floats are features of one.

    Raises:
        InputError: no prompt, an empty one, or fewer than one image of each.
    """
    num_images_per_prompt = check_count("num_images", num_images_per_prompt, MOST_IMAGES)
    prompt = _condition(prompt)
    if (
        isinstance(prompt, (list, tuple, range))
        and len(prompt) * num_images_per_prompt > MOST_IMAGES
    ):
        raise InputError(
            f"{len(prompt):,} prompts with {num_images_per_prompt:,} images each: expected at most "
            f"{MOST_IMAGES:,} images in one call"
        )
    prompts = list(prompt) if isinstance(prompt, (list, tuple, range)) else [prompt]
    prompts = [_condition(entry) for entry in prompts]
    if not prompts:
        raise InputError("no prompt: expected at least one")
    for entry in prompts:
        if isinstance(entry, str) and not entry.strip():
            raise InputError("empty prompt: expected a class id, a class name or a caption")
    return [entry for entry in prompts for _ in range(num_images_per_prompt)]


def _condition(prompt: Any) -> Any:
    """Numbers and texts of NumPy and torch as Python's, float arrays as features (a tensor)."""
    if isinstance(prompt, Tensor):
        return prompt if prompt.is_floating_point() and prompt.dim() else prompt.tolist()
    if type(prompt).__module__ != "numpy" or not hasattr(prompt, "dtype"):
        return prompt
    if prompt.dtype.kind == "f" and prompt.ndim:
        return torch.from_numpy(prompt)
    return prompt.tolist()


def resolve_seeds(
    seed: Any, generator: torch.Generator | Sequence[torch.Generator] | None, num: int
) -> list[tuple[int, int]]:
    """Identity (seed, image) of each of `num` images; see `ARPipeline.__call__`.

    Raises:
        InputError: both a seed and a generator, lists of another length, or what is no seed.
    """
    if seed is not None and generator is not None:
        raise InputError("both seed and generator were given: expected one of them")
    if isinstance(generator, (list, tuple)):
        seed = [_seed_from(one) for one in generator]
    elif seed is None:
        seed = _seed_from(generator)
    is_array = not isinstance(seed, (list, tuple))
    seed = plain_numbers(seed)
    if isinstance(seed, range) and len(seed) != num:
        raise InputError(f"{len(seed):,} seeds for {num:,} images: expected one each")
    if not isinstance(seed, (list, tuple, range)):
        if as_integer(seed) is None:
            raise InputError(f"seed {seed!r}: expected an integer, or one for each image")
        return parse_seeds([(seed, image) for image in range(num)])
    if is_array:  # rows of an array [B, 2] are pairs
        seed = [tuple(entry) if isinstance(entry, list) else entry for entry in seed]
    if len(seed) != num:
        raise InputError(f"{len(seed)} seeds for {num} images: expected one each")
    return parse_seeds(list(seed))


def _seed_from(generator: Any) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))
