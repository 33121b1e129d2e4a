"""Which latents of each image are known, and what the head needs to draw the next ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import StateError
from ...networks import enter
from .transformer import KeptFeatures, MARTransformer, span_of

NUM_OTHERS = 15
"""Places, beside the newest and the next ones, that are computed at least where places are chosen."""


class MARState:
    """Decode state of a MAR model; see `arvision.contracts.LatentState`.

    Args:
        transformer: the network.
        condition: [B, W], or with guidance [2B, W]: the unconditional rows follow.
        order: [B, N] int64, positions in the order of drawing.
    """

    def __init__(self, transformer: MARTransformer, condition: Tensor, order: Tensor) -> None:
        self._transformer, self._order = transformer, order
        self._condition = condition.view(-1, len(order), condition.shape[-1])
        num, dim = transformer.num_tokens, transformer.config["latent_dim"]
        self.lengths = torch.zeros(len(order), dtype=torch.int64, device=order.device)
        self._latents = condition.new_zeros(len(order), num, dim)
        self._known = torch.zeros_like(order, dtype=torch.bool)
        self._refresh, self._keeps_guidance = 1, False
        self._first, self._shares = 0, None
        self._asked = self._computed = 0
        self._kept: KeptFeatures | None = None

    def keep_features(
        self,
        refresh: int,
        guidance: bool = False,
        first: int = 0,
        shares: Sequence[float] | None = None,
    ) -> None:
        """Reuse features between the calls of `condition`; an approximation.

        Args:
            refresh: calls until everything is computed anew.
            guidance: also keep, in between, how far the unconditional z is from the conditional one.
            first: calls at the start in which everything is computed.
            shares: for each call the share of the places that all decoder blocks compute, the newest
                and next ones and those that changed most; None for the newest and next ones alone.

        Source: Yan et al., "LazyMAR: Accelerating Masked Autoregressive Models via Feature
        Caching", 2025, section 3 (token cache and condition cache).
        """
        self._refresh, self._keeps_guidance = refresh, guidance
        self._first, self._shares = first, shares

    def _next(self, count: int) -> Tensor:
        left = self._order.shape[1] - int(self.lengths.max())
        if not 1 <= count <= left:
            raise StateError(f"{count} latents asked for or fed: expected 1 to {left}")
        places = self.lengths[:, None] + torch.arange(count, device=self._order.device)
        return self._order.gather(1, places)

    def condition(self, count: int) -> Tensor:
        """Conditions z [B, count, Dz] of the next positions of the order."""
        positions = self._next(count)
        if self._asked >= self._first and (self._asked - self._first) % self._refresh:
            z = self._updated(positions)
        else:
            if self._refresh > 1:
                self._kept = KeptFeatures(self._transformer)
            images = torch.arange(len(positions), device=positions.device)
            every = self.contexts(self._latents, self._known, images, self._kept)
            if self._keeps_guidance:
                self._every = every
            z = _at(every, positions)
        self._asked += 1
        self._computed = int(self.lengths.max())
        return z

    def _updated(self, positions: Tensor) -> Tensor:
        """Conditions z [B, count, Dz] from kept features, see `keep_features`."""
        assert self._kept is not None
        halves = len(self._condition)
        rows = 1 if self._keeps_guidance else halves
        fed = self._order[:, self._computed : int(self.lengths.max())]
        changed: dict[str, Any] = {}
        if self._shares is not None:
            total = self._transformer.num_buffer + self._transformer.num_tokens
            least = fed.shape[1] + positions.shape[1] + NUM_OTHERS
            num = min(total, max(least, int(total * self._shares[self._asked])))
            changed = {"condition": self._condition[:rows].flatten(0, 1), "num": num}
        z = enter(
            self._transformer,
            "update",
            _at(self._latents, fed).repeat(rows, 1, 1),
            fed.repeat(rows, 1),
            self._known.repeat(rows, 1),
            positions.repeat(rows, 1),
            self._kept,
            **changed,
        )
        z = torch.cat(z.chunk(rows), dim=-1)
        if rows < halves:
            conditional, null = _at(self._every, positions).chunk(2, dim=-1)
            z = torch.cat([z, z + null - conditional], dim=-1)
        return z

    def feed(self, latents: Tensor) -> None:
        """Latents [B, count, D] of the next positions become known."""
        positions = self._next(latents.shape[1])
        self._known = self._known.scatter(1, positions, True)
        place = positions[..., None].expand_as(latents)
        self._latents = self._latents.scatter(1, place, latents.to(self._latents.dtype))
        self.lengths = self.lengths + latents.shape[1]

    def contexts(
        self, latents: Tensor, known: Tensor, images: Tensor, kept: KeptFeatures | None = None
    ) -> Tensor:
        """Conditions z [R, N, Dz] of every position in R hypothetical contexts, in one pass.

        Args:
            latents: [R, N, D]; what stands at unknown positions does not matter.
            known: [R, N] bool; rows may know different numbers of latents.
            images: [R] int64, which image a context belongs to.
            kept: takes the features of the pass.
        """
        condition = self._condition[:, images]
        halves = len(condition)
        z = self._transformer(
            latents.to(condition.dtype).repeat(halves, 1, 1),
            known.repeat(halves, 1),
            condition.flatten(0, 1),
            kept,
            span_of(known),
        )
        return torch.cat(z.chunk(halves), dim=-1)


def _at(values: Tensor, positions: Tensor) -> Tensor:
    """Values [B, N, D] at positions [B, M]."""
    return values.gather(1, positions[..., None].expand(-1, -1, values.shape[-1]))
