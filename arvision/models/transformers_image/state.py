"""Decode state of an image model of transformers: our cache, masks and positions, its network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...decoding.cache import KVCache, interleaved
from ...decoding.logits import Apart, guide, guided, has_weights, joined_scales, weights_at
from ...decoding.transformers_cache import CacheView, TextSizes, all_open, spread
from ...decoding.tree import Topology, check_parents, check_path, check_placed, topology_of
from ...errors import InputError, StateError
from .layout import Expansion

if TYPE_CHECKING:
    from .model import TransformersImageModel

TREE_ROOM = 64
"""Cache positions beyond the last token that a tree may take near the end of an image."""

IMAGE_GUIDANCE = 1.2
"""Weight of the images of a prompt, where it is guided by images and text apart (Chameleon)."""


@dataclass(frozen=True)
class Row:
    """A prompt as the cache takes it.

    Attributes:
        ids: [L] int64.
        positions: [A, L] int64.
        next: first position after the prompt.
    """

    ids: Tensor
    positions: Tensor
    next: int

    @classmethod
    def plain(cls, ids: Tensor) -> Row:
        """A prompt at positions 0, 1, 2, ... of one axis."""
        return cls(ids, torch.arange(len(ids), device=ids.device)[None], len(ids))


def combine(logits: Tensor, branches: int, scale: Any, leaves_guidance: bool = False) -> Any:
    """Guided logits [B, T, V] out of those of all cache rows, [branches * B, T, V].

    One branch is taken as it is. Two are the conditional and the null rows. Three are these and,
    between them, the rows that know the images of the prompt only. Guidance of two branches may be
    left to whoever draws.
    """
    if branches == 1:
        return logits
    conditional, *others = logits.chunk(branches)
    null = others[-1]
    if branches == 2:
        return guided(conditional, null, scale, is_left=leaves_guidance)
    images = others[0]
    return guide(images, null, IMAGE_GUIDANCE) + scale * (conditional - images)


class ImageState:
    """Committed prompts and image tokens of B images; see `arvision.contracts.TokenState`.

    The cache holds `branches` rows per image, all conditional ones first. Prompts are padded on the
    left, so that the images of a batch stand at the same place until their rows are ragged.

    Args:
        model: whose network runs.
        rows: prompts of all branches, `branches * B`.
        branches: 1, 2 or 3, see `combine`.
        guidance_scale: weight of the conditional logits.
    """

    allows_overrun = True
    leaves_guidance = False
    unread = ("lengths", "_tree", "_expansion", "_is_open")
    renewed = ("_fixed",)

    def __init__(
        self,
        model: TransformersImageModel,
        rows: Sequence[Row],
        branches: int,
        guidance_scale: float,
    ) -> None:
        self._model, self._layout = model, model.layout
        self._branches = branches
        self._scale: Any = guidance_scale
        device = model.device
        self._num_prompt = max(len(row.ids) for row in rows)
        self._is_open = torch.zeros(len(rows), self._num_prompt, dtype=torch.bool)
        for place, row in enumerate(rows):
            self._is_open[place, self._num_prompt - len(row.ids) :] = True
        sizes = TextSizes.of(model.base)
        self.cache = KVCache(
            sizes.num_layers,
            len(rows),
            sizes.num_kv_heads,
            # One more than is looked at: padding and what runs past the end is written there.
            self._num_prompt + model.layout.num_places + 1,
            sizes.head_dim,
            device=device,
            dtype=model.dtype,
            open_columns=self._is_open,
        )
        self._seen = CacheView(self.cache)
        self._offsets = model.layout.offsets.to(device)
        self._next = torch.tensor([row.next for row in rows], device=device)
        self._tree: Topology | None = None
        self._expansion: Expansion | None = None
        self.lengths = torch.zeros(len(rows) // branches, dtype=torch.int64, device=device)

    def prefill(self, rows: Sequence[Row]) -> Tensor:
        """Run the prompts; guided logits [B, V] of the first token."""
        num, device = self._num_prompt, self.cache.keys.device
        ids = torch.stack(
            [torch.cat([row.ids[:1].expand(num - len(row.ids)), row.ids]) for row in rows]
        )
        positions = torch.stack(
            [torch.nn.functional.pad(row.positions, (num - len(row.ids), 0)) for row in rows], dim=1
        )
        self.cache.begin_unmasked(num)
        order = torch.arange(num)
        sees = self._is_open[:, None] & (order <= order[:, None])
        # A row of the mask that bars everything would make all numbers NaN under eager attention.
        sees |= torch.eye(num, dtype=torch.bool)
        mask = self.cache.keys.new_zeros(len(rows), 1, num, num)
        mask.masked_fill_(~sees[:, None].to(device), float("-inf"))
        inputs = self._model.prompt_inputs(ids.to(device))
        hidden = self._model.run(inputs, positions.to(device), mask, self._seen)[:, -1:]
        every = torch.arange(num, device=device).expand(len(rows), num)
        self.cache.commit(every, torch.full_like(every[:, 0], num))
        logits = self._guided(hidden, torch.zeros_like(self.lengths)[:, None])[:, 0]
        check_numbers(logits)
        return logits

    def _guided(self, hidden: Tensor, places: Tensor | None) -> Any:
        """Guided logits [B, T, V] of hidden states [R, T, C] for tokens at `places` [B, T]."""
        logits = self._model.code_logits(hidden)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        weights = weights_at(self._scale, places, logits)
        return combine(logits, self._branches, weights, self.leaves_guidance)

    def _spread(self, rows: Tensor) -> Tensor:
        """Values [B, ...] laid out over the rows of the cache."""
        return rows if self._branches == 1 else rows.repeat(self._branches, *[1] * (rows.dim() - 1))

    def _host_lengths(self) -> np.ndarray:
        """Committed tokens [B], or [1] where all rows are alike."""
        batch = 1 if self.cache.is_uniform else len(self.lengths)
        places = np.asarray(self.cache.host_lengths[:batch]) - self._num_prompt
        return self._layout.tokens_before(places)

    @torch.no_grad()
    def extend(self, tokens: Tensor, parents: Tensor | None = None) -> Tensor:
        """Guided logits [B, T, V] of what follows each candidate.

        Args:
            tokens: [B, T] int64; candidates of an earlier call that were not kept are forgotten.
            parents: [T] int64 with `parents[t] < t`, -1 for the committed prefix, or [B, T], a tree
                for every row; None for a chain.

        Raises:
            InputError: a shape or a parent that does not fit, or logits that are not numbers.
            StateError: a tree larger than the room left.
        """
        if tokens.dim() != 2 or len(tokens) != len(self.lengths) or tokens.shape[1] < 1:
            raise InputError(
                f"tokens {tuple(tokens.shape)}: expected [{len(self.lengths)}, T] with T >= 1"
            )
        shape = None
        if parents is not None:
            check_parents(parents, tokens.shape[1])
            shape = topology_of(parents.to(tokens.device))
        logits = self._extend(tokens, shape)
        check_numbers(logits)
        return logits

    @torch.no_grad()
    def extend_along(self, tokens: Tensor, tree: Topology | None) -> Tensor:
        """`extend` with a topology; see `arvision.contracts.AdvancesAlong`."""
        return self._extend(tokens, tree)

    def _extend(self, tokens: Tensor, shape: Topology | None) -> Tensor:
        num = tokens.shape[1]
        self._tree = shape
        depths = np.arange(num) if shape is None else shape.depths.cpu().numpy()
        numbers = self._host_lengths()[:, None] + depths
        self._expansion = expansion = self._layout.expand(numbers)
        places = self._layout.place(numbers) if expansion is None else expansion.places
        ancestors = None if shape is None else self._ancestors(shape)
        width = num if expansion is None else expansion.own.shape[1]
        if ancestors is not None and max(self.cache.host_lengths) + width > self.cache.capacity:
            self.cache.widen(self._num_prompt + self._layout.num_places + TREE_ROOM)
        _, mask = self.cache.begin(width, ancestors)
        if mask is None:
            mask = all_open(self.cache)
        codes, forced = self._fed(tokens, expansion)
        hidden = self._run(codes, forced, torch.from_numpy(places), mask)
        if expansion is not None:
            hidden = _gather(hidden, torch.from_numpy(expansion.end), self._branches)
        following = None
        if has_weights(self._scale):
            following = self.lengths[:, None] + torch.from_numpy(depths).to(tokens.device) + 1
        return self._guided(hidden, following)

    def _ancestors(self, shape: Topology) -> Tensor:
        """[R or 1, S, S] bool, who of the things that are fed looks at whom."""
        above = shape.ancestors
        if self._expansion is None:
            return above if shape.is_shared else self._spread(above)
        own = torch.from_numpy(self._expansion.own).to(above.device)
        sees = _visible(above, own, True)
        return sees if len(sees) == 1 else self._spread(sees)

    def _fed(self, tokens: Tensor, expansion: Expansion | None) -> tuple[Tensor, Tensor | None]:
        """Codes [B, S], and ids [b, S] that stand in their place (-1 for none)."""
        if expansion is None:
            return tokens, None
        own = torch.from_numpy(expansion.own).to(tokens.device).expand(len(tokens), -1)
        return tokens.gather(1, own), torch.from_numpy(expansion.forced).to(tokens.device)

    def _run(self, codes: Tensor, forced: Tensor | None, places: Tensor, mask: Tensor) -> Tensor:
        """Hidden states [R, S, C] after the cache was told where things stand.

        Args:
            codes: [B, S].
            forced: [b, S], ids in the place of codes; -1 for none.
            places: [b, S] in the sequence of the image, b = B or 1.
            mask: [R or 1, 1, S, ...].
        """
        rows = len(self._next)
        last = self._offsets.shape[1] - 1
        # Past the end of the image positions do not matter.
        offsets = self._offsets[:, places.clamp(max=last).to(codes.device)]
        if offsets.shape[1] != 1:
            offsets = offsets.repeat(1, self._branches, 1)
        positions = self._next[:, None] + offsets
        forced = None if forced is None else self._spread(forced.expand(len(codes), -1))
        inputs = self._model.inputs(self._spread(codes), forced)
        return self._model.run(inputs, positions, spread(mask, rows), self._seen)

    def make_room(self, num: int, tree: Topology | None) -> None:
        """See `arvision.decoding.fixed_step.MakesRoom`."""
        width = self._layout.widest(num, tree)
        if tree is not None:
            self._layout.widest(tree.num_levels)  # of a path that stays
            self.cache.widen(self._num_prompt + self._layout.num_places + width)

    @torch.no_grad()
    def extend_fixed(self, tokens: Tensor, lengths: Tensor, tree: Topology | None = None) -> Tensor:
        """Guided logits [B, T, V] of candidates; see `arvision.contracts.TakesFixedTrees`."""
        layout, num = self._layout, tokens.shape[1]
        self._fixed = fed = layout.fixed(lengths, num, tree)
        if tree is None:
            slots = self._spread(fed.places + self._num_prompt)
            mask = self.cache.begin_fixed(slots, self._num_prompt + layout.num_places)
        else:
            begin = layout.begins(lengths) + self._num_prompt
            order = torch.arange(fed.own.shape[1], device=tokens.device)
            above = _visible(tree.ancestors, fed.own, fed.forced is not None)
            if above.dim() == 3 and len(above) > 1:
                above = self._spread(above)
            slots = self._spread(begin[:, None] + order)
            mask = self.cache.begin_fixed(slots, self.cache.capacity, above)
        hidden = self._run(tokens.gather(1, fed.own), fed.forced, fed.places, mask)
        hidden = hidden if fed.forced is None else _gather(hidden, fed.end, self._branches)
        depths = torch.arange(num, device=tokens.device) if tree is None else tree.depths
        return self._guided(hidden, lengths[:, None] + depths + 1)

    def keep_fixed(self, path: Tensor, counts: Tensor, lengths: Tensor) -> None:
        """Keep a path of each row; see `arvision.contracts.TakesFixedTrees`."""
        layout = self._layout
        begin = layout.begins(lengths)
        if layout.has_forced:
            # What stays is a chain: with each candidate of the path, what hangs on it.
            chain = layout.fixed(lengths, path.shape[1])
            order = torch.arange(chain.own.shape[1], device=path.device)
            within = order - chain.begin.gather(1, chain.own)
            place = self._fixed.begin.gather(1, path.gather(1, chain.own))
            path, counts = place + within, layout.begins(lengths + counts) - begin
        self.cache.keep_fixed(
            self._spread(path), self._spread(counts), self._spread(begin + self._num_prompt)
        )

    @torch.no_grad()
    def extend_at(self, tokens: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """Guided logits [B, T, V] of what follows tokens at positions of the caller's choice.

        What hangs on a token is fed with it, and visible exactly where it is.

        Args:
            tokens: [B, T] int64.
            positions: [B, T] int64, numbers of tokens; -1 for padding, whose logits mean nothing.
            visible: [B, T, N] bool, the tokens that a candidate looks at besides the conditions and
                itself.

        Raises:
            InputError: shapes that do not fit, or a position out of range.
        """
        batch, num_tokens = len(self.lengths), self._layout.num_tokens
        shape = (batch, tokens.shape[-1])
        check_placed(tokens, positions, visible, shape, num_tokens)
        numbers = (positions if positions.is_cpu else positions.cpu()).numpy()
        positions = positions.to(tokens.device)
        # Nothing hangs on the last token, so it stands for padding here.
        expansion = self._layout.expand(np.where(numbers < 0, num_tokens - 1, numbers))
        own = positions.new_tensor(
            np.arange(shape[1])[None] if expansion is None else expansion.own
        )
        own = own.expand(batch, -1)
        steps = torch.arange(own.shape[1], device=own.device)
        is_padding = positions.gather(1, own) < 0
        if expansion is None:
            places = torch.from_numpy(self._layout.place(numbers.clip(0))).to(own.device)
        else:
            places = torch.from_numpy(expansion.places).to(own.device)
            ends = torch.from_numpy(expansion.end[:, -1:]).to(own.device)
            is_padding = is_padding | (steps > ends)
        sees = self._sees_at(visible, own, places, is_padding)
        slots = torch.where(is_padding, self.cache.capacity - 1, places + self._num_prompt)
        mask = self.cache.begin_at(self._spread(slots), self._spread(sees))
        codes, forced = self._fed(tokens, expansion)
        hidden = self._run(codes, forced, places, mask)
        if expansion is not None:
            hidden = _gather(hidden, torch.from_numpy(expansion.end), self._branches)
        return self._guided(hidden, positions.to(hidden.device) + 1)

    def _sees_at(self, visible: Tensor, own: Tensor, places: Tensor, is_padding: Tensor) -> Tensor:
        """[B, S, P + M] bool, what each thing that is fed looks at in the cache."""
        owner, within = (torch.from_numpy(part).to(own.device) for part in self._layout.owners())
        wide = own[..., None].expand(-1, -1, visible.shape[2])
        drawn = visible.gather(1, wide)[..., owner]  # [B, S, M]
        # Of its own token and what hangs on that, a thing sees what stands before it, and itself.
        mine = places.clamp(max=len(owner) - 1)
        is_mine = owner[mine][..., None] == owner
        drawn = torch.where(is_mine, within <= within[mine][..., None], drawn)
        drawn = drawn & ~is_padding[..., None]
        prompt = drawn.new_ones(*drawn.shape[:2], self._num_prompt)
        return torch.cat([prompt, drawn], dim=2)

    def commit(self, kept: Tensor, counts: Tensor) -> None:
        """Keep some of the last candidates and forget the rest.

        Args:
            kept: [B, K] int64, indices into the candidates, parents before children.
            counts: [B] int64, how many of each row of `kept` count; rows may differ.

        Raises:
            StateError: no candidates are pending, or a parent was not kept.
        """
        if self.cache.num_pending == 0:
            raise StateError("commit without candidates: call extend first")
        expansion = self._expansion
        num = self.cache.num_pending if expansion is None else expansion.begin.shape[1]
        parents = None if self._tree is None else self._tree.laws - 1
        check_path(kept, counts, parents, num, len(self.lengths))
        self.lengths = self.lengths + counts
        if expansion is not None:
            kept, counts = expansion.kept(kept, counts)
        self.cache.commit(self._spread(kept), self._spread(counts))

    def advance(self, counts: Tensor, given: Sequence[int]) -> None:
        """Keep the first candidates of each row of a chain; see `arvision.contracts.Advances`."""
        if self._expansion is not None or self.cache.num_pending == 0:
            every = torch.arange(int(max(given, default=0)), device=counts.device)
            self.commit(every.expand(len(given), -1), counts)
            return
        self.cache.advance(self._spread(counts), list(given) * self._branches)
        self.lengths = self.lengths + counts

    def advance_along(self, path: Tensor, counts: Tensor, given: Sequence[int]) -> None:
        """Keep a path of each row; see `arvision.contracts.AdvancesAlong`."""
        self.lengths = self.lengths + counts
        if self._expansion is not None:
            path, counts = self._expansion.kept(path, counts)
            given = counts.tolist()
        self.cache.keep(self._spread(path), self._spread(counts), list(given) * self._branches)

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows` [B'] and drop the others."""
        batch = len(self.lengths)
        every = torch.cat([rows + branch * batch for branch in range(self._branches)])
        self.cache.select(every)
        self._next = self._next[every]
        self.lengths = self.lengths[rows]
        if isinstance(self._scale, Tensor):
            self._scale = self._scale[rows]

    def join(self, other: ImageState) -> None:
        """Take in the rows of another state, see `arvision.contracts.TakesRows`.

        The shorter prompts get padding in front, which nothing looks at.

        Raises:
            StateError: they have other numbers of rows for each image.
        """
        if self._branches != other._branches:
            raise StateError(
                f"{other._branches} rows of each image beside {self._branches}: expected as many"
            )
        longest = max(self._num_prompt, other._num_prompt)
        for state in (self, other):
            state.cache.shift(longest - state._num_prompt)
        for state, beside in ((self, other), (other, self)):
            state.cache.widen(beside.cache.capacity)
        own, others = len(self.lengths), len(other.lengths)
        order = interleaved(own, others, self._branches)
        self.cache.join(other.cache, order)
        self._scale = joined_scales(self._scale, own, other._scale, others, self.cache.keys)
        self._next = torch.cat([self._next, other._next])[order]
        self._num_prompt = longest
        self.lengths = torch.cat([self.lengths, other.lengths])
        self._tree = self._expansion = None


