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


def neighbour_log_ratio(codebook: Tensor, num_neighbours: int, max_tv: float) -> LogRatio:
    """log((p(x) + e(x)) / q(x)), e being probability lent by the codes nearest to the draft x.

    With M(x) the mass of p on the `num_neighbours` codes nearest to x, and Z = TV(p, q),
    e(x) = min(M(x), delta, delta * (q(x) - p(x))+ / Z). The law of the step then differs from p by

        TV = sum over x of min((q(x) - p(x))+, e(x)) <= delta,

    because what the lenient test keeps beyond min(p, q) is taken, in proportion, from the residual
    (p - q)+. The third bound is ours: capping M(x) by delta for each draft alone, as published,
    bounds the law seen from one draft, and sums to more over all drafts.

    Args:
        codebook: [V, D], rows of unit length.
        num_neighbours: k; 0 relaxes nothing.
        max_tv: delta in [0, 1]; 0 relaxes nothing.
    """

    def log_ratio(chain: Round) -> Tensor:
        assert chain.draft_logp is not None
        drafts = chain.drafts[..., None]
        target = chain.target_logp[:, :-1].exp()
        surplus = (chain.draft_logp.exp() - target).clamp(min=0)
        likeness = codebook[chain.drafts] @ codebook.T
        likeness.scatter_(-1, drafts, float("-inf"))
        nearest = likeness.topk(min(num_neighbours, target.shape[-1] - 1), dim=-1).indices
        mass = target.gather(-1, nearest).sum(-1).clamp(max=max_tv)
        share = surplus.gather(-1, drafts)[..., 0] / surplus.sum(-1).clamp(
            min=torch.finfo(surplus.dtype).tiny
        )
        lent = torch.minimum(mass, max_tv * share.to(mass.dtype))
        lenient = torch.logaddexp(_logp(chain), lent.log())
        return lenient - chain.draft_logp.gather(-1, drafts)[..., 0]

    return log_ratio
