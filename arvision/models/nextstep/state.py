"""Decode state of a causal continuous model: a key/value cache that knows which latents it holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...decoding.cache import KVCache
from ...decoding.transformers_cache import CacheView
from ...errors import StateError
from ...networks import enter
from .transformer import NextStepTransformer


class NextStepState:
    """Prompts and latents of B images; see `arvision.contracts.LatentState`.

    The condition of a latent depends on the latents before it alone. So one pass over an image's
    latents gives the conditions of all its prefixes, and latents that were seen before, with the
    same ones before them, are not computed again: the cache remembers their values. Whoever drives
    the state (one latent after another, or whole guessed rows) need not say what to keep.

    Args:
        transformer: the network.
        prompts: G * B embeddings [L, W] of prompts, branch after branch of guidance, all images of a
            branch together; they may differ in length.
        num_images: B.
    """

    def __init__(
        self, transformer: NextStepTransformer, prompts: Sequence[Tensor], num_images: int
    ) -> None:
        self._transformer = transformer
        num, config = transformer.num_tokens, transformer.config
        first = prompts[0]
        self._starts = torch.tensor([len(p) for p in prompts], device=first.device)
        # The last latent is never fed: its place takes the padding of shorter rows.
        self._spare = int(self._starts.max()) + num - 1
        self._cache = KVCache(
            config["num_layers"],
            len(prompts),
            config["num_kv_heads"],
            self._spare + 1,
            config["head_dim"],
            device=first.device,
            dtype=first.dtype,
        )
        self._view = CacheView(self._cache)
        self.lengths = torch.zeros(num_images, dtype=torch.int64, device=first.device)
        self._every = torch.arange(num_images, device=first.device)
        self._places = torch.arange(num, device=first.device)
        self._latents = torch.zeros(num_images, num, transformer.latent_dim, device=first.device)
        self._held = self._latents.clone()
        self._num_held = torch.zeros_like(self.lengths)
        branches = len(prompts) // num_images
        self._z = first.new_zeros(num_images, num, branches * first.shape[1])
        self._prefill(prompts)

    def _prefill(self, prompts: Sequence[Tensor]) -> None:
        # What pads the shorter prompts stands behind them, where latents will overwrite it.
        padded = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
        slots = torch.arange(padded.shape[1], device=padded.device).expand(len(padded), -1)
        hidden = self._run(padded, slots)
        rows = torch.arange(len(hidden), device=hidden.device)
        last = hidden[rows, self._starts - 1]
        z = enter(self._transformer, "conditions", last, torch.zeros_like(rows))
        self._z[:, 0] = torch.cat(z.chunk(len(prompts) // len(self.lengths)), dim=-1)

    def _run(self, embeddings: Tensor, slots: Tensor) -> Tensor:
        """Hidden states [R, T, W] of `embeddings` [R, T, W] written to `slots` [R, T].

        A slot sees itself and those before it. The slot behind everything is for padding.
        """
        used = slots.masked_fill(slots == self._spare, 0)
        reach = torch.arange(int(used.max()) + 1, device=slots.device)
        mask = self._cache.begin_at(slots, reach <= slots[..., None])
        return self._transformer(embeddings, mask, slots, self._view)

    def _read(self, images: Tensor, latents: Tensor, counts: Tensor) -> None:
        """Make `latents` [A, N, D], the first `counts` [A] of each, what the cache holds of `images`.

        Afterwards `_z` of these images is right up to place `counts`.
        """
        counts = counts.clamp(max=len(self._places) - 1)
        self._held = self._held.to(torch.promote_types(self._held.dtype, latents.dtype))
        held = self._held[images]
        is_new = (held != latents).any(-1) | (self._places >= self._num_held[images, None])
        same = torch.where(is_new, self._places, len(self._places)).amin(1)
        missing = (counts - same).clamp(min=0)
        most = int(missing.max())
        if most == 0:
            return
        offsets = self._places[:most]
        counted = offsets < missing[:, None]
        places = (same[:, None] + offsets).clamp(max=len(self._places) - 1)
        rows = torch.arange(len(images), device=images.device)[:, None]
        # Images that have nothing to read go along as padding.
        fed = latents.new_zeros(len(self.lengths), most, latents.shape[2])
        fed[images] = latents[rows, places]
        slots = self._starts.view(-1, len(self.lengths), 1).expand(-1, -1, most).clone()
        slots[:, images] += places
        is_padding = torch.ones_like(slots[0], dtype=torch.bool)
        is_padding[images] = ~counted
        slots = slots.masked_fill(is_padding, self._spare).flatten(0, 1)
        branches = len(slots) // len(fed)
        embedded = enter(self._transformer, "embed_latents", fed).repeat(branches, 1, 1)
        following = (slots - self._starts[:, None] + 1).clamp(min=0)
        z = enter(self._transformer, "conditions", self._run(embedded, slots), following)
        z = torch.cat(z.chunk(branches), dim=-1)[images]
        row, column = counted.nonzero(as_tuple=True)
        self._z[images[row], places[row, column] + 1] = z[row, column]
        longer = missing > 0
        self._held[images[longer]] = latents[longer].to(self._held.dtype)
        self._num_held[images[longer]] = counts[longer]

    def condition(self, count: int) -> Tensor:
        """Conditions z [B, 1, Dz] of the next position.

        Raises:
            StateError: more than one: the second depends on the first.
        """
        known = self._next(count)
        self._read(self._every, self._latents, self.lengths)
        return _precise(self._z[:, known : known + 1])

    def _next(self, count: int) -> int:
        known = int(self.lengths.max())
        left = len(self._places) - known
        if count != 1 or left < 1:
            raise StateError(f"{count} latents asked for or fed: expected 1 of the {left} left")
        return known

    def feed(self, latents: Tensor) -> None:
        """Latents [B, 1, D] of the next position become known."""
        known = self._next(latents.shape[1])
        self._latents = self._latents.to(latents.dtype)
        self._latents[:, known] = latents[:, 0]
        self.lengths = self.lengths + 1

    def contexts(self, latents: Tensor, known: Tensor, images: Tensor) -> Tensor:
        """Conditions z [R, N, Dz] of every position in R hypothetical contexts.

        A context knows a prefix. Its positions further on than the next one get the condition of the
        next one, for lack of anything better. Contexts of an image that agree with its longest one
        take no pass of their own: prefixes of one row cost as much as the row.

        Args:
            latents: [R, N, D].
            known: [R, N] bool; the first some of each row.
            images: [R] int64, which image of the batch a context belongs to.

        Raises:
            StateError: a context that knows a latent without those before it.
        """
        if bool((known[:, 1:] & ~known[:, :-1]).any()):
            raise StateError("a causal model's context is a prefix: a latent before it is unknown")
        counts, num = known.sum(1), len(known)
        z = self._z.new_empty(num, known.shape[1], self._z.shape[2])
        left = torch.arange(num, device=images.device)
        while len(left):
            chosen = self._longest(images, counts, left)
            self._read(images[chosen], latents[chosen], counts[chosen])
            row_of = torch.zeros_like(self.lengths)
            row_of[images[chosen]] = chosen
            own = row_of[images[left]]
            agrees = ((latents[left] == latents[own]).all(-1) | ~known[left]).all(1) | (left == own)
            done = left[agrees]
            places = torch.minimum(self._places, counts[done, None])
            z[done] = self._z[images[done, None], places]
            left = left[~agrees]
        return _precise(z)

    def _longest(self, images: Tensor, counts: Tensor, left: Tensor) -> Tensor:
        """Of the contexts `left`, the longest one of each image that has any."""
        best = torch.full_like(self.lengths, -1)
        best = best.scatter_reduce(0, images[left], counts[left], "amax")
        candidates = left[counts[left] == best[images[left]]]
        first = torch.full_like(self.lengths, len(images))
        first = first.scatter_reduce(0, images[candidates], candidates, "amin")
        return first[first < len(images)]


def _precise(z: Tensor) -> Tensor:
    """Conditions in float32 at least: chains run in their precision, whatever the network's."""
    return z.to(torch.promote_types(z.dtype, torch.float32))
