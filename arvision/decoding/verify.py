"""The verification core: given the drafts and the target's laws, what stays and what comes next.

Words used throughout: a draft is *accepted* when it is kept, the token drawn in place of a rejected
one is *recovered*, the token drawn after a fully accepted chain is the *bonus*.

m drafts stand behind the last known token, as a tree or, most often, as the tree without branches:
a chain. The target gives m + 1 laws: the first follows the last known token, law i + 1 follows draft
i. So along a chain law i judges draft i, and in any tree the law after its parent does.

A rule returns tokens and how many of them, from the left, are final. For a chain there is one for
each of the m + 1 positions; what stands right of the final ones may serve as the drafts of the next
round, and then has exactly the law that the target gave for it. For a tree the tokens are those of
one path, and the one drawn where it ends.

The rules of this file judge chains; `greedy` and `gumbel_coupling` judge trees as well. More rules
for trees are in `arvision.decoding.tree_rules`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, renamed, unknown_name
from ..kernels import dispatch
from ..kernels import verify as kernel
from ..kernels.sampling import Laws
from ..kernels.verify import reference
from .logits import laws_of, written
from .noise import Noise, draw
from .tree import Topology


@dataclass(frozen=True)
class Round:
    """One round's drafts and laws.

    Attributes:
        drafts: [B, m] int64; -1 where a row has no draft, as rows may have fewer than m.
        draft_logp: [B, m, V], the laws that the drafts were drawn from; None for a rule that does
            not look at them.
        target: the target's laws [B, m + 1, V], see `target_logp`; or `Laws`, which a rule that only
            draws takes as they are.
        positions: [B, m + 1] int64, the places (in the image, in the text) that the laws are for; in
            a tree a law's depth behind the first one.
        noise: of the B images.
        number: which round of the run this is, from 0, for randomness that must be fresh in every round.
        topology: of the drafts; None for a chain.
        hidden: [B, m + 1, C], what the target's last layer says at each candidate, for drafters and
            rules that look at it; None where the state does not tell.
    """

    drafts: Tensor
    draft_logp: Tensor | None
    target: Tensor | Laws
    positions: Tensor
    noise: Noise
    number: int
    topology: Topology | None = None
    hidden: Tensor | None = None

    @property
    def target_logp(self) -> Tensor:
        """[B, m + 1, V] log-probabilities; `greedy` is content with logits."""
        return written(self.target)

    def law(self, place: int) -> Tensor:
        """The target's law [B, V] at one place, which may count from the end."""
        target = self.target
        return target.at(place) if isinstance(target, Laws) else target[:, place]


@dataclass(frozen=True)
class Verdict:
    """What a rule decided.

    Attributes:
        tokens: [B, m + 1] int64; [B, levels + 1] for a tree.
        counts: [B] int64, at least 1: `tokens[b, :counts[b]]` are final.
        path: [B, levels] int64, the drafts that stay: `path[b, :counts[b] - 1]`. None for a chain,
            where they are the first ones.
        given: `counts` on the host, once the loop has read them.
        known: of each row, tokens that were given and not drawn and follow the final ones: they are
            final as well, and drafts go on behind them. None where no token is given.
    """

    tokens: Tensor
    counts: Tensor
    path: Tensor | None = None
    given: list[int] | None = None
    known: list[int] | None = None


Rule = Callable[[Round], Verdict]


def first_round(
    logits: Tensor,
    shape: Callable[[Tensor], Tensor],
    noise: Noise,
    lengths: Tensor,
    hidden: Tensor | None,
) -> Round:
    """A chain without drafts: the prefill's law of the first token that is drawn."""
    laws, positions = laws_of(shape, logits)[:, None], lengths[:, None]
    none = torch.zeros(len(laws), 0, laws.shape[2], dtype=laws.dtype, device=positions.device)
    return Round(positions[:, :0], none, laws, positions, noise, 0, hidden=hidden)


def num_final(passes: Tensor) -> Tensor:
    """Final tokens [B] along chains: the drafts that pass, [B, m], up to the first that does not,
    and the token in the place of that one (or the bonus)."""
    return passes.cumprod(dim=1, dtype=torch.int64).sum(dim=1) + 1


