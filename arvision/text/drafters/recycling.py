"""Token Recycling: candidates that the target thought of and did not choose."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ...decoding.noise import Noise
from ...decoding.tree import TokenTree, best_tree, listed, without_padding
from ...decoding.tree_levels import Level, by_level, levels_of
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
        self._trees: dict[int, tuple[Tensor, list[Level]]] = {}

    def start(self, noise: Noise, vocab_size: int, num_tokens: int) -> None:
        """Keep the matrix, unless it is another vocabulary's."""
        super().start(noise, vocab_size, num_tokens)
        if self.matrix is None or len(self.matrix) != vocab_size:
            self.matrix = torch.full((vocab_size, self.k), -1, dtype=torch.int64)
        self.matrix, self._trees = self.matrix.cpu(), {}
        self._root = torch.zeros(len(noise), 1, dtype=torch.int64)

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

    def _layout(self, num: int) -> tuple[Tensor, list[Level]]:
        """Parents of the tree of `num`, and its levels."""
        if num not in self._trees:
            parents = by_level(best_tree(self.ranks, num, self.max_depth))
            assert self.matrix is not None
            tree = parents, levels_of(listed(parents), self.matrix.device)
            self._trees[num] = self._trees[len(parents)] = tree
        return self._trees[num]

    why_not_fixed = None  # pyright: ignore[reportAssignmentType]
    renewed = ("matrix", "_root")

    def fix(self, num: int) -> None:
        """The matrix moves to where the laws are."""
        assert self.matrix is not None
        super().fix(num)
        self.matrix, self._trees = self.matrix.to(self.noise.device), {}

    def carry(self) -> list[Tensor]:
        """The matrix, and the token that the pass begins with."""
        assert self.matrix is not None
        return [self.matrix, self._root]

    def restore(self, carried: list[Tensor]) -> None:
        """Go on from what a pass left."""
        self.matrix, self._root = carried

    def propose(self, tokens: Tensor, lengths: Tensor, num: int, round_number: int) -> TokenTree:
        """The tree filled from the matrix."""
        assert self.matrix is not None
        self.follow(tokens, lengths)
        if self.is_fixed:
            self._root = tokens.gather(1, lengths[:, None] - 1)
        else:
            self._root = torch.tensor([text[-1:] for text in self.histories])
        parents, levels = self._layout(num)
        before, parts = self._root, [self._root[:, :0]]
        for level in levels:
            source = before[:, level.above][:, level.places]
            found = self.matrix[source.clamp(min=0), level.ranks]
            before = torch.where(source < 0, -1, found)
            parts.append(before)
        drafts = torch.cat(parts, dim=1)
        if self.is_fixed:
            return TokenTree(drafts, parents=parents)
        return without_padding(drafts.numpy(), parents.numpy(), tokens.device)

    def asks(self, batch: Round, verdict: Verdict) -> Sequence[Tensor]:
        """All candidates, and the best tokens after each."""
        return [batch.drafts, self._best_of(batch)]

    def hear(self, new: Sequence[list[int]], told: Sequence[list[int]]) -> None:
        """Renew the rows of all tokens that the pass looked at."""
        # The histories have not heard of this pass yet: they end with the token it began with.
        roots = torch.tensor([text[-1:] for text in self.histories])
        drafts = torch.tensor(told[0], dtype=torch.int64).view(len(roots), -1)
        seen = torch.cat([roots, drafts], dim=1)
        self._renew(seen, torch.tensor(told[1]).view(*seen.shape, -1))
        super().hear(new, told)

    def observe(self, batch: Round, verdict: Verdict) -> None:
        """The same where the laws are, in passes of fixed shapes."""
        if self.is_fixed:
            seen = torch.cat([self._root, batch.drafts], dim=1)
            # A row that has ended looks at nothing any more.
            self._renew(seen.where(verdict.counts[:, None] > 0, -1), self._best_of(batch))

    def _best_of(self, batch: Round) -> Tensor:
        num = min(self.k, batch.target_logp.shape[-1])
        return batch.target_logp.topk(num, dim=-1).indices

    def _renew(self, seen: Tensor, best: Tensor) -> None:
        """The rows of tokens `seen` [B, T] (-1 for none) are `best` [B, T, k] now, the last if several."""
        assert self.matrix is not None
        tokens, best = seen.flatten(), best.flatten(0, 1)
        is_there = (tokens >= 0) & (tokens < len(self.matrix))
        tokens, order = torch.where(is_there, tokens, 0), torch.arange(tokens.numel()).to(tokens)
        last = order.new_full((len(self.matrix),), -1)
        last.scatter_reduce_(0, tokens, torch.where(is_there, order, -1), "amax")
        # Entries of one token all write the same, so that their order does not matter.
        last = last[tokens]
        own = self.matrix[tokens, : best.shape[1]]
        own = torch.where((last >= 0)[:, None], best[last.clamp(min=0)], own)
        self.matrix[tokens, : best.shape[1]] = own

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows`."""
        super().select(rows)
        self._root = self._root[rows.to(self._root.device)]
