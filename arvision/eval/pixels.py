"""Pixels as evaluation sees them: uint8 [B, 3, H, W], and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, unknown_name

ROUNDINGS = ("round", "truncate", "llamagen", "mar")


def check_images(images: Any, name: str = "images") -> Tensor:
    """`images` if it is a uint8 tensor [B, 3, H, W] (or [B, 1, H, W]).

    Raises:
        InputError: another type, dtype, rank or channel count.
    """
    if not isinstance(images, Tensor):
        raise InputError(
            f"{name} is a {type(images).__name__}: expected a uint8 tensor [B, 3, H, W]"
        )
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise InputError(f"{name} has shape {list(images.shape)}: expected [B, 3, H, W]")
    if images.dtype != torch.uint8:
        hint = " (arvision.eval.to_uint8 converts, with a stated rounding)"
        raise InputError(f"{name} has dtype {images.dtype}: expected torch.uint8{hint}")
    return images


def to_uint8(images: Tensor, rounding: str = "round", value_range: str = "unit") -> Tensor:
    """Float pixels to bytes, by a rounding that has a name.

    Args:
        images: float [B, C, H, W], in [0, 1] ("unit") or [-1, 1] ("signed").
        rounding: with x in [-1, 1]: "round" is round(127.5 x + 127.5), "truncate" the same
            without rounding, "llamagen" clamp(127.5 x + 128, 0, 255) truncated, and "mar"
            round(clip(255 (x + 1) / 2)), which equals "round" except for clipping first.
        value_range: "unit" or "signed".

    Returns:
        uint8 of the same shape.

    Raises:
        InputError: an integer tensor, a value that is not finite, an unknown rounding or range.
    """
    if rounding not in ROUNDINGS:
        raise unknown_name("rounding", rounding, ROUNDINGS)
    if value_range not in ("unit", "signed"):
        raise unknown_name("value range", value_range, ("unit", "signed"))
    if not images.is_floating_point():
        raise InputError(f"images have dtype {images.dtype}: expected a float dtype")
    if not bool(torch.isfinite(images).all()):
        raise InputError("images hold NaN or infinite values: expected finite pixels")
    pixels = images.float()
    scaled = pixels * 255.0 if value_range == "unit" else pixels * 127.5 + 127.5
    if rounding == "llamagen":
        scaled = scaled + 0.5
    scaled = scaled.clamp(0.0, 255.0)
    if rounding in ("round", "mar"):
        scaled = scaled.round()
    return scaled.to(torch.uint8)