def check_numbers(logits: Tensor | Apart) -> None:
    """Refuse logits that hold NaN.

    Raises:
        InputError: see above.
    """
    parts = (logits.conditional, logits.null) if isinstance(logits, Apart) else (logits,)
    if any(bool(part.sum().isnan()) for part in parts):
        raise InputError("the model's logits hold NaN: check its weights and dtype")


def _gather(hidden: Tensor, ends: Tensor, branches: int) -> Tensor:
    """Hidden states [R, S, C] at places `ends` [b, T], b = B or 1."""
    batch = len(hidden) // branches
    index = ends.to(hidden.device).expand(batch, -1).repeat(branches, 1)
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2]))


def _visible(ancestors: Tensor, own: Tensor, has_forced: bool) -> Tensor:
    """[b or B, S, S] bool, who of the things that are fed looks at whom.

    Args:
        ancestors: [T, T] or [B, T, T] bool, of the candidates.
        own: [b, S], the candidate that a thing is or hangs on.
        has_forced: whether anything hangs on any candidate.
    """
    if not has_forced:
        return ancestors
    steps = torch.arange(own.shape[1], device=own.device)
    is_same = own[:, :, None] == own[:, None]
    trees = ancestors.expand(len(own), -1, -1)
    rows = torch.arange(len(own), device=own.device)[:, None, None]
    above = trees[rows, own[:, :, None], own[:, None]]
    return torch.where(is_same, steps <= steps[:, None], above)
