"""Block verification: a chain accepted as a whole, never shorter than token by token."""

from __future__ import annotations

import torch

from ...decoding.noise import draw
from ...decoding.verify import Round, Verdict, acceptance_log_ratio, draft_laws, fresh


def block_verification(chain: Round) -> Verdict:
    """Accept the longest prefix by joint ratios.

    With w_0 = 1 and w_i = min(1, w_(i-1) p(x_i) / q(x_i)), prefix i passes with probability
    S / (S + 1 - w_i), S = sum of (w_i p - q)+ over the next token; the last prefix of the row with
    probability w_i. The longest prefix that passes stays, and recovered ~ norm((w_i p - q)+) behind
    it. Exact for chains drawn from q; the expected number of accepted tokens is the largest that a
    rule of this kind can have, and at least that of chain speculative sampling.

    Paper: Sun et al., "Block Verification Accelerates Speculative Decoding", 2024, algorithm 2.
    """
    laws = draft_laws(chain)
    bonus = fresh(chain)[:, -1:]
    num = chain.drafts.shape[1]
    if num == 0:
        return Verdict(bonus, torch.ones_like(bonus[:, 0]))
    is_draft = (chain.drafts >= 0).long().cumprod(1).bool()
    target, draft = chain.target_logp.double().exp(), laws.double().exp()
    ratio = acceptance_log_ratio(chain).double().exp()
    weight = torch.ones_like(ratio[:, 0])
    uniforms = chain.noise.uniform(chain.positions[:, :-1], "accept", chain.number)
    length = torch.zeros_like(chain.drafts[:, 0])
    best = weight
    for place in range(num):
        weight = (weight * ratio[:, place]).clamp(max=1.0)
        passes = uniforms[:, place] < weight
        if place + 1 < num:
            more = (weight[:, None] * target[:, place + 1] - draft[:, place + 1]).clamp(min=0)
            surplus = more.sum(-1)
            share = surplus / (surplus + 1 - weight).clamp(min=1e-300)
            has_next = is_draft[:, place + 1]
            passes = torch.where(has_next, uniforms[:, place] < share, passes)
        passes = passes & is_draft[:, place]
        length = torch.where(passes, place + 1, length)
        best = torch.where(passes, weight, best)
    rows = torch.arange(len(length), device=length.device)
    law = target[rows, length]
    has_next = (length < num) & is_draft[rows, length.clamp(max=num - 1)]
    q = draft[rows, length.clamp(max=num - 1)]
    residual = (best[:, None] * law - q).clamp(min=0)
    is_usable = has_next & (residual.sum(-1) > 0)
    residual = torch.where(is_usable[:, None], residual, law)
    position = chain.positions.gather(1, length[:, None])
    recovered = draw(residual, chain.noise.uniform(position, "recover", chain.number)[:, 0])
    tokens = torch.cat([chain.drafts, bonus], dim=1).scatter(1, length[:, None], recovered[:, None])
    return Verdict(tokens, length + 1)
