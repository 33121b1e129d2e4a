"""A small convolutional network with weights from a seed: for tests that take milliseconds."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from ...errors import check_count
from ..features import EXTRACTORS, Extractor, ExtractorFacts


@EXTRACTORS.register("random-conv")
class RandomConv(Extractor):
    """Three random convolutions and a mean over positions; not FID.

    Args:
        dim: D.
        seed: of the weights.
    """

    def __init__(self, dim: int = 64, seed: int = 0) -> None:
        dim = check_count("dim", dim)
        super().__init__(ExtractorFacts("random-conv", dim, f"x/127.5-1 seed {seed}", None, "none"))
        draw = torch.Generator().manual_seed(seed)
        widths = (3, 16, 32, dim)
        self.layers = nn.ModuleList()
        for width_in, width_out in pairwise(widths):
            layer = nn.Conv2d(width_in, width_out, 3, 2, 1)
            with torch.no_grad():
                scale = (9 * width_in) ** -0.5
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=draw) * scale * 1.5)
                layer.bias = nn.Parameter(torch.randn(width_out, generator=draw) * 0.1)
            self.layers.append(layer)
        self.eval().requires_grad_(False)

    def compute(self, images: Tensor) -> dict[str, Tensor]:
        """Mean activations."""
        hidden = images.float() / 127.5 - 1.0
        for layer in self.layers:
            hidden = torch.relu(layer(hidden))
        return {"features": hidden.mean((2, 3))}
