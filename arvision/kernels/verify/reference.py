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


def follow(
    drafts: Tensor,
    choice: Tensor,
    tree: tuple[Tensor, Tensor, Tensor] | None,
    num_levels: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `arvision.kernels.verify.follow`."""
    if tree is None:
        return choice, first_change(drafts, choice), None
    laws, depths, bits = tree
    passes = (drafts == choice.gather(1, laws.expand(drafts.shape))) & (drafts >= 0)
    order = torch.arange(drafts.shape[1], device=drafts.device)
    ancestors = ((bits[..., None] >> order) & 1) != 0
    return walk_down(drafts, choice, passes, ancestors, depths, num_levels)


def walk_down(
    drafts: Tensor,
    choice: Tensor,
    passes: Tensor,
    ancestors: Tensor,
    depths: Tensor,
    num_levels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The longest path of drafts that all pass, and the token chosen where it ends.

    Args:
        drafts: [B, m].
        choice: [B, m + 1], the token that follows each place if the path ends there.
        passes: [B, m] bool.
        ancestors: [m, m] or [B, m, m] bool, each draft's and itself.
        depths: [m] or [B, m].
        num_levels: at least the largest depth plus one.
    """
    batch, num = passes.shape
    if num == 0:
        return choice, torch.ones_like(choice[:, 0]), choice[:, :0]
    reached = ~(ancestors & ~passes[:, None]).any(-1)
    counts, last = ((depths + 1) * reached).max(dim=1)
    own = ancestors.expand(batch, num, num)
    on_path = own[torch.arange(batch, device=last.device), last] & (counts > 0)[:, None]
    # The places of a path, in order, are the ancestors of its last one, sorted by depth.
    path = choice.new_zeros(batch, num_levels + 1)
    depth = torch.where(on_path, depths, num_levels)
    path.scatter_(1, depth, torch.arange(num, device=depth.device).expand_as(depth))
    path = path[:, :num_levels]
    end = torch.where(counts > 0, last + 1, 0)[:, None]
    tokens = torch.cat([drafts.gather(1, path), choice[:, :1]], dim=1)
    tokens = tokens.scatter(1, counts[:, None], choice.gather(1, end))
    return tokens, counts + 1, path


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