def follow(batch: Round, choice: Tensor) -> Verdict:
    """Walk down the drafts as long as they are what was chosen.

    Args:
        batch: a chain or a tree.
        choice: [B, m + 1] int64, the token chosen under each law.
    """
    shape = batch.topology
    if choice.shape[1] == 1:
        return Verdict(choice, torch.ones_like(choice[:, 0]))
    if shape is None and dispatch.stays(choice):
        return Verdict(choice, num_final(batch.drafts == choice[:, :-1]))
    if shape is not None and dispatch.stays(choice):
        laws = shape.laws.expand(batch.drafts.shape)
        return deepest(batch, batch.drafts == choice.gather(1, laws), choice)
    tree, levels = (None, 0) if shape is None else (shape.packed, shape.num_levels)
    return Verdict(*kernel.follow(batch.drafts, choice, tree, levels))


def deepest(batch: Round, passes: Tensor, choice: Tensor) -> Verdict:
    """The longest path of drafts that all pass, and the token chosen where it ends.

    Args:
        batch: a tree, or a chain.
        passes: [B, m] bool, which drafts pass their own test.
        choice: [B, m + 1] int64, the token that follows each place if the path ends there.
    """
    passes = passes & (batch.drafts >= 0)
    topology = batch.topology
    if topology is None:
        counts = num_final(passes)
        kept = torch.arange(passes.shape[1], device=counts.device) < counts[:, None] - 1
        tokens = torch.where(kept, batch.drafts, choice[:, :-1])
        return Verdict(torch.cat([tokens, choice[:, -1:]], dim=1), counts)
    shape = topology.ancestors, topology.depths, topology.num_levels
    return Verdict(*reference.walk_down(batch.drafts, choice, passes, *shape))


def greedy(batch: Round) -> Verdict:
    """The most likely token everywhere: greedy decoding, whatever was drafted."""
    return follow(batch, batch.target_logp.argmax(-1))


def gumbel_draw(logp: Tensor | Laws, positions: Tensor, noise: Noise) -> Tensor:
    """argmax(log p + g), [B, T], for laws [B, T, V] at positions [B, T].

    A position may also hold d laws of V values each, [B, T, d, V]: all d V numbers are its own.
    """
    if isinstance(logp, Laws) or logp.dim() == 3:
        return noise.best(logp, positions)
    numbers = noise.gumbel(positions, logp.shape[2:].numel(), logp.dtype)
    return (logp + numbers.view(logp.shape)).argmax(-1)


def coupled_draw(batch: Round, logp: Tensor | Laws) -> Tensor:
    """`gumbel_draw` at every place of a round, [B, m + 1].

    Candidates at one depth of a tree stand at one position: its numbers are computed once.

    Args:
        batch: a chain or a tree.
        logp: [B, m + 1, V].
    """
    shape = batch.topology
    is_spread = shape is None or shape.num_levels == batch.drafts.shape[1]
    if isinstance(logp, Laws) or shape is None or is_spread or not dispatch.stays(logp):
        return gumbel_draw(logp, batch.positions, batch.noise)
    first, levels = batch.positions[:, :1], torch.arange(shape.num_levels + 1, device=logp.device)
    numbers = batch.noise.gumbel(first + levels, logp.shape[2], logp.dtype)
    # Padding may stand deeper than any candidate.
    level = (batch.positions - first).clamp(max=shape.num_levels)
    rows = torch.arange(len(logp), device=logp.device)[:, None]
    return (logp + numbers[rows, level]).argmax(-1)


def gumbel_coupling(batch: Round) -> Verdict:
    """argmax(log p + g) at every position, g fixed per image, position and token.

    Exact, and more: the tokens are those of plain sampling with the same noise, whatever was
    drafted, as a chain or as a tree. Two successive laws agree on a token with probability
    >= (1 - TV) / (1 + TV).
    """
    return follow(batch, coupled_draw(batch, batch.target))


def _core(laws: Tensor) -> Any:
    """What judges a chain: on a CPU the reference itself, elsewhere what `kernels.verify` chooses."""
    if not dispatch.stays(laws):
        return kernel
    dispatch.LAST["verify"] = dispatch.ON_CPU
    return reference


def draft_laws(chain: Round) -> Tensor:
    """The laws [B, m, V] that the drafts of a chain were drawn from.

    Raises:
        InputError: a tree, or drafts that were chosen and not drawn: a rule that compares one draft
            at a time with its own law cannot judge them.
    """
    if chain.topology is not None:
        raise InputError(
            "this rule judges chains and the drafts branch: expected drafts without branches, or a "
            "rule for trees such as 'gumbel' or 'multi_round'"
        )
    if chain.draft_logp is None and chain.drafts.shape[1] == 0:
        return chain.target_logp[:, :0]
    if chain.draft_logp is None:
        raise InputError(
            "this rule needs the laws that drafts were drawn from, and these were chosen: expected "
            "another drafter, or a rule such as 'gumbel'"
        )
    return chain.draft_logp


