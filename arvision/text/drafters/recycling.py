"""Token Recycling: candidates that the target thought of and did not choose."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...decoding.noise import Noise
from ...decoding.tree import TokenTree, best_tree, topology, without_padding
from ...decoding.verify import Round, Verdict
from ...errors import InputError
from .base import TextDrafter, register

RANKS = (0.42, 0.13, 0.08, 0.05, 0.04, 0.03, 0.02, 0.02)
"""How often the successor of a rank is right, measured on SmolLM2-135M (chat prompts)."""


@register("token_recycling", summary="the target's own top candidates, seen after a token")
class TokenRecycling(TextDrafter):
    """A matrix holds, for every token, the k most likely ones last seen after it.

    A draft is a fixed tree filled from the matrix, breadth first; every pass renews the rows of all
    its candidates, accepted or not. Nothing is trained, and the matrix (V x k) stays with the
    object: use it again and the next text starts warm.

    Args:
        k: successors kept per token.
        num_draft: candidates per pass.
        max_depth: levels of the tree.
        ranks: how often the successor of each rank is right; the tree follows from it.
        seed_prompt: fill the matrix from the prompt's own pairs of tokens first.

    Raises:
        InputError: a value out of range.

    Paper: Luo et al., "Turning Trash into Treasure: Accelerating Inference of Large Language Models
    with Token Recycling", 2024, sections 3.1-3.3.
    """

    def __init__(
        self,
        k: int = 8,
        num_draft: int = 20,
        max_depth: int = 6,
        ranks: Sequence[float] = RANKS,
        seed_prompt: bool = True,
    ) -> None:
        if not 1 <= k <= len(ranks) or num_draft < 1 or max_depth < 1:
            raise InputError(
                f"k {k}, num_draft {num_draft}, max_depth {max_depth}: expected 1 <= k <= "
                f"{len(ranks)}, the others >= 1"
            )
        self.k, self.num_draft, self.max_depth = k, num_draft, max_depth
        self.ranks, self.seed_prompt = tuple(ranks[:k]), seed_prompt
        self.matrix: Tensor | None = None
        self._trees: dict[int, tuple[Any, list[tuple[Any, Any, Any]]]] = {}

    def start(self, noise: Noise, vocab_size: int, num_tokens: int) -> None:
        """Keep the matrix, unless it is another vocabulary's."""
        super().start(noise, vocab_size, num_tokens)
        if self.matrix is None or len(self.matrix) != vocab_size:
            self.matrix = torch.full((vocab_size, self.k), -1, dtype=torch.int64)

    def begin(self, state: object) -> None:
        """What follows a token in the prompt goes to the front of its row."""
        assert self.matrix is not None
        if not self.seed_prompt:
            return
        for text in self.histories:
            rows: dict[int, list[int]] = {}
            for token, after in pairwise(text):
                row = rows.get(token)
                if row is None:
                    row = rows[token] = self.matrix[token].tolist()
                if after in row:
                    row.remove(after)
                row.insert(0, after)
                del row[self.k :]
            if rows:
                self.matrix[torch.tensor(list(rows))] = torch.tensor(list(rows.values()))

    def _layout(self, num: int) -> tuple[Any, list[tuple[Any, Any, Any]]]:
        """Parents of the tree of `num`, and for each level its nodes, their parents and ranks."""
        if num not in self._trees:
            parents = best_tree(self.ranks, num, self.max_depth)
            shape = topology(tuple(parents.tolist()), torch.device("cpu"))
            ranks = torch.zeros_like(parents)
            for siblings in shape.children:
                own = siblings[siblings >= 0]
                ranks[own] = torch.arange(len(own))
            levels = []
            for level in range(shape.num_levels):
                nodes = (shape.depths == level).nonzero()[:, 0]
                levels.append(tuple(x.numpy() for x in (nodes, parents[nodes], ranks[nodes])))
            self._trees[num] = parents.numpy(), levels
        return self._trees[num]

    def propose(self, tokens: Tensor, lengths: Tensor, num: int, round_number: int) -> TokenTree:
        """The tree filled from the matrix."""
        assert self.matrix is not None
        self.follow(tokens, lengths)
        parents, levels = self._layout(num)
        root = np.array([text[-1:] for text in self.histories])
        drafts, table = np.full((len(root), num), -1), self.matrix.numpy()
        for nodes, above, ranks in levels:
            source = root if above[0] < 0 else drafts[:, above]
            drafts[:, nodes] = np.where(source < 0, -1, table[source.clip(min=0), ranks])
        return without_padding(drafts, parents, tokens.device)

    def asks(self, batch: Round, verdict: Verdict) -> Sequence[Tensor]:
        """All candidates, and the best tokens after each."""
        num = min(self.k, batch.target_logp.shape[-1])
        return [batch.drafts, batch.target_logp.topk(num, dim=-1).indices]

    def hear(self, new: Sequence[list[int]], told: Sequence[list[int]]) -> None:
        """Renew the rows of all tokens that the pass looked at."""
        assert self.matrix is not None
        # The histories have not heard of this pass yet: they end with the token it began with.
        roots = np.array([text[-1:] for text in self.histories])
        drafts = np.array(told[0], dtype=np.int64).reshape(len(roots), -1)
        seen = np.concatenate([roots, drafts], axis=1)
        best = np.array(told[1]).reshape(*seen.shape, -1)
        valid = (seen >= 0) & (seen < len(self.matrix))
        self.matrix.numpy()[seen[valid], : best.shape[-1]] = best[valid]
        super().hear(new, told)
