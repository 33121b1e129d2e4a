"""Drafting from what the target's layers make of a text: one decoder layer that goes on by itself.

A feature network reads pairs of a token and the feature of the place before it. For committed text the
features are the target's own; behind it they are the network's own outputs, one level of the tree
after another. EAGLE's heads and the MTP layers that ship inside models are both of this kind, so
both draft with everything that a draft model can: chains, dynamic trees, draws for every rule.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ...decoding.cache import KVCache
from ...decoding.logits import Shaping
from ...decoding.transformers_cache import CacheView
from ...decoding.tree import Topology, topology_of
from ...decoding.verify import Round, Verdict
from ...errors import InputError
from .draft_tree import DraftTree, in_vocabulary

READ = 1024
"""Tokens of a prompt that a feature network reads at once."""


class FeatureNetwork(Protocol):
    """What `FeatureTree` asks of a network, besides `vocab_size` (None where that is not known).

    A network that only reads (`follow`) may have a `reach` R: then `embedded` holds at each place the
    embeddings of the token and of the R before it, [B, T, (R + 1) C].
    """

    @property
    def cache_sizes(self) -> tuple[int, int, int]:
        """Key/value heads, their width, the width of values."""
        ...

    def watches(self, model: Any) -> tuple[int, ...]:
        """Layers of the target whose inputs are its features."""
        ...

    def fuse(self, features: Tensor) -> Tensor:
        """Features [..., F C] of the target as what `step` takes, [..., C]."""
        ...

    def step(
        self, embedded: Tensor, hidden: Tensor, mask: Tensor, positions: Tensor, cache: Any
    ) -> Tensor:
        """What the network makes of pairs, [B, T, C].

        Args:
            embedded: [B, T, C], embeddings of tokens.
            hidden: [B, T, C], the features of the places before.
            mask: [B or 1, 1, T, S], additive.
            positions: [B, T] int64.
            cache: takes keys and values, as transformers' caches do.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] in the target's vocabulary."""
        ...


def cache_name(attention: Any) -> str:
    """What an attention layer of transformers calls its cache."""
    accepts = inspect.signature(attention.forward).parameters
    return "cache" if "cache" in accepts else "past_key_values"


class FeatureState:
    """A feature network's pairs, kept where the target's final tokens are.

    Args:
        network: the feature network.
        embed: tokens [B, T] to embeddings [B, T, C], the target's.
        prompts: ids of each row.
        features: [B, L, F C], the target's features of the prompts, padded on the right.
        shape: logits to log-probabilities.
        room: new tokens and candidates that fit behind the longest prompt.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        embed: Callable[[Tensor], Tensor],
        prompts: Sequence[Sequence[int]],
        features: Tensor,
        shape: Callable[[Tensor], Tensor],
        room: int,
    ) -> None:
        self._network, self._embed, self._shape = network, embed, shape
        self._reach: int = getattr(network, "reach", 0)
        heads, key_width, value_width = network.cache_sizes
        fused = network.fuse(features)
        device = fused.device
        longest = features.shape[1]
        self.cache = KVCache(
            1, len(prompts), heads, longest + room, key_width,
            value_dim=value_width, device=device, dtype=fused.dtype,
        )  # fmt: skip
        self._view = CacheView(self.cache)
        padded = torch.zeros(len(prompts), longest, dtype=torch.int64, device=device)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = torch.tensor(prompt, device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        # Before a text stands its first token again.
        self._tail = padded[:, :1].expand(-1, self._reach + 1)
        for start in range(0, longest - 1, READ):
            end = min(start + READ, longest - 1)
            read = padded[:, start + 1 : end + 1]
            self._run(read, fused[:, start:end], None)
            self._keep((lengths - 1 - start).clamp(0, end - start), read)
        last = (lengths - 1)[:, None, None].expand(-1, 1, fused.shape[2])
        self._waiting, self._counts = fused.gather(1, last), torch.ones_like(lengths)
        self._known: list[dict[tuple[int, ...], int]] = []
        self._root = self._hidden = fused[:, :0]

    def take(self, features: Tensor, counts: Tensor) -> None:
        """The target's features [B, M, F C] of the places before the `counts` [B] newest tokens."""
        self._waiting, self._counts = self._network.fuse(features), counts

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows`."""
        self.cache.select(rows)
        self._waiting, self._counts = self._waiting[rows], self._counts[rows]
        self._root, self._hidden = self._root[rows], self._hidden[rows]
        self._tail = self._tail[rows]

    @property
    def before(self) -> Tensor:
        """The `reach` tokens before the last one that was followed, [B, R]."""
        return self._tail[:, :-1]

    @torch.no_grad()
    def follow(self, tokens: Tensor, lengths: Tensor, given: Sequence[int] = ()) -> Tensor:
        """Commit the pairs of all new tokens, and give the law [B, V] after the last one."""
        num = self._waiting.shape[1]
        places = (lengths - self._counts)[:, None] + torch.arange(num, device=lengths.device)
        fed = tokens.gather(1, places.clamp(max=tokens.shape[1] - 1))
        hidden = self._run(fed, self._waiting, None)
        self._keep(self._counts, fed)
        last = (self._counts - 1)[:, None, None].expand(-1, 1, hidden.shape[2])
        self._root = hidden.gather(1, last)
        self._known, self._hidden = [{} for _ in range(len(tokens))], hidden[:, :0]
        return self._law(self._root)[:, 0]

    @torch.no_grad()
    def extend(self, fed: Tensor, tree: Topology | None = None) -> Tensor:
        """Laws [B, 1 + T, V] after the last known token and the candidates behind it.

        Args:
            fed: [B, 1 + T], the last known token first.
            tree: of all of these; None for a chain. A candidate's parent has been asked about
                before, or is asked about now.
        """
        nodes = fed[:, 1:]
        num = nodes.shape[1]
        parents = torch.arange(-1, num, device=fed.device) if tree is None else tree.laws - 1
        above = parents[..., 1:] - 1
        table, rows = nodes.tolist(), above.expand(nodes.shape).tolist()
        paths = [_paths(*row) for row in zip(table, rows, strict=True)]
        while True:
            places, are_known = self._places(paths)
            inputs = torch.cat([self._root, self._hidden], dim=1)
            index = places[..., None].expand(-1, -1, inputs.shape[2])
            hidden = self._run(nodes, inputs.gather(1, index), above)
            self._hidden = hidden
            self._known = [
                {path: node for node, path in enumerate(row) if is_known[node]}
                for row, is_known in zip(paths, are_known, strict=True)
            ]
            if all(map(all, are_known)):
                return self._law(torch.cat([self._root, hidden], dim=1))

    def _places(self, paths: list[list[tuple[int, ...]]]) -> tuple[Tensor, list[list[bool]]]:
        """Where the feature before each candidate stands behind the root's, and which are known."""
        places, are_known = [], []
        for row, known in zip(paths, self._known, strict=True):
            found = [0 if len(path) == 1 else known.get(path[:-1], -1) + 1 for path in row]
            are_known.append(
                [place > 0 or len(path) == 1 for place, path in zip(found, row, strict=True)]
            )
            places.append(found)
        return torch.tensor(places, device=self._root.device), are_known

    def _run(self, tokens: Tensor, hidden: Tensor, parents: Tensor | None) -> Tensor:
        """The network over candidates behind what is committed; parents [T] or [B, T]."""
        num, shape = tokens.shape[1], None
        if parents is not None:
            shape = topology_of(parents.to(tokens.device))
        slots, mask = self.cache.begin(num, None if shape is None else shape.ancestors)
        if mask is None:
            mask = hidden.new_zeros(1, 1, 1, int(slots[0, 0]) + 1)
        positions = slots if shape is None else self.cache.lengths[:, None] + shape.depths
        embedded = self._embed(tokens.clamp(min=0)) if not self._reach else self._windows(tokens)
        embedded = embedded.to(hidden)
        rows = mask.expand(len(tokens), -1, -1, -1)
        return self._network.step(
            embedded, hidden, rows, positions.expand(len(tokens), -1), self._view
        )

    def _windows(self, tokens: Tensor) -> Tensor:
        """Embeddings of tokens [B, T] behind the tail, each with those of the tokens before it."""
        behind = torch.cat([self._tail[:, 1:], tokens.clamp(min=0)], dim=1)
        return self._embed(behind.unfold(1, self._reach + 1, 1)).flatten(-2)

    def _keep(self, counts: Tensor, tokens: Tensor) -> None:
        """Commit the first `counts` [B] of the pairs of tokens [B, T] that were read last."""
        order = torch.arange(tokens.shape[1], device=counts.device)
        self.cache.commit(order.expand(tokens.shape), counts)
        if self._reach:
            last = counts[:, None] + torch.arange(self._reach + 1, device=counts.device)
            self._tail = torch.cat([self._tail, tokens], dim=1).gather(1, last)

    def _law(self, hidden: Tensor) -> Tensor:
        return self._shape(self._network.logits(hidden).float())


def _paths(tokens: Sequence[int], parents: Sequence[int]) -> list[tuple[int, ...]]:
    """The tokens from the root down to each candidate."""
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tokens, parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return paths


class FeatureTree(DraftTree):
    """A tree from a feature network, one pass of its single layer per level.

    With the expansion "dyspec" a tree grows where the product of confidences is largest and is then
    cut down to the best candidates: the dynamic tree of EAGLE-2 and EAGLE-3.

    Args:
        network: the feature network.
        **options: of `DraftTree`.
    """

    def __init__(self, network: Any, **options: Any) -> None:
        super().__init__(network, **options)
        self._target: Any = None

    def watches(self, model: Any) -> tuple[int, ...]:
        """See `TextDrafter`."""
        return self.draft.watches(model)  # pyright: ignore[reportAttributeAccessIssue]

    def begin(self, state: Any) -> None:
        """Read the prompts.

        Raises:
            InputError: a target that does not tell what its layers make of a text.
        """
        features = features_of(state, self)
        embed = state.model.network.get_input_embeddings()
        shape = self.shaping if self.shaping.temperature else Shaping()

        def law(logits: Tensor) -> Tensor:
            return shape(in_vocabulary(logits, self.vocab_size))

        room = self.num_tokens + state.model.tree_room
        network: Any = self.draft
        with torch.no_grad():
            self._state: Any = FeatureState(network, embed, self.histories, features, law, room)
        self._target = state

    def observe(self, batch: Round, verdict: Verdict) -> None:
        """Take the target's features along each row's accepted path."""
        if batch.number == 0:
            return  # the prefill, whose features were read already
        self._state.take(features_along(self._target.features, verdict), verdict.counts)


def features_of(state: Any, drafter: Any) -> Tensor:
    """The target's features of the prompts, [B, L, F C], which its state then keeps no longer.

    Raises:
        InputError: a target that does not tell what its layers make of a text.
    """
    features = getattr(state, "features", None)
    if features is None:
        raise InputError(
            f"{type(drafter).__name__} drafts from what the target's layers see: expected a "
            "language model of transformers, and `generate`"
        )
    state.features = None
    return features


def features_along(features: Tensor, verdict: Verdict) -> Tensor:
    """Of the target's features [B, 1 + T, F C] of a pass, those of the root and of each row's accepted
    path: [B, M, F C], of which the first `verdict.counts` belong to the row."""
    width = max(verdict.given or verdict.counts.tolist())
    places = torch.arange(width, device=features.device).expand(len(features), -1)
    if verdict.path is not None:
        path = verdict.path[:, : width - 1].clamp(min=0) + 1
        places = torch.cat([places[:, :1], path], dim=1)
    return features.gather(1, places[..., None].expand(-1, -1, features.shape[2]))