def acceptance_log_ratio(chain: Round) -> Tensor:
    """log p(x) - log q(x) of the drafts, [B, m]; -inf where the target rules a draft out."""
    return reference.log_ratio(chain.drafts, draft_laws(chain), chain.target_logp)


def accept(chain: Round, log_ratio: Tensor | None = None) -> Tensor:
    """Which drafts pass their own test, [B, m] bool, with probability min(1, p / q).

    A lossy rule puts the logarithm of another ratio [B, m] in the place of p / q.
    """
    uniforms = chain.noise.uniform(chain.positions[:, :-1], "accept", chain.number)
    ratio = acceptance_log_ratio(chain) if log_ratio is None else log_ratio
    return (uniforms.log() < ratio) & (chain.drafts >= 0)


def recover(chain: Round) -> Tensor:
    """A draw from the normalised (p - q)+ at every draft, [B, m]."""
    uniforms = chain.noise.uniform(chain.positions[:, :-1], "recover", chain.number)
    return reference.recover(chain.drafts, draft_laws(chain), chain.target_logp, uniforms)


def fresh(chain: Round) -> Tensor:
    """An independent draw from the target's law at every position, [B, m + 1]."""
    uniforms = chain.noise.uniform(chain.positions, "token", chain.number)
    return draw(chain.target_logp.exp(), uniforms)


def _couple(chain: Round, coupling: str) -> Verdict:
    """The window's numbers, and the kernel that decides by them."""
    places = chain.positions
    uniforms = [
        chain.noise.uniform(places[:, :-1], "accept", chain.number),
        chain.noise.uniform(places[:, :-1], "recover", chain.number),
        chain.noise.uniform(places, "token", chain.number),
    ]
    if coupling == "maximal" and chain.drafts.shape[1]:
        # Where a row has no draft it draws what it would draw behind its last one, so that its
        # tokens do not depend on how long the chains beside it are.
        uniforms[1] = torch.where(chain.drafts < 0, uniforms[2][:, :-1], uniforms[1])
    laws = (draft_laws(chain).to(chain.target_logp.dtype), chain.target_logp)
    return Verdict(*_core(laws[1]).verify(chain.drafts, *laws, *uniforms, coupling=coupling))


def maximal_coupling(chain: Round) -> Verdict:
    """Keep each draft with probability min(1, p / q), else recover it, at every position.

    Exact: a causal model's law at a position never looks at that position's own draft, so by
    induction each new draft has law p given everything before it. No coupling of successive drafts
    agrees more often (1 - TV).

    Paper: So et al., "Speculative Coupled Decoding", 2025 (there for text-to-image models).
    """
    return _couple(chain, "maximal")


def through_first_rejection(chain: Round, accepted: Tensor, later: Tensor) -> Verdict:
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


def independent_redraw(chain: Round) -> Verdict:
    """Accept up to the first rejection, recover there, and redraw what follows from scratch.

    Exact; the published rule of Speculative Jacobi Decoding, with the residual taken from the
    shaped laws as they are.

    Paper: Teng et al., "Accelerating Auto-regressive Text-to-Image Generation with Training-free
    Speculative Jacobi Decoding", 2024, section 3.2.
    """
    return _couple(chain, "independent")


COUPLINGS: dict[str, Rule] = {
    "gumbel": gumbel_coupling,
    "maximal": maximal_coupling,
    "independent": independent_redraw,
}


OLD_COUPLINGS = {"speculative": "independent"}
"""Words of earlier releases for couplings; they go with the next one."""


def coupling_name(name: str) -> str:
    """The name in `COUPLINGS` of what the caller wrote; an old word gives a `FutureWarning`.

    Raises:
        InputError: no such coupling.
    """
    name = renamed("coupling", name, OLD_COUPLINGS)
    if name not in COUPLINGS:
        raise unknown_name("coupling", name, COUPLINGS)
    return name


def get_coupling(name: str) -> Rule:
    """The coupling of that name, see `coupling_name`."""
    return COUPLINGS[coupling_name(name)]
