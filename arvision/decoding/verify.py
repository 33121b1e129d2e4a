"""The verification core: given the drafts and the target's laws, what stays and what comes next.

Words used throughout: a draft is *accepted* when it is kept, the token drawn in place of a rejected
one is *recovered*, the token drawn after a fully accepted chain is the *bonus*.

A chain of m drafts stands at positions n..n+m-1 behind a committed prefix; the target gives m + 1
laws, the last one for the position after the chain. A rule returns a token for each of these m + 1
positions and how many of them, from the left, are final; what stands right of these may serve as the
drafts of the next round, and then has exactly the law that the target gave for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import unknown_name
from .noise import Noise, draw


@dataclass(frozen=True)
class Chain:
    """One round's drafts and laws.

    Attributes:
        drafts: [B, m] int64; -1 where a row has no draft, as rows may have fewer than m.
        draft_logp: [B, m, V], the laws that the drafts were drawn from; None for a rule that does
            not look at them.
        target_logp: [B, m + 1, V].
        positions: [B, m + 1] int64, where in the image the laws stand.
        noise: of the B images.
        tries: number of this round, for randomness that must be fresh in every round.
    """

    drafts: Tensor
    draft_logp: Tensor | None
    target_logp: Tensor
    positions: Tensor
    noise: Noise
    tries: int


@dataclass(frozen=True)
class Verdict:
    """What a rule decided.

    Attributes:
        tokens: [B, m + 1] int64.
        counts: [B] int64 in 1..m+1: `tokens[b, :counts[b]]` are final.
    """

    tokens: Tensor
    counts: Tensor


Rule = Callable[[Chain], Verdict]


def first_change(drafts: Tensor, tokens: Tensor) -> Tensor:
    """How many of `tokens` [B, m + 1] are final, [B]: through the first that differs from its draft.

    The token that takes the place of a draft is itself final, and so is the bonus.
    """
    same = (tokens[:, :-1] == drafts).long()
    return same.cumprod(dim=1).sum(dim=1) + 1


def gumbel_draw(logp: Tensor, positions: Tensor, noise: Noise) -> Tensor:
    """argmax(log p + g), [B, T], for laws [B, T, V] at positions [B, T]."""
    return (logp + noise.gumbel(positions, logp.shape[-1], logp.dtype)).argmax(-1)


def gumbel_coupling(chain: Chain) -> Verdict:
    """argmax(log p + g) at every position, g fixed per image, position and token.

    Exact, and more: the tokens are those of plain sampling with the same noise, whatever was
    drafted. Two successive laws agree on a token with probability >= (1 - TV) / (1 + TV).
    """
    tokens = gumbel_draw(chain.target_logp, chain.positions, chain.noise)
    return Verdict(tokens, first_change(chain.drafts, tokens))


def acceptance_log_ratio(chain: Chain) -> Tensor:
    """log p(x) - log q(x) of the drafts, [B, m]; -inf where the target rules a draft out."""
    assert chain.draft_logp is not None
    index = chain.drafts.clamp(min=0)[..., None]
    target = chain.target_logp[:, :-1].gather(-1, index)[..., 0]
    return target - chain.draft_logp.gather(-1, index)[..., 0]


def accept(chain: Chain, log_ratio: Tensor | None = None) -> Tensor:
    """Which drafts pass their own test, [B, m] bool, with probability min(1, p / q).

    A lossy rule puts the logarithm of another ratio [B, m] in the place of p / q.
    """
    uniforms = chain.noise.uniform(chain.positions[:, :-1], "accept", chain.tries)
    ratio = acceptance_log_ratio(chain) if log_ratio is None else log_ratio
    return (uniforms.log() < ratio) & (chain.drafts >= 0)


def recover(chain: Chain) -> Tensor:
    """A draw from the normalised (p - q)+ at every draft, [B, m].

    Where the two laws are the same the residual is empty and a rejection has probability zero; p
    stands in, so that nothing divides by zero.
    """
    assert chain.draft_logp is not None
    target = chain.target_logp[:, :-1].exp()
    residual = (target - chain.draft_logp.exp()).clamp(min=0)
    empty = residual.sum(-1, keepdim=True) <= 0
    uniforms = chain.noise.uniform(chain.positions[:, :-1], "recover", chain.tries)
    return draw(torch.where(empty, target, residual), uniforms)


def fresh(chain: Chain) -> Tensor:
    """An independent draw from the target's law at every position, [B, m + 1]."""
    uniforms = chain.noise.uniform(chain.positions, "token", chain.tries)
    return draw(chain.target_logp.exp(), uniforms)


def coupled(chain: Chain) -> Tensor:
    """At every position the draft with probability min(1, p / q), else recovered, [B, m + 1]."""
    bonus = fresh(chain)[:, -1:]
    if chain.drafts.shape[1] == 0:
        return bonus
    kept = torch.where(accept(chain), chain.drafts, recover(chain))
    return torch.cat([kept, bonus], dim=1)


def maximal_coupling(chain: Chain) -> Verdict:
    """Keep each draft with probability min(1, p / q), else recover it, at every position.

    Exact: a causal model's law at a position never looks at that position's own draft, so by
    induction each new draft has law p given everything before it. No coupling of successive drafts
    agrees more often (1 - TV).

    Paper: So et al., "Speculative Coupled Decoding", 2025 (there for text-to-image models).
    """
    tokens = coupled(chain)
    return Verdict(tokens, first_change(chain.drafts, tokens))


def through_first_rejection(chain: Chain, accepted: Tensor, later: Tensor) -> Verdict:
    """Accept up to the first rejection, recover there, and put `later` to the right of it.

    Args:
        chain: the round.
        accepted: [B, m] bool, which drafts pass their own test.
        later: [B, m + 1] int64, the next drafts; its entry behind a row's last draft is the bonus.
    """
    if chain.drafts.shape[1] == 0:
        return Verdict(later, torch.ones_like(later[:, 0]))
    accepted = accepted.long().cumprod(dim=1)
    counts = accepted.sum(dim=1) + 1
    is_first_rejection = torch.arange(chain.drafts.shape[1], device=counts.device) == (
        counts[:, None] - 1
    )
    is_first_rejection = is_first_rejection & (chain.drafts >= 0)
    tokens = torch.where(is_first_rejection, recover(chain), later[:, :-1])
    tokens = torch.where(accepted.bool(), chain.drafts, tokens)
    return Verdict(torch.cat([tokens, later[:, -1:]], dim=1), counts)


def independent_redraw(chain: Chain) -> Verdict:
    """Accept up to the first rejection, recover there, and redraw what follows from scratch.

    Exact; the published rule of Speculative Jacobi Decoding, with the residual taken from the
    shaped laws as they are.

    Paper: Teng et al., "Accelerating Auto-regressive Text-to-Image Generation with Training-free
    Speculative Jacobi Decoding", 2024, section 3.2.
    """
    accepted = accept(chain) if chain.drafts.shape[1] else chain.drafts.bool()
    return through_first_rejection(chain, accepted, fresh(chain))


COUPLINGS: dict[str, Rule] = {
    "gumbel": gumbel_coupling,
    "maximal": maximal_coupling,
    "independent": independent_redraw,
}


def get_coupling(name: str) -> Rule:
    """The coupling of that name.

    Raises:
        InputError: no such coupling.
    """
    if name not in COUPLINGS:
        raise unknown_name("coupling", name, COUPLINGS)
    return COUPLINGS[name]
