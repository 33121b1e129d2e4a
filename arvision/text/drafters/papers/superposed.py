"""Several drafts for the price of one: a pass reads all of them at once, added up."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict

import torch
from torch import Tensor

from ....decoding.tree import TokenTree, join_rows
from ....errors import InputError
from ....networks import place_of
from ..base import Trie, register
from .short_target import ShortTarget, num_skipped, spread_layers


@register("superposed", summary="several drafts from passes over added embeddings (Superposed)")
class Superposed(ShortTarget):
    """The target, or part of its layers, drafts several paths in one pass per place.

    What is fed is the sum of the paths' last embeddings, weighted by the paths' probabilities. The
    one law that comes out serves every path; which token suits which path is told by the bigrams of
    its row so far. The best paths stay.

    Args:
        num_paths: drafts at a time, k.
        depth: tokens of a draft.
        skip: share of the middle layers that do not run; 0 for the whole target.
        bigram_weight: of the bigrams' law against the model's, 0 to 1.

    Raises:
        InputError: a value out of range.

    Paper: Shen et al., "Superposed Decoding: Multiple Generations from a Single Autoregressive
    Inference Pass", 2024, section 3 (there the drafts are suggestions and nothing verifies them;
    its n-grams come from large corpora).
    """

    def __init__(
        self,
        num_paths: int = 3,
        depth: int = 3,
        skip: float = 0.4,
        bigram_weight: float = 0.4,
    ) -> None:
        super().__init__()
        if num_paths < 1 or depth < 1 or not 0 <= skip < 1 or not 0 <= bigram_weight <= 1:
            raise InputError(
                f"num_paths {num_paths}, depth {depth}, skip {skip}, bigram_weight {bigram_weight}: "
                "expected at least 1, at least 1, 0 <= skip < 1, a share"
            )
        self.num_paths, self.depth, self.bigram_weight = num_paths, depth, bigram_weight
        self.skip, self.num_draft = skip, num_paths * depth

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
        follows = [_bigrams(history) for history in self.histories]
        rows = [[([], 0.0)] for _ in range(len(lengths))]
        for _ in range(min(self.depth, num)):
            law = self.shaped(self.state.draft(last, embeddings=fed, layers=layers)[:, -1])
            best = law.topk(min(law.shape[-1], 2 * self.num_paths), dim=-1)
            # Tokens are exact in the numbers of the laws: one read for both.
            both = torch.stack([best.indices.double(), best.values.double()], dim=-1).tolist()
            tops = [[(int(token), logp) for token, logp in own] for own in both]
            rows = [
                self._longer(paths, tops[row], follows[row], self.histories[row][-1])
                for row, paths in enumerate(rows)
            ]
            fed = torch.cat([fed, self._superpose(rows, embed)], dim=1)
            last = torch.cat([last, last[:, -1:]], dim=1)
        trees = []
        for paths in rows:
            trie = Trie(num)
            for path, _ in paths:
                trie.add(path)
            trees.append(trie.tree)
        return join_rows(trees, tokens.device)

    def _longer(
        self,
        paths: list[tuple[list[int], float]],
        candidates: list[tuple[int, float]],
        follows: dict[int, Counter[int]],
        root: int,
    ) -> list[tuple[list[int], float]]:
        """The best paths that are longer by a token, with their log-probabilities."""
        found = []
        for path, score in paths:
            seen = follows[path[-1] if path else root]
            total = sum(seen.values())
            for token, logp in candidates:
                share = (seen[token] + 0.5) / (total + 0.5 * len(candidates))
                known = math.log(share)
                weight = self.bigram_weight if total else 0.0
                found.append(([*path, token], score + (1 - weight) * logp + weight * known))
        return sorted(found, key=lambda item: -item[1])[: self.num_paths]

    @staticmethod
    def _superpose(rows: list[list[tuple[list[int], float]]], embed: torch.nn.Module) -> Tensor:
        """Sums [B, 1, C] of the embeddings of the paths' last tokens."""
        sums = []
        for paths in rows:
            device = place_of(embed)
            tokens = torch.tensor([path[-1] for path, _ in paths], device=device)
            weights = torch.tensor([score for _, score in paths], device=device).softmax(0)
            vectors = embed(tokens)
            sums.append((weights.to(vectors.dtype) @ vectors)[None])
        return torch.stack(sums)


def _bigrams(history: list[int]) -> dict[int, Counter[int]]:
    """What followed each token of a row, and how often."""
    follows: dict[int, Counter[int]] = defaultdict(Counter)
    for token, successor in itertools.pairwise(history):
        follows[token][successor] += 1
    return follows
