"""What a call gives of its pictures: an image and a mask, tokens, or scales, as tokens that are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d, pad

from .contracts import Encodes, is_causal
from .decoding.given import Given
from .errors import InputError, check_count
from .models.pixels import pixels_of


@dataclass(frozen=True)
class Edit:
    """Given tokens of all images of a call.

    Attributes:
        given: the tokens.
        pixels: [B, 3, H, W] in [-1, 1], the source of each image, where `redrawn` is to be pasted
            into it; None for pictures as they are decoded.
        redrawn: [B, H, W] bool, the mask.
    """

    given: Given
    pixels: Tensor | None = None
    redrawn: Tensor | None = None

    def split(self, parts: Sequence[slice]) -> list[slice]:
        """Parts whose images are given as many tokens each."""
        nums, found = self.given.nums, []
        for part in parts:
            first = part.start
            for image in range(part.start + 1, part.stop + 1):
                if image == part.stop or nums[image] != nums[first]:
                    found.append(slice(first, image))
                    first = image
        return found

    def paste(self, pixels: Tensor, part: slice) -> Tensor:
        """Decoded pixels [B, 3, H, W] of a part, outside of the mask those of the source."""
        if self.pixels is None or self.redrawn is None:
            return pixels
        mask = self.redrawn[part, None].to(pixels.device)
        return torch.where(mask, pixels, self.pixels[part].to(pixels))


def read_edit(
    model: Any,
    num_prompts: int,
    num_images: int,
    *,
    image: Any = None,
    mask_image: Any = None,
    known_tokens: Any = None,
    known_scales: int | None = None,
    blend: bool = False,
) -> Edit | None:
    """What the arguments of a call give; None where it is nothing.

    Args:
        model: of the call.
        num_prompts: of the call.
        num_images: of the call, all prompts together.
        image: see `arvision.ARPipeline.__call__`, like the others.
        mask_image: likewise.
        known_tokens: likewise.
        known_scales: likewise.
        blend: likewise.

    Raises:
        InputError: arguments that do not go together, or that the model cannot take.
    """
    if known_tokens is not None:
        for name, value in {"image": image, "mask_image": mask_image}.items():
            if value is not None:
                raise InputError(f"known_tokens and {name} were given: expected one of them")
        if known_scales is not None:
            raise InputError("known_scales tells what is kept of an image: expected one")
        if blend:
            raise InputError("blend without image and mask_image: there is nothing to paste into")
        values, mask = _read_tokens(model, known_tokens)
        return Edit(Given(*_each(values, mask, num_prompts, num_images, "known_tokens")))
    if image is None:
        for name, value in {"mask_image": mask_image, "known_scales": known_scales}.items():
            if value is not None:
                raise InputError(f"{name} without image: expected both")
        if blend:
            raise InputError("blend without image and mask_image: there is nothing to paste into")
        return None
    scales = getattr(model, "scales", None)
    if mask_image is None and known_scales is None:
        more = ", or known_scales, how many scales of it are kept" if scales else ""
        raise InputError(f"image without mask_image: expected a mask (white is redrawn){more}")
    if blend and mask_image is None:
        raise InputError("blend without mask_image: nothing of the image stays as it is")
    if not isinstance(model, Encodes):
        raise InputError(
            f"image: {type(model).__name__} has no tokenizer that encodes pictures, expected none"
        )
    size = model.picture_size
    pixels = pixels_of(image, size=size)
    redrawn = None if mask_image is None else _read_mask(mask_image, size)
    mask = _cells(model, redrawn, len(pixels), known_scales)
    tokens = model.tokens_of(pixels)
    if len(mask) == 1 < len(tokens):
        mask = mask.expand(len(tokens), -1)
    if len(tokens) == 1 < len(mask):
        tokens, pixels = (
            tokens.expand(len(mask), *tokens.shape[1:]),
            pixels.expand(len(mask), -1, -1, -1),
        )
    if len(tokens) != len(mask):
        raise InputError(
            f"{len(mask)} masks for {len(tokens)} images: expected one for all, or one each"
        )
    _check_mask(mask)
    given = Given(*_each(tokens, mask.to(tokens.device), num_prompts, num_images, "image"))
    if not blend or redrawn is None:
        return Edit(given)
    pasted = _each(pixels, redrawn.expand(len(pixels), -1, -1), num_prompts, num_images, "image")
    return Edit(given, *pasted)


def check_parts(edit: Edit | None, model: Any, kind: str, parts: list[slice]) -> list[slice]:
    """Parts of a call: latents of any order are drawn together where as many are given of each."""
    if edit is None or kind != "continuous" or is_causal(model):
        return parts
    return edit.split(parts)


def _each(
    values: Tensor, mask: Tensor, num_prompts: int, num_images: int, name: str
) -> tuple[Tensor, Tensor]:
    """One for each image of a call: of one for all, one for each prompt, or one for each image.

    Raises:
        InputError: another number.
    """
    num = len(values)
    if num not in (1, num_prompts, num_images):
        counts = {1: "one", num_prompts: f"one for each of {num_prompts} prompts"}
        counts[num_images] = f"one for each of {num_images} images"
        raise InputError(f"{name} of {num} pictures: expected {', or '.join(counts.values())}")
    times = num_images // num
    return values.repeat_interleave(times, 0), mask.repeat_interleave(times, 0)


def _sizes(model: Any) -> list[tuple[int, int]]:
    """Rows and columns of the tokens, of each scale.

    Raises:
        InputError: a model whose tokens are no grid.
    """
    scales = getattr(model, "scales", None)
    if scales is not None:
        return [(size, size) if isinstance(size, int) else tuple(size) for size in scales]
    if model.grid is None:
        raise InputError(
            f"mask_image: the tokens of {type(model).__name__} are no single grid, expected none"
        )
    return [tuple(model.grid)]


def _cells(model: Any, redrawn: Tensor | None, num: int, known_scales: int | None) -> Tensor:
    """[B, N] bool, the tokens that are kept.

    A token is drawn anew where the mask touches what it covers; of the first `known_scales` scales
    none is. Without a mask all of the others are.
    """
    sizes, scales = _sizes(model), getattr(model, "scales", None)
    if known_scales is not None and scales is None:
        raise InputError(f"known_scales {known_scales!r}: this model has no scales, expected none")
    if known_scales is not None:
        check_count("known_scales", known_scales, len(sizes) - 1)
    parts = []
    for number, size in enumerate(sizes):
        if known_scales is not None and number < known_scales:
            kept = torch.ones(num if redrawn is None else len(redrawn), *size, dtype=torch.bool)
        elif redrawn is None:
            kept = torch.zeros(num, *size, dtype=torch.bool)
        else:
            kept = adaptive_max_pool2d(redrawn[:, None].float(), size)[:, 0] == 0
        parts.append(kept.flatten(1))
    return torch.cat(parts, dim=1)


def _check_mask(mask: Tensor) -> None:
    """Refuse masks [B, N] that keep all tokens of an image or none."""
    for row in mask:
        if bool(row.all()):
            raise InputError(
                "mask_image keeps the whole image: expected some white, where it is redrawn"
            )
        if not bool(row.any()):
            raise InputError(
                "mask_image touches every token, so that nothing of the image is kept: expected more "
                "black, or a call without image and mask_image"
            )


def _read_mask(masks: Any, size: tuple[int, int]) -> Tensor:
    """[B, H, W] bool, true where a picture is redrawn.

    Raises:
        InputError: something else than pictures, arrays and tensors, or another size.
    """
    listed = masks if isinstance(masks, (list, tuple)) else [masks]
    if not listed:
        raise InputError("no masks: expected at least one")
    parts = [_mask(mask) for mask in listed]
    for part in parts:
        if tuple(part.shape[1:]) != size:
            height, width = part.shape[1:]
            raise InputError(
                f"mask_image of {height}x{width} pixels: expected {size[0]}x{size[1]}, the image's "
                "height and width"
            )
    return torch.cat(parts)


def _mask(mask: Any) -> Tensor:
    """One mask or a batch as [B, H, W] bool; white is from the middle of the range on."""
    if hasattr(mask, "convert"):
        mask = np.array(mask.convert("L"))
    mask = torch.from_numpy(np.ascontiguousarray(mask)) if isinstance(mask, np.ndarray) else mask
    if not isinstance(mask, Tensor):
        raise InputError(
            f"mask_image of type {type(mask).__name__}: expected a PIL image, an array or a tensor"
        )
    shape = tuple(mask.shape)
    for axis in (1, 3) if mask.dim() == 4 else ():
        if mask.dim() == 4 and mask.shape[axis] == 1:
            mask = mask.squeeze(axis)
    mask = mask[None] if mask.dim() == 2 else mask
    if mask.dim() != 3:
        raise InputError(f"mask_image {shape}: expected [H, W], [B, H, W] or [B, 1, H, W]")
    mask = mask.cpu()
    if mask.dtype == torch.bool:
        return mask
    if mask.dtype == torch.uint8:
        return mask >= 128
    if not mask.is_floating_point() or not bool(((mask >= 0) & (mask <= 1)).all()):
        raise InputError("mask_image: expected booleans, uint8 in 0..255, or float in [0, 1]")
    return mask >= 0.5


def _read_tokens(model: Any, tokens: Any) -> tuple[Tensor, Tensor]:
    """Values [B, N, ...] and mask [B, N] of tokens as a call writes them.

    Raises:
        InputError: another shape, or tokens out of range.
    """
    found = torch.as_tensor(tokens).cpu()
    entry = _entry(model)
    if found.dim() == 1 + len(entry):
        found = found[None]
    num = model.num_tokens
    fits = found.dim() == 2 + len(entry) and tuple(found.shape[2:]) == entry
    if not fits or not 1 <= found.shape[1] <= num:
        inner = "".join(f", {side}" for side in entry)
        raise InputError(
            f"known_tokens {tuple(found.shape)}: expected [n{inner}] or [B, n{inner}] with n <= {num}"
        )
    is_latent = not hasattr(model, "vocab_size")
    if is_latent != found.is_floating_point():
        wanted = (
            "float latents, NaN where one is drawn"
            if is_latent
            else "integers, -1 where one is drawn"
        )
        raise InputError(f"known_tokens of type {found.dtype}: expected {wanted}")
    missing = [0, 0] * len(entry) + [0, num - found.shape[1]]
    if is_latent:
        found = pad(found.float(), missing, value=float("nan"))
        return found, ~found.isnan().any(-1)
    found = pad(found.long(), missing, value=-1)
    if bool(((found < -1) | (found >= model.vocab_size)).any()):
        raise InputError(
            f"known_tokens: expected 0..{model.vocab_size - 1}, or -1 where one is drawn"
        )
    return found, (found >= 0).flatten(2).all(-1) if entry else found >= 0


def _entry(model: Any) -> tuple[int, ...]:
    """Shape of one token."""
    if getattr(model, "num_bits", None):
        return (model.num_bits,)
    return () if hasattr(model, "vocab_size") else (model.head.latent_dim,)
