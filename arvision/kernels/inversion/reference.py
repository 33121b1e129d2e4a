"""Inversion in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Draw by inversion: the first index whose cumulative mass exceeds its uniform share.

    Args:
        probs: [..., V] non-negative, not necessarily normalised, not all zero.
        uniforms: [...] in (0, 1).

    Returns:
        [...] int64; an index of zero mass is never drawn.
    """
    mass = probs.double().cumsum(dim=-1)
    share = uniforms.double() * mass[..., -1]
    share = torch.minimum(share, torch.nextafter(mass[..., -1], torch.zeros_like(share)))
    return torch.searchsorted(mass, share[..., None], right=True)[..., 0]
