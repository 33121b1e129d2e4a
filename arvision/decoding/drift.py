"""Jacobi decoding with a tree that drifts: old laws in new places, more guesses where they differ.

Under Gumbel coupling the token of a position is argmax(log p + g), g fixed. A pass gives the laws of
all its candidates; most of these were asked behind tokens that turned out wrong, so that the law of
a new candidate is one that was asked behind almost the same tokens. The further those differ, the
less the best token of the old law can be trusted, and the more its next best ones deserve a place.

All of it is done for all rows at once, where the laws lie, and nothing is read from there.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contracts import Conditions
from .first_laws import FirstLaws
from .noise import Noise
from .tree import TokenTree, chain_length
from .verify import Round, Verdict

RANKS = 8
"""Tokens of a law that may become candidates."""

NEVER = -1e9
"""Log-probability of a candidate that no place is spent on."""

TAU, FIRST_TAU = (0.15, 0.8), 1.5
"""Temperatures of a law with mismatch m, TAU[0] + TAU[1] sqrt(m), and of a first law."""

BONUS = 1024.0
"""More than the logarithm of any chance of the main chain: its candidates come first."""

DIFFERENT = -2
"""A token that differs from all tokens, and from none (-1)."""


def mismatch_weights(columns: int | None) -> list[float]:
    """What a token that differs, 1, 2, ... places back, costs a law that is used again.

    Set by the share of best tokens that survive such a difference on a grid of eight columns: one
    back .61, two .77, three .88, above .64, above to the left .86 and to the right .81, two lines
    above .90.

    Args:
        columns: of the image grid; None without one.
    """
    near = {1: 1.0, 2: 0.35, 3: 0.1, 4: 0.05}
    above = {}
    if columns is not None:
        shifts = {-1: 0.12, 0: 0.9, 1: 0.2, 2: 0.05, columns: 0.1}
        above = {columns + shift: weight for shift, weight in shifts.items()}
    furthest = max([8, *above])
    return [max(near.get(k, 0.02), above.get(k, 0.02)) for k in range(1, furthest + 1)]


class DriftDrafter:
    """Trees grown best first from the laws of the last two passes; for Gumbel coupling alone.

    A law is looked up by the tokens before it: of all stored laws of a position the one with the
    least mismatch, the weights of `mismatch_weights` summed over the tokens that differ. With
    mismatch m its k-th best token, by log p + g, is expected to be the right one with probability
    softmax((log p + g) / tau)_k, tau = .15 + .8 sqrt(m). A position without a law has its first one
    (`FirstLaws`), with tau 1.5. The main chain is the best token everywhere; what remains of the
    candidates goes to the largest products of these probabilities along a path.

    Args:
        first_laws: of positions that no pass has reached yet.
        columns: of the image grid.
        min_share: no candidate off the main chain is less probable than this.
        weights: of mismatches, see `mismatch_weights`; None for these.
    """

    branches = True
    renewed = ("_contexts", "_passes")

    def __init__(
        self,
        first_laws: FirstLaws,
        columns: int | None,
        min_share: float = 0.0,
        weights: list[float] | None = None,
    ) -> None:
        self._first_laws, self._min_share = first_laws, min_share
        self._weights = mismatch_weights(columns) if weights is None else weights

    def start(self, noise: Noise, vocab_size: int, num_tokens: int) -> None:
        """Forget everything of an earlier batch."""
        self._noise, self._num_tokens = noise, num_tokens
        self._vocab_size, self._ranks = vocab_size, min(RANKS, vocab_size)
        self._weight = torch.tensor(self._weights, device=noise.device)
        self._contexts = torch.full((len(noise), 1, len(self._weights)), -1, device=noise.device)
        self._levels, self._is_fixed = 0, False
        self._tables: Tables | None = None
        self._passes: list[tuple[Tensor, ...]] = []
        """Of the last two passes, the newest first: positions [B, E], contexts [B, E, K], and the
        best tokens of the laws with their scores, [B, E, R]."""

    def attach(self, state: Any, conditions: Conditions) -> None:
        """See `arvision.decoding.loop.Attached`."""
        self._first_laws.start(len(self._noise), self._vocab_size, conditions)

    def observe(self, batch: Round, verdict: Verdict) -> None:
        """Keep what the pass says of all its candidates."""
        laws, positions = batch.target_logp, batch.positions
        numbers = self._noise.gumbel(positions, self._vocab_size, laws.dtype)
        scores, tokens = (laws + numbers).topk(self._ranks, dim=-1)
        is_real = torch.nn.functional.pad(batch.drafts >= 0, (1, 0), value=True)
        stands = torch.where(is_real, positions, -1)
        self._passes = [(stands, self._contexts, tokens, scores), *self._passes[:1]]
        offsets = torch.where(is_real, positions - positions[:, :1], -1)
        self._first_laws.observe(batch, verdict, offsets, self._levels + 1)

    has_fixed_shapes = True

    def fix(self, num: int) -> None:
        """Give what is kept of earlier passes the shapes of passes of `num` candidates."""
        self._is_fixed = True
        padded = [tuple(_padded(part, num) for part in kept) for kept in self._passes]
        nothing = tuple(torch.full_like(part, -1) for part in padded[0])
        self._passes = [*padded, nothing][:2]

    def carry(self) -> list[Tensor]:
        """What one pass leaves for the next besides its drafts; see `restore`."""
        return [self._contexts, *self._passes[0], *self._passes[1], *self._first_laws.carry()]

    def restore(self, carried: list[Tensor]) -> None:
        """Go on from what a pass left."""
        num = len(self._passes[0])
        self._contexts, rest = carried[0], carried[1:]
        self._passes = [tuple(rest[:num]), tuple(rest[num : 2 * num])]
        self._first_laws.restore(rest[2 * num :])

    def propose(self, tokens: Tensor, lengths: Tensor, num: int, round_number: int) -> TokenTree:
        """See `arvision.decoding.loop.Drafter`; rows have trees of their own."""
        width = len(self._weights)
        places = lengths[:, None] - 1 - torch.arange(width, device=lengths.device)
        known = tokens.gather(1, places.clamp(min=0))
        root = torch.where(places >= 0, known, -1)
        levels = min(chain_length(num + 1), num)
        self._levels = levels
        if levels == 0:
            self._contexts = root[:, None]
            return TokenTree(tokens[:, :0])
        grown = self._grow(root, lengths, levels, num - levels + 1)
        tree, contexts = self._choose(*grown, num, levels)
        self._contexts = torch.cat([root[:, None], contexts], dim=1)
        return tree

    def _stored(self, positions: Tensor) -> tuple[Tensor, ...]:
        """Laws by position, positions [B, D]: whether there is one [B, D, M], contexts
        [B, D, M, K], tokens and scores [B, D, M, R]; the newest first."""
        stands, contexts, tokens, scores = (
            torch.cat(parts, dim=1) for parts in zip(*self._passes, strict=True)
        )
        num = stands.shape[1]
        newest = torch.arange(num, 0, -1, device=stands.device)
        fits = (stands[:, None] == positions[..., None]) * newest
        order, entry = fits.topk(min(num, 24), dim=-1)
        rows = torch.arange(len(stands), device=stands.device)[:, None, None]
        return order > 0, contexts[rows, entry], tokens[rows, entry], scores[rows, entry]

    def _grow(
        self, root: Tensor, lengths: Tensor, levels: int, width: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The best `width` candidates of every level, the one of the main chain in front.

        Only the best of a level can be among the best of all, and so can their children only.

        Returns:
            Tokens, parents (-1 for the root, else numbers of candidates) and log-probabilities
            [B, levels * width], and contexts [B, levels * width, K].
        """
        ranks = self._ranks
        sizes = (levels, width, ranks, root.shape[1])
        if self._tables is None or self._tables.sizes != sizes:
            self._tables = _tables(*sizes, root.device)
        tables = self._tables
        rows = torch.arange(len(root), device=root.device)[:, None, None]
        positions = lengths[:, None] + tables.levels
        table = self._laws_at(positions)
        contexts, chances, out = root[:, None], 0.0, []
        for stored, handicap, scores_of, tokens_of, bonus in zip(*table, tables.bonus, strict=True):
            mismatch = (contexts[:, :, None] != stored).mul(self._weight).sum(-1) + handicap
            least, entry = mismatch.min(-1, keepdim=True)
            scores = scores_of[rows, entry, tables.ranks] / (least.sqrt() + TAU[0] / TAU[1])
            chance = scores.log_softmax(-1) + chances + bonus
            size = chance.shape[1] * ranks
            chances, best = chance.view(-1, size, 1).topk(min(width, size), dim=1)
            above = best // ranks
            tokens = tokens_of[rows, entry, tables.ranks].view(-1, size)[rows, best]
            contexts = torch.cat([tokens, contexts[rows, above, tables.nearer]], dim=-1)
            out.append((tokens[..., 0], above[..., 0], chances[..., 0], contexts))
        tokens, above, chances, contexts = (
            torch.cat(parts, dim=1) for parts in zip(*out, strict=True)
        )
        is_outside = (positions >= self._num_tokens)[:, tables.level_of]
        chances = (chances - tables.surplus).clamp(min=NEVER).masked_fill(is_outside, NEVER)
        return tokens, above + tables.begins, chances, contexts

    def _laws_at(self, positions: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        """What is known of each of D positions [B, D]: stored laws, and behind them the first one.

        Returns:
            For each position contexts [B, 1, M + 1, K], what an entry has against it [B, 1, M + 1],
            and scores over the factor of tau, and tokens, [B, M + 1, R].
        """
        is_stored, stored, tokens_of, scores_of = self._stored(positions)
        first = self._first_laws.at(positions)
        first = first + self._noise.gumbel(
            positions.clamp(max=self._num_tokens - 1), self._vocab_size, first.dtype
        )
        first_scores, first_tokens = first.topk(self._ranks, dim=-1)
        # Of a first law every token differs, and what stands against it is more than all of them.
        most = sum(self._weights) + 1
        fair = (TAU[0] + TAU[1] * math.sqrt(most)) / FIRST_TAU
        scores = torch.cat([scores_of, fair * first_scores[:, :, None]], dim=2).double() / TAU[1]
        tokens = torch.cat([tokens_of, first_tokens[:, :, None]], dim=2)
        age = 1e-4 * torch.arange(is_stored.shape[2], device=positions.device)
        against = torch.where(is_stored, age, math.inf)
        against = torch.nn.functional.pad(against, (0, 1), value=1.0)
        contexts = torch.nn.functional.pad(stored, (0, 0, 0, 1), value=DIFFERENT)
        every = (contexts[:, :, None], against[:, :, None], scores, tokens)
        return tuple(part.unbind(1) for part in every)

    def _choose(
        self,
        tokens: Tensor,
        parents: Tensor,
        chances: Tensor,
        contexts: Tensor,
        num: int,
        levels: int,
    ) -> tuple[TokenTree, Tensor]:
        """The main chain and the best of all other candidates, `num` in all, with contexts."""
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        assert self._tables is not None
        key = chances.clone()
        key[:, self._tables.firsts] = math.inf
        num = min(num, key.shape[1])
        chosen = key.topk(num, dim=1).indices.sort(dim=1).values
        number = torch.full_like(tokens, -1)
        number.scatter_(1, chosen, torch.arange(num, device=tokens.device).expand_as(chosen))
        is_real = chances.gather(1, chosen) > NEVER / 2
        if self._min_share > 0:
            is_main = key.gather(1, chosen) == math.inf
            is_real = is_real & (is_main | (chances.gather(1, chosen) >= math.log(self._min_share)))
        above = parents.gather(1, chosen)
        above = torch.where(above < 0, -1, number.gather(1, above.clamp(min=0)))
        drafts = torch.where(is_real, tokens.gather(1, chosen), -1)
        above = torch.where(is_real, above, -1)
        contexts = contexts[rows, chosen]
        if self._min_share > 0:
            # What no row has is not fed, where a look costs no waiting.
            order = is_real.long().argsort(dim=1, descending=True, stable=True)
            is_seen = is_real.is_cpu and not self._is_fixed
            most = int(is_real.numpy().sum(1).max()) if is_seen else num
            # Real candidates move to the front and keep their order, so parents still come first.
            moved = torch.empty_like(order)
            moved.scatter_(1, order, torch.arange(num, device=order.device).expand_as(order))
            above = torch.where(above < 0, -1, moved.gather(1, above.clamp(min=0)))
            drafts, above = (x.gather(1, order)[:, :most] for x in (drafts, above))
            contexts = contexts[rows, order[:, :most]]
        return TokenTree(drafts, parents=above), contexts

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows`."""
        self._noise = self._noise.select(rows)
        self._contexts = self._contexts[rows]
        self._passes = [tuple(part[rows] for part in kept) for kept in self._passes]
        self._first_laws.select(rows)


class Tables(NamedTuple):
    """Numbers that growing looks up, made once; N candidates in all, R ranks.

    Attributes:
        sizes: what they were made for.
        levels: [L], ranks: [R] and nearer: [K - 1], which count from 0.
        bonus: of each level what puts the best child of the main chain in front, [W, R].
        firsts: [L], the candidates of the main chain.
        level_of: [N], of each candidate.
        begins: [N], the first candidate of the level above; -1 for the first level.
        surplus: [N], what is taken off a candidate's log-probability: the bonus of the main chain,
            and a trifle per level, so that no candidate is as probable as the one it hangs on.
    """

    sizes: tuple[int, ...]
    levels: Tensor
    ranks: Tensor
    nearer: Tensor
    bonus: tuple[Tensor, ...]
    firsts: Tensor
    level_of: Tensor
    begins: Tensor
    surplus: Tensor


@lru_cache(maxsize=64)
def _tables(levels: int, width: int, ranks: int, num: int, device: torch.device) -> Tables:
    """The tables of trees of so many levels, of `width` candidates each, and contexts of `num`."""
    widths = list(accumulate(range(levels), lambda w, _: min(width, w * ranks), initial=1))
    begins = list(accumulate(widths[1:], initial=0))
    bonus = []
    for level, own in enumerate(widths[:-1]):
        table = torch.zeros(own, ranks, dtype=torch.float64)
        # The chain's last candidate brings its bonus along, which is for its best child alone.
        table[0, 1:] = -BONUS if level else 0.0
        table[0, 0] = 0.0 if level else BONUS
        bonus.append(table.to(device))
    level_of = [level for level in range(levels) for _ in range(widths[level + 1])]
    firsts = begins[:-1]
    above = [begins[level - 1] if level else -1 for level in level_of]
    surplus = torch.tensor([1e-4 * (level + 1) for level in level_of], dtype=torch.float64)
    surplus[firsts] += BONUS
    counted = (torch.arange(count, device=device) for count in (levels, ranks, num - 1))
    listed = (torch.tensor(numbers, device=device) for numbers in (firsts, level_of, above))
    sizes = (levels, width, ranks, num)
    return Tables(sizes, *counted, tuple(bonus), *listed, surplus.to(device))


def _padded(part: Tensor, num: int) -> Tensor:
    """A pass's figures [B, E, ...] as those of `num` candidates; -1 for those that it had not."""
    out = part.new_full((len(part), num, *part.shape[2:]), -1)
    width = min(num, part.shape[1])
    out[:, :width] = part[:, :width]
    return out
