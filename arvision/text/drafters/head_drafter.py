"""Trees and units from draft heads, and heads that go on learning while they serve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...decoding.tree import TokenTree, best_tree, listed, none_left
from ...decoding.tree_levels import Level, by_level, levels_of
from ...decoding.verify import Round, Verdict
from ...errors import InputError
from ...networks import weight_of
from .base import TextDrafter, register
from .heads import DraftHeads, load_heads

RANKS = (0.5, 0.15, 0.08, 0.05, 0.03)
"""How often the guess of a rank is right, about what trained heads reach."""

SHAPES = ("tree", "unit")


@register("heads", summary="heads of `arvision train-draft`: Medusa, Hydra, Clover, Chimera")
class HeadDrafter(TextDrafter):
    """Guesses from the hidden state at the last accepted token.

    Shapes: "tree" is a fixed tree, the best for acceptances by rank; "unit" is a chain that ends
    before the first guess whose confidence is below `threshold` (Lexical Unit Decoding accepts such
    a unit unseen and is lossy; here the target verifies it).

    Args:
        heads: heads, or the folder of `arvision train-draft`.
        vocabulary: [W] tokens that the heads guess; None for what the folder says, or all.
        num_draft: candidates per pass.
        shape: see above.
        threshold: least confidence of a token in a unit.
        ranks: acceptances by rank.
        online: learning rate of updates from the target's own answers as they are served; 0 for
            none.
        every: examples gathered before an update.

    Raises:
        InputError: a value out of range, or heads of another width than the model's.

    Paper: Cai et al., "Medusa", 2024, section 2.1.2 and 2.3.3 (trees); Sun et al., "Lexical Unit
    Decoding", 2024 (units); Liu et al., "Online Speculative Decoding", 2023, section 4 (updates).
    """

    def __init__(
        self,
        heads: DraftHeads | str | Path,
        vocabulary: Tensor | None = None,
        num_draft: int = 8,
        shape: str = "tree",
        threshold: float = 0.3,
        ranks: Sequence[float] = RANKS,
        online: float = 0.0,
        every: int = 64,
    ) -> None:
        if shape not in SHAPES or not 0 <= threshold < 1 or num_draft < 1 or online < 0:
            raise InputError(
                f"shape {shape!r}, threshold {threshold}, num_draft {num_draft}, online {online}: "
                f"expected one of {', '.join(SHAPES)}, 0 <= threshold < 1, num_draft >= 1, a rate"
            )
        if isinstance(heads, str | Path):
            heads, vocabulary = load_heads(heads)
        self.heads, self.vocabulary = heads, vocabulary
        self.num_draft, self.shape, self.threshold = num_draft, shape, threshold
        self.ranks, self.every = tuple(ranks), every
        self._optimizer = torch.optim.AdamW(heads.parameters(), lr=online) if online else None
        self._examples: list[tuple[Tensor, Tensor]] = []
        self.num_updates = 0

    def begin(self, state: Any) -> None:
        """Take the target's embeddings and output layer."""
        network = state.model.network
        width = state.model.sizes.hidden_size
        if width != self.heads.hidden_size:
            raise InputError(f"heads of width {self.heads.hidden_size}: the model has {width}")
        self._embedding = weight_of(network.get_input_embeddings())
        output = weight_of(network.get_output_embeddings())
        if self.vocabulary is not None:
            self.vocabulary = self.vocabulary.to(output.device)
            if int(self.vocabulary.max()) >= len(output):
                raise InputError(
                    f"heads guess the token {int(self.vocabulary.max())}: the model has "
                    f"{len(output)}"
                )
            output = output[self.vocabulary]
        self._output = output
        self.heads.to(output.device, output.dtype)
        self._hidden: Tensor | None = None
        self._trees: dict[int, tuple[Tensor, list[Level]]] = {}

    needs_hidden = True

    @property
    def why_not_fixed(self) -> str | None:
        """Heads that go on learning look at every pass."""
        return None if self._optimizer is None else "heads that learn online do so on the host"

    def observe(self, batch: Round, verdict: Verdict) -> None:
        """Keep the hidden state at each row's last accepted token."""
        assert batch.hidden is not None
        last = verdict.counts - 1
        rows = torch.arange(len(last), device=last.device)
        if verdict.path is not None:
            node = verdict.path[rows, (last - 1).clamp(min=0)] + 1
            last = torch.where(last > 0, node, 0)
        self._hidden = batch.hidden[rows, last]
        if self._optimizer is not None:
            self._gather(batch, verdict)

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows`."""
        super().select(rows)
        if self._hidden is not None:
            self._hidden = self._hidden[rows]

    def logits(self, head: int, hidden: Tensor, path: Tensor) -> Tensor:
        """Logits [..., W] of a head; path [..., head + 1] holds tokens."""
        return self.heads(head, hidden, self._embedding[path]) @ self._output.T

    def _tokens(self, places: Tensor) -> Tensor:
        return places if self.vocabulary is None else self.vocabulary[places]

    @torch.no_grad()
    def propose(self, tokens: Tensor, lengths: Tensor, num: int, round_number: int) -> TokenTree:
        """See `arvision.decoding.loop.Drafter`."""
        self.follow(tokens, lengths)
        root = tokens.gather(1, lengths[:, None] - 1)
        if self.shape == "unit":
            return self._unit(root, num)
        if num not in self._trees:
            shape = by_level(best_tree(self.ranks, num, self.heads.num_heads))
            self._trees[num] = shape, levels_of(listed(shape), root.device)
        parents, levels = self._trees[num]
        assert self._hidden is not None
        paths, parts = root[:, None], [root[:, :0]]
        for head, level in enumerate(levels):
            paths = paths[:, level.above]
            places = paths.shape[1]
            hidden = self._hidden[:, None].expand(-1, places, -1)
            if self.heads.sees_path:
                scores = self.logits(head, hidden, paths)
            else:
                scores = self.logits(head, hidden[:, :1], paths[:, :1]).expand(-1, places, -1)
            best = self._tokens(scores.topk(min(level.widest, scores.shape[-1]), dim=-1).indices)
            parts.append(level.pick(best))
            paths = torch.cat([paths[:, level.places], parts[-1][..., None]], dim=2)
        return TokenTree(torch.cat(parts, dim=1), parents=parents)

    def _unit(self, root: Tensor, num: int) -> TokenTree:
        """A chain as long as it is confident."""
        assert self._hidden is not None
        path, sure = root, torch.ones_like(root[:, 0], dtype=torch.bool)
        drafts = root[:, :0]
        for head in range(min(num, self.heads.num_heads)):
            best = self.logits(head, self._hidden, path).float().softmax(-1).max(-1)
            sure = sure & (best.values >= self.threshold)
            if not self.is_fixed and none_left(sure):
                break
            token = self._tokens(best.indices)
            drafts = torch.cat([drafts, token.where(sure, -1)[:, None]], dim=1)
            path = torch.cat([path, token[:, None]], dim=1)
        return TokenTree(drafts)

    def _gather(self, batch: Round, verdict: Verdict) -> None:
        """Examples from a pass: the hidden state it began with, and the tokens that followed."""
        assert batch.hidden is not None
        for row, count in enumerate(verdict.given or ()):
            if count >= 2:
                self._examples.append(
                    (batch.hidden[row, 0].detach(), verdict.tokens[row, :count].detach())
                )
        if len(self._examples) >= self.every:
            self.update()

    @torch.enable_grad()
    def update(self) -> None:
        """One step on the examples gathered so far."""
        assert self._optimizer is not None
        losses = []
        for head in range(self.heads.num_heads):
            fitting = [pair for pair in self._examples if len(pair[1]) >= head + 2]
            if not fitting:
                continue
            hidden = torch.stack([hidden for hidden, _ in fitting])
            tokens = torch.stack([tokens[: head + 2] for _, tokens in fitting])
            goal = tokens[:, -1]
            if self.vocabulary is not None:
                found = (self.vocabulary == goal[:, None]).long()
                known = found.any(1)
                hidden, tokens, goal = hidden[known], tokens[known], found.argmax(1)[known]
            if len(goal):
                scores = self.logits(head, hidden, tokens[:, :-1]).float()
                losses.append(torch.nn.functional.cross_entropy(scores, goal))
        self._examples.clear()
        if losses:
            self._optimizer.zero_grad()
            torch.stack(losses).mean().backward()
            self._optimizer.step()
            self.num_updates += 1
