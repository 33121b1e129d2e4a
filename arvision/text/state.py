"""Decode state of a transformers language model: our cache and masks, its network."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..contracts import Edit
from ..decoding.cache import KVCache
from ..decoding.transformers_cache import CacheView, all_open, kernels_in, spread, within
from ..decoding.tree import Topology, check_parents, check_path, topology_of
from ..errors import InputError, StateError
from ..networks import is_compiled
from .layers import Parts, alone, edited, running_only, watching

if TYPE_CHECKING:
    from .model import HFCausalLM


FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers, in transformers' words."""

NO_EXITS: Mapping[int, Callable[[Tensor], bool]] = {}

PREFILL_PIECE = 1024
"""Tokens of a prompt that one pass reads: its mask has this many rows."""


class HFState:
    """Committed prompts and tokens of B rows, and the candidates of the last call.

    Attributes:
        lengths: [B] int64, committed new tokens.
        hidden: [B, T, C], input of the output layer at each candidate of the last call (after the
            prefill: [B, 1, C], at the prompts' ends). Of passes of fixed shapes only with
            `keeps_hidden`.
        features: [B, T, F C], what went into each of the F layers `model.watched` at each candidate
            of the last call (after the prefill: at the prompts' tokens, padded on the right), side
            by side; layer L of L is the output layer. None where nothing is watched.
        pseudo: [K, C] embeddings of the tokens V, V + 1, ... V + K - 1, which some drafters feed
            besides those of the vocabulary; None for none.
    """

    allows_overrun = True
    unread = ("lengths", "hidden", "features", "_prompts", "_fed", "_tree")

    def __init__(self, model: HFCausalLM, batch: int, capacity: int) -> None:
        sizes, device = model.sizes, model.device
        self.model = model
        self._network = model.network
        self._alone = alone(model.network)
        self._runs_compiled = is_compiled(model.called), is_compiled(model.network)
        self._room = model.num_tokens
        self.cache = KVCache(
            sizes.num_layers,
            batch,
            sizes.num_kv_heads,
            capacity,
            sizes.head_dim,
            device=device,
            dtype=model.network.get_input_embeddings().weight.dtype,
            value_dim=sizes.value_dim,
        )
        self._seen = CacheView(self.cache)
        accepts = inspect.signature(self._network.forward).parameters
        name = "cache" if "cache" in accepts else "past_key_values"
        self._options: dict[str, Any] = {name: self._seen, "use_cache": True}
        self._keeps_logits = "logits_to_keep" in accepts
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.hidden: Tensor | None = None
        self.keeps_hidden = self._has_hooks = False
        self.pseudo: Tensor | None = None
        self._tree: Topology | None = None
        self.features: Tensor | None = None
        self._watched = model.watched
        self._is_draft = self._is_altered = False
        self._prefixes = model.prefixes
        self._fed = self.lengths[:, None]

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Tensor]) -> Tensor:
        """Commit the prompts [L_i]; logits [B, V] of the first new token.

        Long prompts are read in pieces, so that no mask grows with the square of their length.
        """
        from .model import pad_right

        tokens, lengths = pad_right(prompts)
        self._prompts, self._begins = [len(ids) for ids in prompts], lengths
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        features: list[Tensor] = []
        for start in range(0, tokens.shape[1], PREFILL_PIECE):
            piece = tokens[:, start : start + PREFILL_PIECE]
            counts = (lengths - start).clamp(0, piece.shape[1])
            rows = ((lengths > start) & (lengths <= start + PREFILL_PIECE)).nonzero()[:, 0]
            ends = (lengths[rows] - 1 - start).unique()
            # Some networks want at least one place.
            kept = ends if len(ends) else torch.zeros_like(lengths[:1])
            logits = self._run(piece, None, keep=kept)
            check_numbers(logits)
            self.cache.commit(
                torch.arange(piece.shape[1]).to(counts).expand(len(counts), -1), counts
            )
            assert self.hidden is not None
            if self.features is not None:
                features.append(self.features)
            place = torch.searchsorted(ends, lengths[rows] - 1 - start)
            found.append((rows, logits[rows, place], self.hidden[rows, place]))
        order = torch.cat([rows for rows, _, _ in found]).argsort()
        self.hidden = torch.cat([hidden for _, _, hidden in found])[order][:, None]
        logits = torch.cat([logits for _, logits, _ in found])[order]
        self.features = torch.cat(features, dim=1) if features else None
        if self._prefixes is None:
            return logits
        return self._prefixes(logits[:, None], tokens[:, :0], None)[:, 0]

    @torch.no_grad()
    def extend(self, tokens: Tensor, parents: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of what follows each candidate.

        Args:
            tokens: [B, T] int64; candidates of an earlier call that were not kept are forgotten.
            parents: [T] int64 with `parents[t] < t`, -1 for the committed prefix, or [B, T], a tree
                for every row; None for a chain.

        Raises:
            InputError: a shape or a parent that does not fit, or logits that are not numbers.
            StateError: more candidates than there is room for.
        """
        if tokens.dim() != 2 or len(tokens) != len(self.lengths) or tokens.shape[1] < 1:
            raise InputError(
                f"tokens {tuple(tokens.shape)}: expected [{len(self.lengths)}, T] with T >= 1"
            )
        logits = self._extend(tokens, self._topology(tokens, parents))
        check_numbers(logits)
        return logits

    def _topology(self, tokens: Tensor, parents: Tensor | None) -> Topology | None:
        if parents is None:
            return None
        check_parents(parents, tokens.shape[1])
        return topology_of(parents.to(tokens.device))

    @torch.no_grad()
    def extend_vectors(self, vectors: Tensor) -> Tensor:
        """Logits [B, T, V] behind a chain of vectors [B, T, C] in the place of tokens, as `extend`."""
        self._tree, self._is_draft = None, False
        tokens = torch.zeros(vectors.shape[:2], dtype=torch.int64, device=vectors.device)
        logits = self._run(tokens, None, embeddings=vectors)
        check_numbers(logits)
        return logits

    @torch.no_grad()
    def extend_along(self, tokens: Tensor, tree: Topology | None) -> Tensor:
        """`extend` with a topology; see `arvision.contracts.AdvancesAlong`."""
        return self._extend(tokens, tree)

    def _extend(self, tokens: Tensor, tree: Topology | None) -> Tensor:
        self._tree, self._is_draft = tree, False
        logits = self._run(tokens, tree)
        if self._prefixes is None:
            return logits
        # No text holds a pseudo token.
        self._fed = tokens.clamp(max=self.model.vocab_size - 1)
        return self._prefixes(logits, self._fed, tree)

    @property
    def why_not_fixed(self) -> str | None:
        """See `arvision.contracts.TakesFixedChains`."""
        if self._prefixes is not None:
            return "the model's logits processors look at each text on the host"
        return None if self.pseudo is None and not self._watched else "the drafter changes the pass"

    def make_room(self, num: int, tree: Topology | None) -> None:
        """See `arvision.decoding.fixed_step.MakesRoom`: there is room, but compiled passes put up no hooks.

        What tells hidden states is put up by the first call that asks for them. It is fed where
        nothing ever looks.
        """
        if self.keeps_hidden and not self._has_hooks:
            self._has_hooks = True
            self.extend_fixed(
                self._begins[:, None] * 0, torch.full_like(self._begins, num) + self.cache.capacity
            )

    @torch.no_grad()
    def extend_fixed(self, tokens: Tensor, lengths: Tensor, tree: Topology | None = None) -> Tensor:
        """Logits [B, T, V] of candidates; see `arvision.contracts.TakesFixedTrees`."""
        begin = self._begins + lengths
        slots = begin[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        ancestors = None if tree is None else tree.ancestors
        mask = self.cache.begin_fixed(slots, self.cache.capacity, ancestors)
        positions = slots if tree is None else begin[:, None] + tree.depths
        seen_by = self._by_kind(mask, positions, begin)
        positions = positions.clamp(max=self.model.sizes.num_positions - 1)
        inputs: dict[str, Any] = {"input_ids": tokens, "position_ids": positions}
        inputs["attention_mask"] = seen_by
        if self.keeps_hidden:
            inputs["output_hidden_states"] = -1
        called = self.model.called
        if torch.compiler.is_compiling():
            out = called(**inputs, **self._options)
        else:
            with self._alone, kernels_in(self._network, called, mask):
                out = called(**inputs, **self._options)
        if self.keeps_hidden:
            self.hidden = out.hidden_states[-1]
        return out.logits

    def keep_fixed(self, path: Tensor, counts: Tensor, lengths: Tensor) -> None:
        """Keep a path of each row; see `arvision.contracts.TakesFixedTrees`."""
        self.cache.keep_fixed(path, counts, self._begins + lengths)

    def extend_edited(self, tokens: Tensor, parents: Tensor | None, edit: Edit) -> Tensor:
        """`extend` while a layer's input is changed, see `arvision.contracts.Editable`."""
        with self._altered(), edited(self._network, edit):
            return self._extend(tokens, self._topology(tokens, parents))

    @torch.no_grad()
    def draft(
        self,
        tokens: Tensor,
        parents: Tensor | None = None,
        *,
        layers: Sequence[int] | Parts | None = None,
        exits: Mapping[int, Callable[[Tensor], bool]] = NO_EXITS,
        embeddings: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] from the same network, shortened or fed with vectors, as a draft model.

        What it writes behind the committed prefix is overwritten by the next call, and cannot be
        committed.

        Args:
            tokens: [B, T] int64.
            parents: as in `extend`.
            layers: the layers to run, ascending, or the parts of layers; None for all.
            exits: where a pass of `layers` may end, see `arvision.text.layers.running_only`; the
                logits are then those behind the layers that ran.
            embeddings: [B, T, C], fed instead of the tokens' own.
        """
        self._is_draft = True
        hidden = self.hidden
        tree = None if parents is None else topology_of(parents.to(tokens.device))
        with self._shortened(layers, exits):
            logits = self._run(tokens, tree, embeddings=embeddings)
        if layers is not None:
            self.hidden = hidden
        return logits

    @torch.no_grad()
    def replay(
        self, tokens: Tensor, num: int, layers: Sequence[int] | Parts
    ) -> tuple[Tensor, Tensor]:
        """What some of the layers would have said along the last committed tokens.

        Args:
            tokens: [B, N], the rows' tokens from the first new one on.
            num: tokens that are read again, at most as many as every row has committed.
            layers: the layers to run, or the parts of layers.

        Returns:
            The most likely tokens [B, num - 1], and the ones that came.
        """
        cache, lengths = self.cache, self.cache.lengths
        places = self.lengths[:, None] - num + torch.arange(num, device=lengths.device)
        read = tokens.gather(1, places)
        kept = cache.rewind(num)
        try:
            said = self.draft(read, layers=layers).argmax(-1)
        finally:
            cache.restore(kept, lengths)
        return said[:, :-1], read[:, 1:]

    def least_committed(self) -> int:
        """New tokens that every row has committed, known without asking the device."""
        return min(
            length - prompt
            for length, prompt in zip(self.cache.host_lengths, self._prompts, strict=True)
        )

    @contextmanager
    def _shortened(
        self, layers: Sequence[int] | Parts | None, exits: Mapping[int, Callable[[Tensor], bool]]
    ) -> Iterator[None]:
        if layers is None:
            yield
            return
        with running_only(self._network, layers, exits), self._altered():
            yield

    def _run(
        self,
        tokens: Tensor,
        shape: Topology | None,
        *,
        embeddings: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Run the network over candidates; logits at all of them or at places `keep` [U]."""
        num, furthest = tokens.shape[1], max(self.cache.host_lengths)
        if furthest + num > self.cache.capacity:
            room = self.cache.capacity - furthest
            raise StateError(f"{num} candidates do not fit: the cache has room for {room} more")
        slots, mask = self.cache.begin(num, None if shape is None else shape.ancestors)
        if mask is None:
            mask = all_open(self.cache)
        positions = slots if shape is None else self.cache.lengths[:, None] + shape.depths
        seen_by = self._by_kind(spread(mask, len(tokens)), positions, self.cache.lengths)
        positions = positions.clamp(max=self.model.sizes.num_positions - 1)
        inputs: dict[str, Any] = {"input_ids": tokens}
        if embeddings is not None or self.pseudo is not None:
            inputs = {"inputs_embeds": self._embed(tokens) if embeddings is None else embeddings}
        if keep is not None and self._keeps_logits:
            inputs["logits_to_keep"] = keep
        inputs |= {"attention_mask": seen_by, "position_ids": positions.expand(len(tokens), -1)}
        with self._alone, self._watching():
            called = self._network if self._is_altered else self.model.called
            with kernels_in(self._network, called, mask):
                logits, hidden = self._pass(**inputs, **self._options)
        if keep is not None:
            logits = logits if self._keeps_logits else logits[:, keep]
            hidden = hidden if hidden.shape[1] == logits.shape[1] else hidden[:, keep]
        self.hidden = hidden
        return logits

    def _pass(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Logits, and the hidden states behind them or at all places, of one pass.

        A compiled network runs as such, unless layers are skipped or edited in this pass: what
        changes in a network from call to call, hooks among it, compiled graphs do not see.
        """
        is_wrapped, is_inside = self._runs_compiled
        if is_wrapped and not self._is_altered:
            out = self.model.called(**inputs, output_hidden_states=-1)
            if out.hidden_states and out.hidden_states[-1] is not None:
                return out.logits, out.hidden_states[-1]
        seen: list[Tensor] = []
        hook = self._network.get_output_embeddings().register_forward_pre_hook(
            lambda _, arguments: seen.append(arguments[0])
        )
        try:
            logits = (self._network._call_impl if is_inside else self._network)(**inputs).logits
        finally:
            hook.remove()
        return logits, seen[0]

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Keep what goes into the watched layers in the pass within this block."""
        if not self._watched or self._is_draft:
            yield
            return
        seen: dict[int, Tensor] = {}
        with self._altered(), watching(self._network, self._watched, seen):
            yield
        self.features = torch.cat([seen[layer] for layer in self._watched], dim=-1)

    @contextmanager
    def _altered(self) -> Iterator[None]:
        """Passes within this block find the network changed."""
        self._is_altered = True
        try:
            yield
        finally:
            self._is_altered = False

    def _by_kind(self, mask: Tensor, positions: Tensor, begin: Tensor) -> Any:
        """The additive mask [R, 1, T, S] as the layers want it: one, or one for each kind of layer.

        A windowed layer looks at what is less than a window behind in the text. In the cache a
        candidate may stand further behind than in the text, as its siblings have slots too.

        Args:
            mask: of layers that attend to everything.
            positions: [R or 1, T], of the candidates.
            begin: [R], slots of the first ones.
        """
        kinds = self.model.layer_kinds
        if SLIDING not in kinds:
            return mask
        window = self.model.attention_window
        assert window is not None
        near = mask
        if mask.shape[3] > window:
            rows, num = len(mask), positions.shape[1]
            places = torch.arange(mask.shape[3] + num, device=mask.device).repeat(rows, 1)
            own = begin[:, None] + torch.arange(num, device=mask.device)
            places = places.scatter(
                1, own.clamp(max=places.shape[1] - 1), positions.expand(rows, num)
            )
            behind = positions[..., None] - places[:, None, : mask.shape[3]]
            near = mask.masked_fill((behind >= window)[:, None], float("-inf"))
            near = within(near, mask, window, positions)
        return near if kinds == {SLIDING} else {FULL: mask, SLIDING: near}

    def _embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [B, T, C], of pseudo tokens too."""
        vocab = self.model.vocab_size
        known = self._network.get_input_embeddings()(tokens.clamp(max=vocab - 1))
        assert self.pseudo is not None
        extra = self.pseudo.to(known.dtype)[(tokens - vocab).clamp(min=0)]
        return torch.where((tokens >= vocab)[..., None], extra, known)

    def commit(self, kept: Tensor, counts: Tensor) -> None:
        """Keep some of the last candidates and forget the rest.

        Args:
            kept: [B, K] int64, indices into the candidates, parents before children.
            counts: [B] int64, how many of each row of `kept` count; rows may differ.

        Raises:
            StateError: no candidates of `extend` are pending, or a parent was not kept.
        """
        num = self.cache.num_pending
        if num == 0 or self._is_draft:
            raise StateError("commit without candidates: call extend first")
        parents = None if self._tree is None else self._tree.laws - 1
        check_path(kept, counts, parents, num, len(self.lengths))
        self.cache.commit(kept, counts)
        self.lengths = self.lengths + counts
        if self._prefixes is not None:
            self._prefixes.commit(self._fed, kept, counts.tolist())

    def advance_along(self, path: Tensor, counts: Tensor, given: Sequence[int]) -> None:
        """Keep a path of each row; see `arvision.contracts.AdvancesAlong`."""
        self.cache.keep(path, counts, given)
        self.lengths = self.lengths + counts
        if self._prefixes is not None:
            self._prefixes.commit(self._fed, path, given)

    def advance(self, counts: Tensor, given: Sequence[int]) -> None:
        """Keep the first candidates of each row of a chain; see `arvision.contracts.Advances`."""
        if self.cache.num_pending == 0 or self._is_draft:
            raise StateError("advance without candidates: call extend first")
        self.cache.advance(counts, given)
        self.lengths = self.lengths + counts
        if self._prefixes is not None:
            every = torch.arange(self._fed.shape[1], device=counts.device)
            self._prefixes.commit(self._fed, every.expand_as(self._fed), given)

    def rewind_to(self, lengths: Sequence[int]) -> None:
        """Forget all but the first `lengths` committed tokens of the rows, prompts included."""
        before = self.cache.lengths
        self.cache.cut(lengths)
        self.lengths = self.lengths + self.cache.lengths - before

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows` [B'] and drop the others."""
        self.cache.select(rows)
        self.lengths = self.lengths[rows]
        self._prompts = [self._prompts[row] for row in rows.tolist()]
        self._begins = self._begins[rows]
        if self._prefixes is not None:
            self._prefixes.select(rows)
        if self.hidden is not None:
            self.hidden = self.hidden[rows]
        if self.features is not None:
            self.features = self.features[rows]


def check_numbers(logits: Tensor) -> None:
    """Refuse logits that hold NaN.

    Raises:
        InputError: see above.
    """
    if bool(logits.sum().isnan()):
        raise InputError("the model's logits hold NaN: check its weights and dtype")
