"""Several drafts for the price of one: a pass reads all of them at once, added up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....decoding.tree import TokenTree, join_rows
from ....errors import InputError
from ....networks import place_of
from ...ngrams import NGrams, mixed
from ..base import Trie, register
from .short_target import ShortTarget, num_skipped, spread_layers


@dataclass(frozen=True)
class Draft:
    """A continuation under way.

    Attributes:
        tokens: so far.
        score: sum of the logarithms that it is ranked by.
        is_finished: whether it ended.
    """

    tokens: tuple[int, ...] = ()
    score: float = 0.0
    is_finished: bool = False


def longer(
    drafts: Sequence[Draft],
    tokens: Sequence[int],
    logp: Sequence[float],
    sources: Sequence[NGrams],
    context: Sequence[int],
    *,
    num: int,
    alpha: float,
    delta: float,
    ends: Sequence[int] = (),
) -> list[Draft]:
    """The best `num` of all drafts, each followed by each of some tokens.

    The model's one law serves every draft; which token suits which draft is told by n-grams.

    Args:
        drafts: so far; finished ones stay as they are.
        tokens: the likeliest under the superposed law.
        logp: their log-probabilities.
        sources: n-grams; of several the surest counts. None for the model's law alone.
        context: tokens before the drafts.
        num: drafts that stay.
        alpha: weight of the n-grams.
        delta: probability in the place of an n-gram that was never seen.
        ends: tokens that finish a draft.

    Paper: Shen et al., "Superposed Decoding: Multiple Generations from a Single Autoregressive
    Inference Pass", 2024, section 3.
    """
    found = [draft for draft in drafts if draft.is_finished]
    for draft in drafts:
        if draft.is_finished:
            continue
        scores = np.asarray(logp)
        if sources:
            before = [*context, *draft.tokens]
            shares = np.max([s.probabilities(before, tokens) for s in sources], axis=0)
            scores = mixed(logp, shares, alpha, delta)
        for token, score in zip(tokens, scores.tolist(), strict=True):
            path = (*draft.tokens, token)
            found.append(Draft(path, draft.score + score, token in ends))
    return sorted(found, key=lambda draft: -draft.score)[:num]


def superposed(rows: Sequence[Sequence[Draft]], embed: Any) -> Tensor:
    """For each row the sum [B, 1, C] of the embeddings of its drafts' last tokens, weighted by the
    drafts' probabilities."""
    device, sums = place_of(embed), []
    for drafts in rows:
        tokens = torch.tensor([draft.tokens[-1] for draft in drafts], device=device)
        weights = torch.tensor([draft.score for draft in drafts], device=device).softmax(0)
        vectors = embed(tokens)
        sums.append((weights.to(vectors.dtype) @ vectors)[None])
    return torch.stack(sums)


@register("superposed", summary="several drafts from passes over added embeddings (Superposed)")
class Superposed(ShortTarget):
    """The target, or part of its layers, drafts several paths in one pass per place.

    What is fed is the sum of the paths' last embeddings, weighted by the paths' probabilities. The
    one law that comes out serves every path; which token suits which path is told by the n-grams of
    its row so far, and of a corpus. The best paths stay. `arvision.complete` hands them out as they
    are; here they are drafts, and a rule verifies them.

    Args:
        num_paths: drafts at a time, k.
        depth: tokens of a draft.
        skip: share of the middle layers that do not run; 0 for the whole target.
        alpha: of the n-grams' law against the model's, 0 to 1.
        delta: probability of an n-gram that was never seen.
        corpus: lists of ids to take n-grams from, besides the row's own text.

    Raises:
        InputError: a value out of range.

    Paper: see `longer`.
    """

    def __init__(
        self,
        num_paths: int = 3,
        depth: int = 3,
        skip: float = 0.4,
        alpha: float = 0.4,
        delta: float = 1e-3,
        corpus: Iterable[Sequence[int]] = (),
    ) -> None:
        super().__init__()
        fits = 0 <= skip < 1 and 0 <= alpha <= 1 and 0 < delta <= 1
        if num_paths < 1 or depth < 1 or not fits:
            raise InputError(
                f"num_paths {num_paths}, depth {depth}, skip {skip}, alpha {alpha}, delta {delta}: "
                "expected at least 1, at least 1, 0 <= skip < 1, a share, a probability above 0"
            )
        self.num_paths, self.depth, self.alpha, self.delta = num_paths, depth, alpha, delta
        self.skip, self.num_draft = skip, num_paths * depth
        texts = [list(text) for text in corpus]
        self._known = [NGrams(texts)] if texts else []

    @property
    def _layers(self) -> list[int] | None:
        num = self.state.model.sizes.num_layers
        skipped = num_skipped(num, self.skip)
        return spread_layers(num, skipped) if skipped else None

    def propose(self, tokens: Tensor, lengths: Tensor, num: int, round_number: int) -> TokenTree:
        """The best paths as a tree; see `arvision.decoding.loop.Drafter`."""
        self.follow(tokens, lengths)
        embed = self.state.model.network.get_input_embeddings()
        last = tokens.gather(1, lengths[:, None] - 1)
        fed, layers = embed(last), self._layers
        sources = [[NGrams([history]), *self._known] for history in self.histories]
        rows = [[Draft()] for _ in range(len(lengths))]
        for _ in range(min(self.depth, num)):
            law = self.shaped(self.state.draft(last, embeddings=fed, layers=layers)[:, -1])
            best = law.topk(min(law.shape[-1], 2 * self.num_paths), dim=-1)
            # Tokens are exact in the numbers of the laws: one read for both.
            both = torch.stack([best.indices.double(), best.values.double()], dim=1).tolist()
            rows = [
                longer(
                    drafts,
                    [int(token) for token in both[row][0]],
                    both[row][1],
                    sources[row],
                    self.histories[row],
                    num=self.num_paths,
                    alpha=self.alpha,
                    delta=self.delta,
                )
                for row, drafts in enumerate(rows)
            ]
            fed = torch.cat([fed, superposed(rows, embed)], dim=1)
            last = torch.cat([last, last[:, -1:]], dim=1)
        trees = []
        for drafts in rows:
            trie = Trie(num)
            for draft in drafts:
                trie.add(list(draft.tokens))
            trees.append(trie.tree)
        return join_rows(trees, tokens.device)
