"""The target drafts for itself: a chain from passes of a part of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....decoding.logits import Shaping
from ....decoding.tree import TokenTree, none_left
from ....errors import InputError
from ..base import TextDrafter


class ShortTarget(TextDrafter):
    """A chain from passes of some of the target's layers; nothing is committed in between."""

    max_draft: int
    confidence: float

    def __init__(self) -> None:
        self.shaping = Shaping()

    def begin(self, state: Any) -> None:
        """Hold on to the target's state.

        Raises:
            InputError: a state that cannot skip layers.
        """
        if not hasattr(state, "draft"):
            raise InputError(
                f"{type(self).__name__} skips layers of the target, and this model's state has no "
                "`draft`: expected a language model of transformers"
            )
        self.state = state

    def law(self, tokens: Tensor) -> Tensor:
        """Laws [B, V] after the last of candidates [B, T]; subclasses pick the layers."""
        raise NotImplementedError

    def propose(self, tokens: Tensor, lengths: Tensor, num: int, round_number: int) -> TokenTree:
        """A chain that ends where every row is unsure; see `arvision.decoding.loop.Drafter`."""
        self.follow(tokens, lengths)
        fed = tokens.gather(1, lengths[:, None] - 1)
        sure = torch.ones_like(lengths, dtype=torch.bool)
        drafts = fed[:, :0]
        for place in range(num):
            law = self.law(fed)
            scores = law
            if self.shaping.temperature > 0:
                where = (lengths + place)[:, None].clamp(max=self.num_tokens - 1)
                scores = law + self.noise.gumbel(where, law.shape[-1], law.dtype)[:, 0]
            token = scores.argmax(-1)
            drafts = torch.cat([drafts, token.where(sure, -1)[:, None]], dim=1)
            fed = torch.cat([fed, token[:, None]], dim=1)
            sure = sure & (law.amax(-1).exp() >= self.confidence)
            if none_left(sure):
                break
        return TokenTree(drafts)

    def shaped(self, logits: Tensor) -> Tensor:
        """Log-probabilities [B, V] of logits; at temperature 0 those of temperature 1."""
        return (self.shaping if self.shaping.temperature else Shaping())(logits)


def num_skipped(num_layers: int, share: float) -> int:
    """How many layers a share of all is, if the first and the last always run."""
    return min(num_layers - 2, round(share * num_layers)) if num_layers > 2 else 0


def spread_layers(num_layers: int, num_skipped: int) -> list[int]:
    """The layers that run if the skipped ones lie evenly between the first and the last."""
    step = (num_layers - 2) / max(1, num_skipped)
    left_out = {1 + int(step * k) for k in range(num_skipped)}
    return [layer for layer in range(num_layers) if layer not in left_out]
