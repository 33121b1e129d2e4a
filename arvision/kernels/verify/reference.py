"""Verification of a window in plain PyTorch, from numbers that are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dispatch import none_left
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


@dataclass(frozen=True)
class Siblings:
    """The drafts tried at one place of every row.

    Attributes:
        tokens: [B, C] int64, in the order in which they are tried.
        valid: [B, C] bool; none in a row that has ended further up.
        target: [B, V] float64, the target's law.
        draft: [B, V] float64, the law that they were drawn from; None for chosen ones.
        uniforms: [B, C] in (0, 1).
    """

    tokens: Tensor
    valid: Tensor
    target: Tensor
    draft: Tensor | None
    uniforms: Tensor


Step = Callable[[Siblings], "tuple[Tensor, Tensor]"]
"""Siblings to which of them is accepted, [B] int64 (-1 for none), and the residual [B, V]."""


def walk(
    drafts: Tensor,
    children: Tensor,
    target_logp: Tensor,
    draft_logp: Tensor | None,
    accept_uniforms: Tensor,
    recover_uniforms: Tensor,
    num_levels: int,
    step: Step,
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk down a tree (or a chain), one place after another, as `step` decides.

    All rows take every step, in fixed shapes and without a read; those that have ended change
    nothing. Arguments and results as in `arvision.kernels.verify.in_turn`.
    """
    num, width = drafts.shape[1], children.shape[-1]
    table = children.expand(len(drafts), -1, -1)
    tokens = drafts.new_zeros(len(drafts), num_levels + 1)
    path = drafts.new_zeros(len(drafts), num_levels)
    counts = torch.ones_like(tokens[:, 0])
    rows = torch.arange(len(drafts), device=drafts.device)
    law = torch.zeros_like(rows)
    going = counts.bool()
    for level in range(num_levels + 1):
        if none_left(going):
            break
        target = target_logp[rows, law].double().exp()
        found = table[rows, law]
        inside = found.clamp(min=0)
        accepted, residual = torch.full_like(rows, -1), target
        if num:
            tried = drafts.gather(1, inside)
            siblings = Siblings(
                tokens=tried.clamp(min=0),
                valid=(found >= 0) & (tried >= 0) & going[:, None],
                target=target,
                draft=None if draft_logp is None else draft_logp[rows, inside[:, 0]].double().exp(),
                uniforms=accept_uniforms[rows, law, :width],
            )
            accepted, residual = step(siblings)
        goes_on = going & (accepted >= 0)
        drawn = draw(residual, recover_uniforms[rows, law])
        counts = torch.where(going, level + 1, counts)
        node = inside.gather(1, accepted.clamp(min=0)[:, None])[:, 0]
        new = drawn
        if num and level < num_levels:
            new = torch.where(goes_on, drafts.gather(1, node[:, None])[:, 0], drawn)
            path[:, level] = torch.where(goes_on, node, path[:, level])
        tokens[:, level] = torch.where(going, new, tokens[:, level])
        law, going = torch.where(goes_on, node + 1, law), goes_on
    return tokens, counts, path


def _subtract(left: Tensor, taken: Tensor, where: Tensor) -> Tensor:
    """norm(max(left - taken, 0)) [B, V] in rows `where`; an empty residual leaves what was."""
    residual = (left - taken).clamp(min=0)
    total = residual.sum(-1, keepdim=True)
    changed = where[:, None] & (total > 0)
    return torch.where(changed, residual / total.where(total > 0, 1.0), left)


def in_turn(
    siblings: Siblings,
    replaces: bool,
    lend: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Try siblings one after another; `replaces` says whether q keeps the ones tried.

    `lend` says what each borrows beyond its own probability (lossy), see `arvision.decoding.relaxed.Lend`.
    """
    left, draft = siblings.target, siblings.draft
    accepted = torch.full_like(siblings.tokens[:, 0], -1)
    for place in range(siblings.tokens.shape[1]):
        token = siblings.tokens[:, place : place + 1]
        is_tried = siblings.valid[:, place] & (accepted < 0)
        probability = left.gather(1, token)[:, 0]
        uniform = siblings.uniforms[:, place]
        point = torch.zeros_like(left).scatter_(1, token, 1.0) if draft is None else None
        q = draft if point is None else point
        assert q is not None
        if lend is not None:
            probability = probability + lend(left, q, token[:, 0])
        passes = is_tried & (uniform * q.gather(1, token)[:, 0] < probability)
        accepted = accepted.where(~passes, place)
        fails = is_tried & ~passes
        left = _subtract(left, q, fails)
        if draft is not None and not replaces:
            without = draft.scatter(1, token, 0.0)
            total = without.sum(-1, keepdim=True)
            draft = torch.where(fails[:, None], without / total.where(total > 0, 1.0), draft)
    return accepted, left
