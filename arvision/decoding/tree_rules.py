"""Rejection sampling over trees: siblings are tried in turn against what is left of the target's law.

At each place of the tree r is what is left of the target's law p: at first p itself, after each
rejected sibling the normalised residual. Where no sibling is accepted the recovered token is a draw
from r. The walk then ends, else it goes on behind the accepted sibling.

With drafts that were chosen and not drawn (`Round.draft_logp` is None) q is a point mass: sibling x
is accepted with probability r(x), and its residual is r without x. All rules agree then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..kernels import verify as kernel
from ..kernels.verify.reference import Siblings, Step, in_turn
from ..kernels.verify.reference import walk as walk_down
from .tree import topology
from .verify import Round, Rule, Verdict

__all__ = ["Siblings", "lenient", "multi_round", "walk", "without_replacement"]


def _numbers(batch: Round) -> tuple[Any, ...]:
    """What a walk is decided by: drafts, whose children they are, laws, uniform numbers, levels."""
    num, drafts = batch.drafts.shape[1], batch.drafts
    shape = batch.topology or topology(tuple(range(-1, num - 1)), drafts.device)
    width = shape.children.shape[-1]
    accept = batch.noise.uniform(batch.positions, "accept", batch.number, width)
    recover = batch.noise.uniform(batch.positions, "recover", batch.number)
    laws = (batch.target_logp, batch.draft_logp)
    return (drafts, shape.children, *laws, accept, recover, shape.num_levels)


def _verdict(batch: Round, tokens: Tensor, counts: Tensor, path: Tensor) -> Verdict:
    return Verdict(tokens, counts, None if batch.topology is None else path)


def walk(batch: Round, step: Step) -> Verdict:
    """Walk down a tree (or a chain), one place after another, as `step` decides."""
    return _verdict(batch, *walk_down(*_numbers(batch), step))


def _walk_in_turn(batch: Round, *, replaces: bool) -> Verdict:
    return _verdict(batch, *kernel.in_turn(*_numbers(batch), replaces=replaces))


def multi_round(batch: Round) -> Verdict:
    """Siblings in turn: accept with probability min(1, r / q), else r := norm((r - q)+).

    Exact for siblings drawn independently from q, and for chosen ones.

    Paper: Miao et al., "SpecInfer: Accelerating Large Language Model Serving with Tree-based
    Speculative Inference and Verification", 2023, section 4.3.
    """
    return _walk_in_turn(batch, replaces=True)


def without_replacement(batch: Round) -> Verdict:
    """As `multi_round`, and after each failure q := norm(q without the token that was tried).

    Exact for siblings drawn one after another without replacement from q (Gumbel-top-k in its
    order, or stochastic beam search), and for chosen ones.

    Paper: Jeon et al., "Recursive Speculative Decoding: Accelerating LLM Inference via Sampling
    Without Replacement", 2024, section 3.2.
    """
    return _walk_in_turn(batch, replaces=False)


def lenient(lend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Rule:
    """`without_replacement` with borrowed probability: lossy, see `arvision.decoding.relaxed`."""
    return lambda batch: walk(batch, lambda siblings: in_turn(siblings, False, lend))
