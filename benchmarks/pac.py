"""SJD-PAC's proactive drafting by its published formulas: as released, and repaired.

The tree has a root, K children, K children of each, and a chain behind the first grandchild. Tokens
and laws are those of a depth, shared by all parents. The first child is the coupled token, with law
p; the others come from (p - q)+ without replacement, q being the law before.

As released, siblings are judged as if all of them had been drawn from p without the ones before,
all are tested, and the longest passing path wins. Repaired, they are drawn from p without the ones
before, and the first that passes wins: `arvision.decoding.static_tree` with this shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arvision.decoding.jacobi import JacobiDrafter
from arvision.decoding.noise import draw
from arvision.decoding.static_tree import StaticTreeDrafter
from arvision.decoding.tree import TokenTree
from arvision.decoding.verify import Round, Verdict, deepest, maximal_coupling
from arvision.samplers.sjd import SJDSampler


def pac_parents(width: int) -> Any:
    """The shape of the tree, for `StaticTreeDrafter`; K = `width`."""

    def parents(num: int, levels: int) -> tuple[int, ...]:
        out = list(range(-1, levels - 1))
        room = num - levels
        first = [-1] * min(width - 1, room)
        children = [0, *range(levels, levels + len(first))]
        out += first
        for child in children if levels > 1 else ():
            own = width - 1 if child == 0 else width
            out += [child] * max(0, min(own, num - len(out)))
        return tuple(out)

    return parents


class ReleasedChain(JacobiDrafter):
    """Keeps (p - q)+ of every draft, which siblings come from."""

    residual: Tensor | None = None

    def observe(self, chain: Round, verdict: Verdict) -> None:
        """Keep what the pass put behind its final tokens."""
        super().observe(chain, verdict)
        law = chain.target_logp.exp()
        left = law.clone()
        if chain.draft_logp is not None:
            left[:, :-1] = (law[:, :-1] - chain.draft_logp.exp()).clamp(min=0)
        left = torch.where(left.sum(-1, keepdim=True) > 1e-6, left, law)
        places = verdict.counts[:, None] + torch.arange(law.shape[1] - 1)
        index = places.clamp(max=law.shape[1] - 1)[..., None].expand(-1, -1, law.shape[2])
        self.residual = left.gather(1, index)

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows`."""
        super().select(rows)
        self.residual = None if self.residual is None else self.residual[rows]


class ReleasedDrafter(StaticTreeDrafter):
    """Siblings from (p - q)+, as released."""

    def _siblings(self, chain: TokenTree, lengths: Tensor, num: int, round_number: int) -> Tensor:
        assert isinstance(self._chain, ReleasedChain)
        assert chain.logq is not None
        left = self._chain.residual
        if left is not None:
            known = min(left.shape[1], chain.tokens.shape[1])
            weights = chain.logq.clone()
            weights[:, :known] = left[:, :known].log()
            chain = TokenTree(chain.tokens, weights)
        return super()._siblings(chain, lengths, num, round_number)


def released_rule(batch: Round) -> Verdict:
    """All siblings are tested, each as if the ones before it had failed; the longest path wins."""
    shape = batch.topology
    if shape is None:
        return maximal_coupling(batch)
    assert batch.draft_logp is not None
    drafts, levels = batch.drafts, shape.num_levels
    passes = torch.zeros_like(drafts, dtype=torch.bool)
    choice = drafts.new_zeros(len(drafts), batch.target_logp.shape[1])
    width = shape.children.shape[1]
    num = batch.target_logp.shape[1]
    # Parents of the same depth stand at the same position: each has numbers of its own.
    numbers = batch.noise.uniform(batch.positions, "accept", batch.number, num * (width + 1))
    numbers = numbers.unflatten(-1, (num, width + 1))
    for law, children in enumerate(shape.children.tolist()):
        left = batch.target_logp[:, law].double().exp()
        real = [child for child in children if child >= 0]
        draft = batch.draft_logp[:, real[0]].double().exp() if real else None
        for place, child in enumerate(real):
            assert draft is not None
            token = drafts[:, child].clamp(min=0)[:, None]
            ratio = left.gather(1, token) / draft.gather(1, token).clamp(min=1e-300)
            is_draft = drafts[:, child] >= 0
            passes[:, child] = (numbers[:, law, law, place] < ratio[:, 0]) & is_draft
            rest = (left - draft).clamp(min=0)
            total = rest.sum(-1, keepdim=True)
            left = torch.where(
                (total > 0) & is_draft[:, None], rest / total.clamp(min=1e-300), left
            )
            without = draft.scatter(1, token, 0.0)
            total = without.sum(-1, keepdim=True)
            draft = torch.where(total > 0, without / total.clamp(min=1e-300), draft)
        choice[:, law] = draw(left, numbers[:, law, law, width])
    assert levels > 0
    return deepest(batch, passes, choice)


class PacSampler(SJDSampler):
    """`sjd` with the tree of SJD-PAC; `released` says by which rule."""

    name, width, released = "sjd", 3, False

    def drafter(self, model: Any) -> Any:
        """The chain of maximal coupling, in the tree of SJD-PAC."""
        chain = (ReleasedChain if self.released else JacobiDrafter)(self.config["init"], model.grid)
        kind = ReleasedDrafter if self.released else StaticTreeDrafter
        return kind(chain, pac_parents(self.width))

    def rule(self, model: Any) -> Any:
        """As released, or the first sibling that passes."""
        return released_rule if self.released else super().rule(model)


def pac(window: int, *, released: bool) -> PacSampler:
    """The sampler with a tree of `window` candidates, root included."""
    sampler = PacSampler(window=window, tree="static", coupling="maximal")
    sampler.released = released
    return sampler
