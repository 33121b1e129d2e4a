"""Rejection sampling over trees: siblings are tried in turn against what is left of the target's law.

At each place of the tree r is what is left of the target's law p: at first p itself, after each
rejected sibling the normalised residual. Where no sibling is accepted the recovered token is a draw
from r. The walk then ends, else it goes on behind the accepted sibling.

With drafts that were chosen and not drawn (`Round.draft_logp` is None) q is a point mass: sibling x
is accepted with probability r(x), and its residual is r without x. All rules agree then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .noise import draw
from .tree import none_left, topology
from .verify import Round, Rule, Verdict


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


def walk(batch: Round, step: Step) -> Verdict:
    """Walk down a tree (or a chain), one place after another, as `step` decides.

    All rows take every step, in fixed shapes and without a read; those that have ended change
    nothing.
    """
    drafts, num = batch.drafts, batch.drafts.shape[1]
    shape = batch.topology or topology(tuple(range(-1, num - 1)), drafts.device)
    table = shape.children.expand(len(drafts), -1, -1)
    levels, width = shape.num_levels, table.shape[2]
    tokens = drafts.new_zeros(len(drafts), levels + 1)
    path = drafts.new_zeros(len(drafts), levels)
    counts = torch.ones_like(tokens[:, 0])
    rows = torch.arange(len(drafts), device=drafts.device)
    law = torch.zeros_like(rows)
    going = counts.bool()
    for level in range(levels + 1):
        if none_left(going):
            break
        target = batch.target_logp[rows, law].double().exp()
        position = batch.positions[rows, law][:, None]
        children = table[rows, law]
        found = children.clamp(min=0)
        accepted, residual = torch.full_like(rows, -1), target
        if num:
            tried, draft = drafts.gather(1, found), batch.draft_logp
            siblings = Siblings(
                tokens=tried.clamp(min=0),
                valid=(children >= 0) & (tried >= 0) & going[:, None],
                target=target,
                draft=None if draft is None else draft[rows, found[:, 0]].double().exp(),
                uniforms=batch.noise.uniform(position, "accept", batch.number, width)[:, 0],
            )
            accepted, residual = step(siblings)
        goes_on = going & (accepted >= 0)
        drawn = draw(residual, batch.noise.uniform(position, "recover", batch.number)[:, 0])
        counts = torch.where(going, level + 1, counts)
        node = found.gather(1, accepted.clamp(min=0)[:, None])[:, 0]
        new = drawn
        if num and level < levels:
            new = torch.where(goes_on, drafts.gather(1, node[:, None])[:, 0], drawn)
            path[:, level] = torch.where(goes_on, node, path[:, level])
        tokens[:, level] = torch.where(going, new, tokens[:, level])
        law, going = torch.where(goes_on, node + 1, law), goes_on
    return Verdict(tokens, counts, None if batch.topology is None else path)


def _subtract(left: Tensor, taken: Tensor, where: Tensor) -> Tensor:
    """norm(max(left - taken, 0)) [B, V] in rows `where`; an empty residual leaves what was."""
    residual = (left - taken).clamp(min=0)
    total = residual.sum(-1, keepdim=True)
    changed = where[:, None] & (total > 0)
    return torch.where(changed, residual / total.where(total > 0, 1.0), left)


def _in_turn(
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


def multi_round(batch: Round) -> Verdict:
    """Siblings in turn: accept with probability min(1, r / q), else r := norm((r - q)+).

    Exact for siblings drawn independently from q, and for chosen ones.

    Paper: Miao et al., "SpecInfer: Accelerating Large Language Model Serving with Tree-based
    Speculative Inference and Verification", 2023, section 4.3.
    """
    return walk(batch, lambda siblings: _in_turn(siblings, replaces=True))


def without_replacement(batch: Round) -> Verdict:
    """As `multi_round`, and after each failure q := norm(q without the token that was tried).

    Exact for siblings drawn one after another without replacement from q (Gumbel-top-k in its
    order, or stochastic beam search), and for chosen ones.

    Paper: Jeon et al., "Recursive Speculative Decoding: Accelerating LLM Inference via Sampling
    Without Replacement", 2024, section 3.2.
    """
    return walk(batch, lambda siblings: _in_turn(siblings, replaces=False))


def lenient(lend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Rule:
    """`without_replacement` with borrowed probability: lossy, see `arvision.decoding.relaxed`."""
    return lambda batch: walk(batch, lambda siblings: _in_turn(siblings, False, lend))
