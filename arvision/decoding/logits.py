"""The one place where logits become probabilities: `Shaping`, whose rule stands beside its kernel."""

from __future__ import annotations

from ..errors import InputError
from ..kernels.sampling import Shaping, guide

__all__ = ["Shaping", "check_guidance_scale", "guide"]


def check_guidance_scale(scale: float) -> None:
    """Refuse a guidance scale below 0, or one that is not a finite number.

    Raises:
        InputError: see above.
    """
    if not 0 <= scale < float("inf"):
        raise InputError(f"guidance_scale {scale}: expected a number >= 0")
