"""The one place where logits become probabilities: `Shaping`, whose rule stands beside its kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..contracts import Schedule
from ..errors import InputError
from ..kernels.sampling import Shaping, guide

__all__ = ["Shaping", "check_guidance_scale", "guide", "joined_scales", "per_scale", "shape_rows"]


def check_guidance_scale(scale: Any) -> None:
    """Refuse a guidance scale below 0, or one that is not a finite number.

    Raises:
        InputError: see above.
    """
    if isinstance(scale, (str, Sequence)):
        raise InputError(
            f"guidance_scale {scale!r}: expected a number >= 0; only scale models take a list, one "
            "number for each scale"
        )
    if not 0 <= scale < float("inf"):
        raise InputError(f"guidance_scale {scale}: expected a number >= 0")


def joined_scales(own: Any, num: int, other: Any, others: int, like: Tensor) -> Any:
    """The guidance scale of two groups of images: a number where all have the same, else [B, 1, 1].

    Args:
        own: a number, or [num, 1, 1].
        num: images of the first group.
        other: likewise of the second.
        others: images of the second group.
        like: whose dtype and device the weights take.
    """
    if not isinstance(own, Tensor) and not isinstance(other, Tensor) and own == other:
        return own
    parts = [
        torch.as_tensor(scale, dtype=like.dtype, device=like.device).expand(count, 1, 1)
        for scale, count in ((own, num), (other, others))
    ]
    return torch.cat(parts)


def shape_rows(logits: Tensor, shapings: Sequence[Shaping]) -> Tensor:
    """Each row's own law.

    Args:
        logits: [B, ..., V], guided.
        shapings: one per row.

    Returns:
        Log-probabilities [B, ..., V], in each row those of its shaping alone.
    """
    groups: dict[Shaping, list[int]] = {}
    for row, shaping in enumerate(shapings):
        groups.setdefault(shaping, []).append(row)
    if len(groups) == 1:
        return next(iter(groups))(logits)
    laws = torch.empty_like(logits, dtype=torch.promote_types(logits.dtype, torch.float32))
    for shaping, rows in groups.items():
        laws[rows] = shaping(logits[rows])
    return laws


def per_scale(name: str, value: Schedule, num_scales: int) -> list[float]:
    """One number >= 0 for each scale.

    Args:
        name: of the option, for messages.
        value: a number for all scales, or a list.
        num_scales: of the model.

    Raises:
        InputError: a list of another length, or an entry that is no number >= 0.
    """
    listed: list[float] = list(value) if isinstance(value, Sequence) else [value] * num_scales
    if len(listed) != num_scales:
        raise InputError(
            f"{name} of {len(listed)} numbers: expected one number, or {num_scales}, one for each "
            "scale"
        )
    for entry in listed:
        if not isinstance(entry, (int, float)) or not 0 <= entry < float("inf"):
            raise InputError(f"{name} {entry!r}: expected a number >= 0")
    return listed
