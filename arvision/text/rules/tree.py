"""Rules over trees that weigh siblings against p itself; see `arvision.decoding.tree_rules`."""

from __future__ import annotations

import torch
from torch import Tensor

from ...decoding.tree_rules import Siblings, multi_round, walk, without_replacement
from ...decoding.verify import Round, Verdict

__all__ = ["k_sequential", "multi_round", "without_replacement"]


def k_sequential(batch: Round) -> Verdict:
    """Accept sibling x with probability min(1, p / (rho q)), all against p itself.

    rho is the smallest number with (1 - (1 - beta)^k) / beta <= rho, beta(rho) = sum min(q, p/rho);
    recovered ~ norm(p - min(q, p / rho) (1 - (1 - beta)^k) / beta). Exact for siblings drawn
    independently from q, and within 1 - 1/e of the best transport of k drafts.

    Paper: Sun et al., "SpecTr: Fast Speculative Decoding via Optimal Transport", 2023, algorithm 2.
    """
    if batch.draft_logp is None:
        return multi_round(batch)
    return walk(batch, _k_sequential)


def _k_sequential(siblings: Siblings) -> tuple[Tensor, Tensor]:
    p, q = siblings.target, siblings.draft
    assert q is not None
    num = siblings.valid.sum(1, keepdim=True).double()
    low, high = torch.ones_like(num), num.clamp(min=1)
    for _ in range(50):
        rho = (low + high) / 2
        beta = torch.minimum(q, p / rho).sum(-1, keepdim=True)
        fits = 1 - (1 - beta) ** num <= rho * beta
        low, high = torch.where(fits, low, rho), torch.where(fits, rho, high)
    overlap = torch.minimum(q, p / high)
    beta = overlap.sum(-1, keepdim=True)
    factor = (1 - (1 - beta) ** num) / beta.where(beta > 0, 1.0)
    residual = (p - overlap * factor).clamp(min=0)
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)
    ratio = p.gather(1, siblings.tokens) / (high * q.gather(1, siblings.tokens))
    passes = siblings.valid & (siblings.uniforms < ratio)
    first = passes.long().argmax(1)
    return torch.where(passes.any(1), first, -1), residual
