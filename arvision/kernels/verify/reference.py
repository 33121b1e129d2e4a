"""Verification of a window in plain PyTorch, from numbers that are given."""

from __future__ import annotations

import torch
from torch import Tensor

from ..inversion import draw


def verify(
    drafts: Tensor,
    draft_logp: Tensor,
    target_logp: Tensor,
    accept_uniforms: Tensor,
    recover_uniforms: Tensor,
    fresh_uniforms: Tensor,
    coupling: str,
) -> tuple[Tensor, Tensor]:
    """See `arvision.kernels.verify.verify`."""
    window = drafts.shape[1]
    # "maximal" reads the last one only: the bonus.
    first = window if coupling == "maximal" else 0
    fresh = draw(target_logp[:, first:].exp(), fresh_uniforms[:, first:])
    if window == 0:
        return fresh, torch.ones_like(fresh[:, 0])
    ratio = log_ratio(drafts, draft_logp, target_logp)
    accepted = (accept_uniforms.log() < ratio) & (drafts >= 0)
    recovered = recover(drafts, draft_logp, target_logp, recover_uniforms)
    if coupling == "maximal":
        tokens = torch.where(accepted, drafts, recovered)
        tokens = torch.cat([tokens, fresh], dim=1)
        return tokens, first_change(drafts, tokens)
    accepted = accepted.long().cumprod(dim=1)
    counts = accepted.sum(dim=1) + 1
    is_first = torch.arange(window, device=counts.device) == counts[:, None] - 1
    tokens = torch.where(is_first & (drafts >= 0), recovered, fresh[:, :-1])
    tokens = torch.where(accepted.bool(), drafts, tokens)
    return torch.cat([tokens, fresh[:, -1:]], dim=1), counts


def verify_gumbel(drafts: Tensor, target_logp: Tensor, gumbel: Tensor) -> tuple[Tensor, Tensor]:
    """See `arvision.kernels.verify.verify_gumbel`."""
    tokens = (target_logp + gumbel).argmax(-1)
    return tokens, first_change(drafts, tokens)


def log_ratio(drafts: Tensor, draft_logp: Tensor, target_logp: Tensor) -> Tensor:
    """log p(x) - log q(x) of the drafts, [B, m]; -inf where the target rules a draft out."""
    index = drafts.clamp(min=0)[..., None]
    return (target_logp[:, :-1].gather(-1, index) - draft_logp.gather(-1, index))[..., 0]


def recover(drafts: Tensor, draft_logp: Tensor, target_logp: Tensor, uniforms: Tensor) -> Tensor:
    """A draw from the normalised (p - q)+ at every draft, [B, m]; from p where a row has none (-1).

    Where the two laws are the same the residual is empty and a rejection has probability zero; p
    stands in, so that nothing divides by zero.
    """
    target = target_logp[:, :-1].exp()
    residual = (target - draft_logp.exp()).clamp(min=0)
    empty = residual.sum(-1, keepdim=True) <= 0
    return draw(torch.where(empty | (drafts < 0)[..., None], target, residual), uniforms)


def first_change(drafts: Tensor, tokens: Tensor) -> Tensor:
    """How many of `tokens` [B, m + 1] are final, [B]: through the first that differs from its draft.

    The token that takes the place of a draft is itself final, and so is the bonus.
    """
    return (tokens[:, :-1] == drafts).long().cumprod(dim=1).sum(dim=1) + 1
