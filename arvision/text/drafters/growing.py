"""Trees that grow where they are worth most, all rows at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grown:
    """Places of growing trees, M of each row, parents first.

    Attributes:
        worth: [B, M], logarithms of what places are worth; -inf where there is none.
        values: [B, M], of the products of the draft's probabilities down to their tokens.
        tokens: [B, M].
        parents: [B, M], -1 for the last known token.
        depths: [B, M].
    """

    worth: Tensor
    values: Tensor
    tokens: Tensor
    parents: Tensor
    depths: Tensor

    @classmethod
    def roots(cls, worth: Tensor, values: Tensor, tokens: Tensor) -> Grown:
        """The children [B, 1, W] of the last known token."""
        tokens = tokens[:, 0]
        return cls(
            worth[:, 0], values[:, 0], tokens, torch.full_like(tokens, -1), torch.zeros_like(tokens)
        )

    def best(self, num: int) -> tuple[Grown, Tensor]:
        """The best `num` places in their order, which are trees, and where they stood."""
        worth, parents = self.worth, self.parents
        order = worth.argsort(dim=1, descending=True, stable=True)[:, :num].sort(dim=1).values
        place = torch.full_like(parents, -1)
        place.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
        worth, values, tokens, parents, depths = (
            part.gather(1, order)
            for part in (worth, self.values, self.tokens, parents, self.depths)
        )
        is_real = worth > float("-inf")
        above = torch.where(parents < 0, -1, place.gather(1, parents.clamp(min=0)))
        above, tokens = above.where(is_real, -1), tokens.where(is_real, -1)
        return Grown(worth, values, tokens, above, depths), order

    def longer(
        self, level: int, fresh: Tensor, worth: Tensor, values: Tensor, tokens: Tensor
    ) -> Grown:
        """With children [B, M, W] of the places that are `fresh`, [B, M]."""
        batch, num, width = tokens.shape
        above = torch.arange(num, device=tokens.device)[:, None].expand(batch, -1, width)
        worth = (self.values[..., None] + worth).masked_fill(~fresh[..., None], float("-inf"))
        values = self.values[..., None] + values
        return Grown(
            torch.cat([self.worth, worth.flatten(1)], dim=1),
            torch.cat([self.values, values.flatten(1)], dim=1),
            torch.cat([self.tokens, tokens.flatten(1)], dim=1),
            torch.cat([self.parents, above.flatten(1)], dim=1),
            torch.cat([self.depths, torch.full_like(above, level).flatten(1)], dim=1),
        )
