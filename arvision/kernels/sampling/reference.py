"""Shaping and drawing in plain PyTorch, by sorting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..inversion import draw
from ..philox.reference import philox4x32


def shape(
    logits: Tensor,
    null_logits: Tensor | None,
    guidance_scale: float,
    temperature: float,
    top_k: int,
    top_p: float,
) -> Tensor:
    """See `arvision.kernels.sampling.shape`."""
    if null_logits is not None:
        logits = null_logits + guidance_scale * (logits - null_logits)
    if logits.dtype != torch.float64:
        logits = logits.float()
    if temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.full_like(logits, float("-inf")).scatter_(-1, best, 0.0)
    if temperature != 1.0:
        logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probs = ordered.softmax(dim=-1)
        beyond = probs.cumsum(dim=-1) - probs >= top_p
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))
    return logits.log_softmax(dim=-1)


def sample_gumbel(identity: Tensor, use: int, **law: Any) -> Tensor:
    """See `arvision.kernels.sampling.sample_gumbel`."""
    logp = shape(**law)
    size = logp.shape[1]
    lanes = torch.arange(-(-size // 4), device=logp.device)
    low, high, image, position = (word[:, None] for word in identity.unbind(1))
    last = torch.tensor(use & 0xFFFFFFFF, device=logp.device)
    words = philox4x32((image, position, lanes, last), (low, high)).flatten(1)[:, :size]
    gumbel = -(-((words.double() + 0.5) * 2.0**-32).log()).log()
    return (logp + gumbel.to(logp.dtype)).argmax(dim=1)


def sample_inverse(uniforms: Tensor, **law: Any) -> Tensor:
    """See `arvision.kernels.sampling.sample_inverse`."""
    return draw(shape(**law).exp(), uniforms)
