"""Trees and units from draft heads, and heads that go on learning while they serve."""

from __future__ import annotations

import copy
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
from .features import FeatureState, features_along, features_of
from .heads import DraftHeads, PrefixHeads, load_heads, save_heads
from .online import Replay, cross_entropy, ended

RANKS = (0.5, 0.15, 0.08, 0.05, 0.03)
"""How often the guess of a rank is right, about what trained heads reach."""

SHAPES = ("tree", "unit")


@register("heads", summary="heads of `arvision train-draft`: Medusa, Hydra, Clover, Chimera")
class HeadDrafter(TextDrafter):
    """Guesses from the hidden state at the last accepted token, or from the prefix's (`PrefixHeads`).

    Shapes: "tree" is a fixed tree, the best for the accuracies that were measured when the heads were
    fitted, by head and rank, or else for `RANKS`; "unit" is a chain that ends
    before the first guess whose confidence is below `threshold` (Lexical Unit Decoding accepts such
    a unit unseen and is lossy; here the target verifies it).

    Args:
        heads: heads, or the folder of `arvision train-draft`.
        vocabulary: [W] tokens that the heads guess; None for what the folder says, or all.
        num_draft: candidates per pass.
        shape: see above.
        threshold: least confidence of a token in a unit.
        ranks: acceptances by rank, at all levels or by level; None for the measured ones.
        online: learning rate of updates from the target's own answers as they are served; 0 for
            none. Examples are the places where drafts ended: what the heads saw there, and the
            target's law. A copy of the heads learns, in float32; their prefix layer stays.
        every: examples gathered before an update.
        capacity: examples that are kept to be learned from again.

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
        ranks: Sequence[Any] | None = None,
        online: float = 0.0,
        every: int = 64,
        capacity: int = 1024,
    ) -> None:
        if shape not in SHAPES or not 0 <= threshold < 1 or num_draft < 1:
            raise InputError(
                f"shape {shape!r}, threshold {threshold}, num_draft {num_draft}: "
                f"expected one of {', '.join(SHAPES)}, 0 <= threshold < 1, num_draft >= 1"
            )
        if isinstance(heads, str | Path):
            heads, vocabulary = load_heads(heads)
        elif online:
            heads = copy.deepcopy(heads)
        self.heads, self.vocabulary = heads, vocabulary
        self.num_draft, self.shape, self.threshold = num_draft, shape, threshold
        self.ranks = tuple(ranks or heads.accuracies or RANKS)
        self.replay: Replay | None = None
        if online:
            trained = dict(heads.float().named_parameters())
            learning = [p for name, p in trained.items() if not name.startswith("prefix.")]
            self.replay = Replay(learning, online, every, capacity)

    def watches(self, model: Any) -> tuple[int, ...]:
        """See `TextDrafter`."""
        return self.heads.watches(model) if isinstance(self.heads, PrefixHeads) else ()

    def begin(self, state: Any) -> None:
        """Take the target's embeddings and output layer, and read the prompts where heads do."""
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
        self._dtype = output.dtype if self.replay is None else torch.float32
        self.heads.to(output.device, self._dtype)
        self._hidden: Tensor | None = None
        self._source: tuple[Tensor, Tensor] | None = None
        self._read: FeatureState | None = None
        if isinstance(self.heads, PrefixHeads):
            room = self.num_tokens + state.model.tree_room
            features = features_of(state, self)
            with torch.no_grad():
                self._read = FeatureState(
                    self.heads, self._embed, self.histories, features, _same, room
                )
            self._target = state
        self._trees: dict[int, tuple[Tensor, list[Level]]] = {}

    needs_hidden = True
    renewed = ("_hidden", "_source")

    @property
    def why_not_fixed(self) -> str | None:
        """Heads that go on learning, or read the prefix, look at every pass."""
        if self.replay is not None:
            return "heads that learn online do so on the host"
        return None if self._read is None else "heads of a prefix read it on the host"

    def observe(self, batch: Round, verdict: Verdict) -> None:
        """Keep what the heads draft from next: the hidden state at each row's last accepted token."""
        assert batch.hidden is not None
        last = ended(verdict)
        rows = torch.arange(len(last), device=last.device)
        if self.replay is not None and self._source is not None:
            self._gather(batch, verdict, last)
        if self._read is None:
            self._hidden = batch.hidden[rows, last]
        elif batch.number != 0:  # of the prefill the features were read already
            self._read.take(features_along(self._target.features, verdict), verdict.counts)

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows`."""
        super().select(rows)
        if self._hidden is not None:
            self._hidden = self._hidden[rows]
        if self._read is not None:
            self._read.select(rows)

    def _embed(self, tokens: Tensor) -> Tensor:
        return self._embedding[tokens]

    def logits(self, head: int, hidden: Tensor, path: Tensor) -> Tensor:
        """Logits [..., W] of a head.

        Args:
            head: number k of the head.
            hidden: [..., C], see `DraftHeads`.
            path: [..., R + k + 1], tokens.
        """
        guess = self.heads(head, hidden.to(self._dtype), self._embed(path).to(self._dtype))
        return guess.to(self._output.dtype) @ self._output.T

    def _tokens(self, places: Tensor) -> Tensor:
        return places if self.vocabulary is None else self.vocabulary[places]

    @torch.no_grad()
    def propose(self, tokens: Tensor, lengths: Tensor, num: int, round_number: int) -> TokenTree:
        """See `arvision.decoding.loop.Drafter`."""
        self.follow(tokens, lengths)
        root = tokens.gather(1, lengths[:, None] - 1)
        if self._read is None:
            assert self._hidden is not None
            source = self._hidden, root
        else:
            hidden = self._read.follow(tokens, lengths)
            source = hidden, torch.cat([self._read.before, root], dim=1)
        self._source = source
        if self.shape == "unit":
            return self._unit(*source, num)
        return self._tree(*source, num)

    def _tree(self, hidden: Tensor, root: Tensor, num: int) -> TokenTree:
        """The fixed tree behind hidden states [B, C] and the tokens [B, R + 1] before it."""
        if num not in self._trees:
            shape = by_level(best_tree(self.ranks, num, self.heads.num_heads))
            tree = shape, levels_of(listed(shape), root.device)
            self._trees[num] = self._trees[len(shape)] = tree
        parents, levels = self._trees[num]
        paths, parts = root[:, None], [root[:, :0]]
        for head, level in enumerate(levels):
            paths = paths[:, level.above]
            places = paths.shape[1]
            seen = hidden[:, None].expand(-1, places, -1)
            if self.heads.sees_path:
                scores = self.logits(head, seen, paths)
            else:
                scores = self.logits(head, seen[:, :1], paths[:, :1]).expand(-1, places, -1)
            best = self._tokens(scores.topk(min(level.widest, scores.shape[-1]), dim=-1).indices)
            parts.append(level.pick(best))
            paths = torch.cat([paths[:, level.places], parts[-1][..., None]], dim=2)
        return TokenTree(torch.cat(parts, dim=1), parents=parents)

    def _unit(self, hidden: Tensor, root: Tensor, num: int) -> TokenTree:
        """A chain as long as it is confident."""
        path, sure = root, torch.ones_like(root[:, 0], dtype=torch.bool)
        drafts = root[:, :0]
        for head in range(min(num, self.heads.num_heads)):
            best = self.logits(head, hidden, path).float().softmax(-1).max(-1)
            sure = sure & (best.values >= self.threshold)
            if not self.is_fixed and none_left(sure):
                break
            token = self._tokens(best.indices)
            drafts = torch.cat([drafts, token.where(sure, -1)[:, None]], dim=1)
            path = torch.cat([path, token[:, None]], dim=1)
        return TokenTree(drafts)

    def _gather(self, batch: Round, verdict: Verdict, last: Tensor) -> None:
        """Examples from a pass: where each row's drafts ended, what the head there had seen, and the
        target's law; `last` [B] is the law's place."""
        assert self._source is not None
        assert self.replay is not None
        hidden, root = self._source
        rows = torch.arange(len(last), device=last.device)
        laws = batch.target_logp[rows, last].float().log_softmax(-1)
        laws = laws if self.vocabulary is None else laws[:, self.vocabulary]
        for row, count in enumerate(verdict.given or ()):
            if count <= self.heads.num_heads:
                path = torch.cat([root[row], verdict.tokens[row, : count - 1]])
                law = laws[row].to(torch.float16)
                self.replay.add((count - 1, hidden[row].detach(), path, law))
        self._source = None
        self.replay.learn(self._loss)

    def _loss(self, examples: Sequence[tuple[int, Tensor, Tensor, Tensor]]) -> Tensor:
        """Mean cross-entropy of the heads that were wrong from the target's laws."""
        losses = []
        for head in sorted({head for head, *_ in examples}):
            own = [rest for level, *rest in examples if level == head]
            hidden, path, laws = (torch.stack(part) for part in zip(*own, strict=True))
            losses.append(cross_entropy(laws, self.logits(head, hidden, path)))
        return torch.cat(losses).mean()

    def save(self, folder: str | Path) -> None:
        """Write the heads as they are now, to be loaded as those of `arvision train-draft`."""
        vocabulary = self.vocabulary
        if vocabulary is None:
            if not hasattr(self, "_output"):
                raise InputError(
                    "heads that never drafted do not know their tokens: nothing to save"
                )
            vocabulary = torch.arange(len(self._output))
        save_heads(self.heads, vocabulary, folder)


def _same(hidden: Tensor) -> Tensor:
    """What is read is no law."""
    return hidden
