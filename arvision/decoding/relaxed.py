"""Verification that is lossy on purpose: drafts are kept more often than the target's law allows.

Each relaxation replaces one part of the exact rules in `verify.py`: the ratio of the acceptance test
(groups of look-alike tokens) or what follows the first rejection (confident drafts stay). The
residual is the ordinary one. Ratios apply up to the first rejection, so every position is tested
with a relaxed ratio exactly once, in the pass that makes it final.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..contracts import codebook_of
from ..errors import InputError, unknown_name
from .verify import (
    Round,
    Rule,
    Verdict,
    accept,
    acceptance_log_ratio,
    fresh,
    maximal_coupling,
    through_first_rejection,
)

LogRatio = Callable[[Round], Tensor]
"""Logarithm [B, m] of the probability (capped at 1) that a draft is kept."""

LATER = {"independent": fresh, "maximal": lambda chain: maximal_coupling(chain).tokens}
"""What follows the first rejection, by coupling."""


def relaxed_rule(
    coupling: str, log_ratio: LogRatio = acceptance_log_ratio, reuse: float | None = None
) -> Rule:
    """A rule of verification with a relaxed part.

    Args:
        coupling: what becomes of the drafts after the first rejection, "independent" or "maximal".
        log_ratio: of the acceptance test; the exact p / q by default.
        reuse: drafts after the first rejection whose probability exceeds this stay what they are
            (and pass from then on for draws from the latest law); None keeps none for that.
    """
    check_relaxable(coupling)

    def rule(chain: Round) -> Verdict:
        later = LATER[coupling](chain)
        if chain.drafts.shape[1] == 0:
            return through_first_rejection(chain, chain.drafts.bool(), later)
        if reuse is not None:
            later[:, :-1] = torch.where(_logp(chain).exp() > reuse, chain.drafts, later[:, :-1])
        return through_first_rejection(chain, accept(chain, log_ratio(chain)), later)

    return rule


def check_relaxable(coupling: str) -> None:
    """Refuse a coupling that takes no part in lossy verification.

    Raises:
        InputError: see above.
    """
    if coupling == "gumbel":
        raise InputError(
            "coupling 'gumbel' draws every token with its own noise and never asks how likely a "
            "draft is: reuse and relaxation need 'independent' (as published) or 'maximal'"
        )
    if coupling not in LATER:
        raise unknown_name("coupling", coupling, LATER)


def check_codebook(model: object, sampler: str) -> Tensor:
    """The codebook [V, D] of a model, whose rows are made unit length.

    Raises:
        InputError: the model has none.
    """
    codebook = codebook_of(model)
    if codebook is None:
        raise InputError(
            f"sampler {sampler!r} compares tokens by the distance of their codes, and this model "
            "has no `codebook`: expected a model with its image tokenizer, or another sampler"
        )
    return torch.nn.functional.normalize(codebook.detach().float(), dim=-1)


def _logp(chain: Round) -> Tensor:
    """log p(x) of the drafts, [B, m]."""
    return chain.target_logp[:, :-1].gather(-1, chain.drafts[..., None])[..., 0]


def grouped_log_ratio(
    codebook: Tensor, rank_radius: int, max_gap: float, max_distance: float
) -> LogRatio:
    """log(sum of p over the draft's group / sum of q over it).

    The group of a draft x holds the tokens y at most `rank_radius` places from x in the order of
    p, with |p(y) - p(x)| < `max_gap` and codes closer than `max_distance`; x always belongs to it.

    Args:
        codebook: [V, D], rows of unit length; distances are Euclidean.
        rank_radius: places to either side.
        max_gap: difference of probabilities.
        max_distance: distance of codes.
    """

    def log_ratio(chain: Round) -> Tensor:
        assert chain.draft_logp is not None
        target = chain.target_logp[:, :-1].exp()
        order = target.argsort(dim=-1, descending=True, stable=True)
        drafts = chain.drafts[..., None]
        rank = (order == drafts).long().argmax(dim=-1, keepdim=True)
        near = rank + torch.arange(-rank_radius, rank_radius + 1, device=rank.device)
        exists = (near >= 0) & (near < target.shape[-1])
        members = order.gather(-1, near.clamp(0, target.shape[-1] - 1))
        probs = target.gather(-1, members)
        codes = codebook[chain.drafts][..., None, :]
        distance = (codebook[members] - codes).norm(dim=-1)
        alike = (probs - target.gather(-1, drafts)).abs() < max_gap
        belongs = exists & ((alike & (distance < max_distance)) | (members == drafts))
        drafted = chain.draft_logp.exp().gather(-1, members)
        return (probs * belongs).sum(-1).log() - (drafted * belongs).sum(-1).log()

    return log_ratio


Lend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Laws of target and draft [..., V] and drafts [...] to probability lent to each draft [...]."""

BOUNDS = {
    "step": "the law of the whole step differs from the target's by the limit at most",
    "draft": "what each draft is lent is the limit at most (LANTERN)",
    "factor": "each draft's probability grows by the limit as a factor at most (LANTERN++)",
}


def neighbour_loan(
    codebook: Tensor, num_neighbours: int, limit: float, bound: str = "step"
) -> Lend:
    """Probability e(x) that a draft x borrows from the `num_neighbours` codes nearest to it.

    With M(x) the mass of p on these codes, Z = TV(p, q) and delta the limit:

    - "step": e(x) = min(M(x), delta, delta * (q(x) - p(x))+ / Z). The law of the step then differs from
      p by TV = sum over x of min((q(x) - p(x))+, e(x)) <= delta, because what the lenient test keeps
      beyond min(p, q) is taken, in proportion, from the residual (p - q)+. This bound is ours.
    - "draft": the mass of the nearest codes, taken in as far as it stays within delta. Seen from one
      draft p moves by delta at most; summed over all drafts the step can move further.
    - "factor": the same, as far as p(x) + e(x) <= delta * p(x); unlikely drafts borrow little.

    Args:
        codebook: [V, D], rows of unit length.
        num_neighbours: k; 0 relaxes nothing.
        limit: delta: in [0, 1], or a factor >= 1.
        bound: a name in `BOUNDS`.

    Raises:
        InputError: an unknown bound.

    Papers: Jang et al., "LANTERN: Accelerating Visual Autoregressive Models with Relaxed Speculative
    Decoding", 2024, section 4 ("draft"); Park et al., "LANTERN++: Enhancing Relaxed Speculative Decoding
    with Static Tree Drafting for Visual Auto-regressive Models", 2025 ("factor").
    """
    if bound not in BOUNDS:
        raise unknown_name("bound", bound, BOUNDS)

    def lend(target: Tensor, draft: Tensor, drafts: Tensor) -> Tensor:
        place = drafts[..., None]
        likeness = (codebook[drafts] @ codebook.T).scatter_(-1, place, float("-inf"))
        nearest = likeness.topk(min(num_neighbours, target.shape[-1] - 1), dim=-1).indices
        mass = target.gather(-1, nearest)
        if bound == "step":
            surplus = (draft - target).clamp(min=0)
            tiny = torch.finfo(surplus.dtype).tiny
            share = surplus.gather(-1, place)[..., 0] / surplus.sum(-1).clamp(min=tiny)
            return torch.minimum(mass.sum(-1).clamp(max=limit), limit * share)
        own = target.gather(-1, place)
        most = own * (limit - 1) if bound == "factor" else torch.full_like(own, limit)
        return mass.masked_fill(mass.cumsum(-1) > most, 0).sum(-1)

    return lend


def neighbour_log_ratio(
    codebook: Tensor, num_neighbours: int, limit: float, bound: str = "step"
) -> LogRatio:
    """log((p(x) + e(x)) / q(x)), e being what `neighbour_loan` lends to the draft x."""
    lend = neighbour_loan(codebook, num_neighbours, limit, bound)

    def log_ratio(chain: Round) -> Tensor:
        assert chain.draft_logp is not None
        target = chain.target_logp[:, :-1].exp()
        lent = lend(target, chain.draft_logp.exp().to(target.dtype), chain.drafts)
        lenient = torch.logaddexp(_logp(chain), lent.log())
        return lenient - chain.draft_logp.gather(-1, chain.drafts[..., None])[..., 0]

    return log_ratio
