"""How logits become a law, in plain PyTorch: guidance, temperature, top-k, top-p, and a draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from .. import dispatch
from ..inversion import draw
from ..philox.reference import philox4x32


@dataclass(frozen=True, kw_only=True)
class Shaping:
    """How logits become the law that tokens are drawn from.

    Attributes:
        temperature: divides the logits; 0 leaves the most likely token only.
        top_k: keep the k most likely tokens (and ties with the last of them); 0 keeps all.
        top_p: keep the fewest most likely tokens that reach this mass, the one that crosses it
            included; 1 keeps all.

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

    def __call__(
        self, logits: Tensor, null_logits: Tensor | None = None, guidance_scale: float = 1.0
    ) -> Tensor:
        """Guidance, temperature, top-k, top-p, in this order, then normalisation.

        Args:
            logits: [..., V]; conditional ones where `null_logits` is given, else already guided.
            null_logits: [..., V] of the null condition.
            guidance_scale: weight of the conditional logits.

        Returns:
            Log-probabilities [..., V], -inf where a token was cut; float32, or float64 for float64
            logits. A row with NaN, with +inf or without a finite logit is NaN.
        """
        if dispatch.stays(logits):
            dispatch.LAST["sampling"] = dispatch.ON_CPU
            return shape(logits, self, null_logits, guidance_scale)
        from . import shape as dispatched

        rows = logits.flatten(0, -2) if logits.dim() > 1 else logits[None]
        null = None if null_logits is None else null_logits.reshape(rows.shape)
        return dispatched(rows, self, null, guidance_scale).view(logits.shape)


def guide(conditional: Tensor, null: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance: null + scale * (conditional - null), any shape.

    Paper: Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, applied to logits as the
    official LlamaGen sampler does.
    """
    if isinstance(scale, Tensor):
        return null + scale * (conditional - null)
    return (conditional - null).mul_(scale).add_(null)


def shape(
    logits: Tensor,
    how: Shaping,
    null_logits: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
) -> Tensor:
    """See `Shaping.__call__`."""
    if null_logits is not None:
        logits = guide(logits, null_logits, guidance_scale)
    if logits.dtype != torch.float64:
        logits = logits.float()
    if how.temperature == 0:
        best, index = logits.max(dim=-1, keepdim=True)
        law = torch.full_like(logits, float("-inf")).scatter_(-1, index, 0.0)
        return law + (best - best)  # NaN where the largest logit is none
    if how.temperature != 1.0:
        logits = logits / how.temperature
    if 0 < how.top_k < logits.shape[-1]:
        smallest = logits.topk(how.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if how.top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probs = ordered.softmax(dim=-1)
        beyond = probs.cumsum(dim=-1) - probs >= how.top_p
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))
    return logits.log_softmax(dim=-1)


def sample_gumbel(
    logits: Tensor,
    identity: Tensor,
    how: Shaping,
    use: int,
    null_logits: Tensor | None,
    guidance_scale: float,
) -> Tensor:
    """See `arvision.kernels.sampling.sample_gumbel`."""
    logp = shape(logits, how, null_logits, guidance_scale)
    numbers = gumbel(identity[:, :3], identity[:, 3:], logp.shape[1], use)[:, 0]
    return (logp + numbers.to(logp.dtype)).argmax(dim=1)


def gumbel(words: Tensor, positions: Tensor, size: int, use: int = 0) -> Tensor:
    """Gumbel numbers [B, T, V] float64 of images `words` [B, 3] at positions [B, T]."""
    lanes = torch.arange(-(-size // 4), device=words.device)
    low, high, image = (word[:, None, None] for word in words.unbind(1))
    last = torch.tensor(use & 0xFFFFFFFF, device=words.device)
    bits = philox4x32((image, positions[..., None], lanes, last), (low, high)).flatten(2)
    return -(-((bits[..., :size].double() + 0.5) * 2.0**-32).log()).log()


def draw_gumbel(logp: Tensor, words: Tensor, positions: Tensor) -> Tensor:
    """See `arvision.kernels.sampling.draw_gumbel`."""
    return (logp + gumbel(words, positions, logp.shape[2]).to(logp.dtype)).argmax(-1)


def sample_inverse(
    logits: Tensor,
    uniforms: Tensor,
    how: Shaping,
    null_logits: Tensor | None,
    guidance_scale: float,
) -> Tensor:
    """See `arvision.kernels.sampling.sample_inverse`."""
    return draw(shape(logits, how, null_logits, guidance_scale).exp(), uniforms)
