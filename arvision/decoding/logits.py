"""The one place where logits become probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..contracts import Schedule
from ..errors import InputError
from ..kernels import sampling


def guide(conditional: Tensor, null: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance: null + scale * (conditional - null), any shape.

    Paper: Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, applied to logits as the
    official LlamaGen sampler does.
    """
    return null + scale * (conditional - null)


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


@dataclass(frozen=True, kw_only=True)
class Shaping:
    """How logits become the law that tokens are drawn from.

    Attributes:
        temperature: divides the logits; 0 leaves the most likely token only.
        top_k: keep the k most likely tokens (and ties with the last of them); 0 keeps all.
        top_p: keep the fewest most likely tokens that reach this mass; 1 keeps all.

    Raises:
        InputError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.temperature, Sequence) or not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature {self.temperature}: expected a number >= 0")
        if self.top_k < 0 or int(self.top_k) != self.top_k:
            raise InputError(f"top_k {self.top_k}: expected an integer >= 0 (0 keeps all)")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p}: expected 0 < top_p <= 1 (1 keeps all)")

    def __call__(self, logits: Tensor) -> Tensor:
        """Guided logits [..., V] to log-probabilities [..., V]; see `shape_logits`."""
        return shape_logits(
            logits, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p
        )


def shape_logits(
    logits: Tensor,
    *,
    null_logits: Tensor | None = None,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """Guidance, temperature, top-k, top-p, in this order, then normalisation.

    Args:
        logits: [..., V]; conditional ones where `null_logits` is given, else already guided.
        null_logits: [..., V] of the null condition.
        guidance_scale: weight of the conditional logits.
        temperature: divides the logits; 0 leaves the most likely token only.
        top_k: tokens kept, ties with the last of them included; 0 for all.
        top_p: mass kept; the token that crosses the threshold stays.

    Returns:
        Log-probabilities [..., V], -inf where a token was cut; float32, or float64 for
        float64 logits.
    """
    rows, size = math.prod(logits.shape[:-1]), logits.shape[-1]
    law = sampling.shape(
        logits.reshape(rows, size),
        null_logits=None if null_logits is None else null_logits.reshape(rows, size),
        guidance_scale=guidance_scale,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    return law.view(logits.shape)
