"""Layers that next-scale models share: normalisations that a condition sets, and the feed-forward.

Parameter names are those of the published checkpoints of VAR and Infinity.
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.linear import Linear

MAX_LOG_SCALE = math.log(100)
"""Largest logarithm of a head's query length."""


class FeedForward(nn.Module):
    """Two linear layers with a tanh-GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to [..., C]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def projection(width: int, num: int) -> Any:
    """SiLU, then a linear layer from the condition [R, C] to `num` vectors."""
    return nn.Sequential(nn.SiLU(), Linear(width, num * width))


class SharedProjection(nn.Module):
    """The projection of the condition that all blocks of a shared-AdaLN model start from.

    Its layer has the name that it has in a `projection`.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.add_module("1", Linear(width, 6 * width))

    def forward(self, condition: Tensor) -> Tensor:
        """Condition [R, C] to [R, 1, 6, C]."""
        projected = self.get_submodule("1")(F.silu(condition))
        return projected.view(len(condition), 1, 6, -1)


class HeadNorm(nn.Module):
    """The normalisation before the logits."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.ada_lin = projection(width, 2)

    def modulation(self, condition: Tensor) -> Tensor:
        """Scale and shift [R, 1, 2, C] of the condition [R, C]."""
        return self.ada_lin(condition).view(len(condition), 1, 2, -1)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """[R, T, C] to [R, T, C]."""
        scale, shift = modulation.unbind(2)
        return modulated_norm(x, scale, shift, self.eps)


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Layer normalisation without weights of its own, then (1 + scale) and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift
