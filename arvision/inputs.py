"""Prompts and seeds as users write them: one condition and one identity per image."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .contracts import Conditions
from .decoding.noise import parse_seeds
from .errors import InputError, as_integer, check_count, plain_numbers, shown
from .models.conditions import ImagePrompt, each_prompt

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


def check_weights(value: Any) -> Any:
    """Guidance scales as Python writes them: a number, a list, or a list of lists, one for each image.

    Raises:
        InputError: something else, or images with other numbers of weights.
    """
    found = plain_numbers(value)
    is_nested = isinstance(found, (list, tuple)) and any(
        isinstance(plain_numbers(row), (list, tuple)) for row in found
    )
    if not is_nested:
        return check_numbers("guidance_scale", value)
    rows = [check_numbers("guidance_scale", plain_numbers(row)) for row in found]
    lengths = {len(row) if isinstance(row, list) else 0 for row in rows}
    if len(lengths) > 1 or 0 in lengths:
        raise InputError("guidance_scale: expected lists of one length, one list for each image")
    return rows


def parse_schedule(name: str, text: str | None) -> Any:
    """Numbers as they are written: "3" to 3.0, "1,2" to [1.0, 2.0], None to None.

    Raises:
        InputError: something else.
    """
    if text is None:
        return None
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(
            f"{name} {shown(text)}: expected a number, or numbers as in 1,2,3"
        ) from error
    return numbers if len(numbers) > 1 else numbers[0]


def check_images(num_prompts: int, num_images_per_prompt: Any) -> int:
    """Images of each prompt, as many as a call may draw.

    Raises:
        InputError: fewer than one, or more than `MOST_IMAGES` in all.
    """
    num = check_count("num_images", num_images_per_prompt, MOST_IMAGES)
    if num_prompts * num > MOST_IMAGES:
        raise InputError(
            f"{num_prompts:,} prompts with {num:,} images each: expected at most {MOST_IMAGES:,} images "
            "in one call"
        )
    return num


def expand_prompts(prompt: Any, num_images_per_prompt: Any) -> Conditions:
    """One condition per image, images of a prompt side by side.

    Arrays of integers or texts are lists of prompts, arrays of floats are features of a caption
    [T, C] or of several [B, T, C].

    Raises:
        InputError: no prompt, an empty one, or fewer than one image of each.
    """
    prompt = _condition(prompt)
    is_list = isinstance(prompt, (list, tuple, range))
    num_images_per_prompt = check_images(len(prompt) if is_list else 1, num_images_per_prompt)
    prompts = list(prompt) if is_list else [prompt]
    prompts = [each for entry in prompts for each in each_prompt(_condition(entry))]
    if not prompts:
        raise InputError("no prompt: expected at least one")
    for entry in prompts:
        if isinstance(entry, str) and not entry.strip():
            raise InputError("empty prompt: expected a class id, a class name or a caption")
    return [entry for entry in prompts for _ in range(num_images_per_prompt)]


def as_prompts(prompt: Any, negative: Any = None, image: Any = None) -> list[ImagePrompt]:
    """Prompts, negative ones and source images as a call writes them, one object for each prompt.

    Raises:
        InputError: no prompt, an empty one, other numbers of negatives or images than of prompts,
            or what is given twice.
    """
    prompt = torch.from_numpy(prompt) if isinstance(prompt, np.ndarray) else prompt
    is_ids = isinstance(prompt, Tensor) and prompt.dim() == 1
    is_ids |= isinstance(prompt, (list, tuple)) and any(isinstance(one, int) for one in prompt)
    is_one = is_ids or isinstance(prompt, (str, ImagePrompt)) or prompt is None
    prompts = [prompt] if is_one else _listed("prompt", prompt)
    if not prompts:
        raise InputError("no prompt: expected at least one")
    negatives = [negative] * len(prompts)
    if negative is not None and not isinstance(negative, (str, Tensor)):
        negatives = _listed("negative prompt", negative)
    images = [()] * len(prompts)
    if image is not None:
        listed = list(image) if isinstance(image, (list, tuple)) else [image]
        images = [listed] if len(prompts) == 1 and not _is_nested(listed) else listed
        images = [one if isinstance(one, (list, tuple)) else [one] for one in images]
    for noun, given in (("negative prompts", negatives), ("source images", images)):
        if len(given) != len(prompts):
            raise InputError(f"{len(given)} {noun} for {len(prompts)} prompts: expected one each")
    return [
        _joined(one, own or None, pictures)
        for one, own, pictures in zip(prompts, negatives, images, strict=True)
    ]


def _listed(name: str, given: Any) -> list[Any]:
    if isinstance(given, dict) or not hasattr(given, "__iter__"):
        raise InputError(
            f"{name} {str(given)[:80]!r}: expected a text, ids [L], an ImagePrompt or a list of those"
        )
    return list(given)


def _is_nested(images: list[Any]) -> bool:
    return any(isinstance(one, (list, tuple)) for one in images)


def _joined(prompt: Any, negative: Any, images: Sequence[Any]) -> ImagePrompt:
    """One prompt with what a call says beside it."""
    if isinstance(prompt, str) and not prompt.strip():
        raise InputError("empty prompt: expected a text")
    if not isinstance(prompt, ImagePrompt):
        return ImagePrompt(prompt, negative, images)
    for noun, own, given in (
        ("a negative prompt", prompt.negative is not None, negative is not None),
        ("source images", bool(prompt.images), bool(images)),
    ):
        if own and given:
            raise InputError(f"{noun} stands in the prompt and in the call: expected one of them")
    own_negative = negative if prompt.negative is None else prompt.negative
    return ImagePrompt(prompt.prompt, own_negative, prompt.images or images)


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
