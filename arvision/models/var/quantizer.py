"""The multi-scale residual quantiser of VAR: one feature map as token maps of growing size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InputError
from ...networks import Entered, Table, entry


def _wide(tensor: Tensor) -> Tensor:
    """In float32, or float64 where it is that already: quantisation never runs in half precision."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def smoother_indices(num_scales: int, num_smoothers: int) -> list[int]:
    """Which of `num_smoothers` shared convolutions each scale takes.

    Each convolution has a tick on the unit interval, and a scale takes the nearest one. With four of
    them the outer ticks lie at 1/12 and 11/12, otherwise at 1/(2K) and 1 - 1/(2K). Two scales of the
    official ten lie midway between two ticks; numpy's rounding decides as it did in training.
    """
    edge = 1 / 3 / num_smoothers if num_smoothers == 4 else 1 / 2 / num_smoothers
    ticks = np.linspace(edge, 1 - edge, num_smoothers)
    places = [scale / max(1, num_scales - 1) for scale in range(num_scales)]
    return [int(np.abs(ticks - place).argmin()) for place in places]


class Smoother(Entered, nn.Conv2d):
    """Weights of a 3x3 convolution that is mixed in equal parts with its input, see `Painter`."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    @entry
    def weights(self) -> tuple[Tensor, Tensor]:
        """Weight [D, D, 3, 3] and bias [D], float32 or wider, that stay good when they are moved."""
        assert self.bias is not None
        weight, bias = _wide(self.weight), _wide(self.bias)
        return weight.view_as(weight), bias.view_as(bias)


class SharedSmoothers(nn.Module):
    """Smoothers in the three published layouts: `qresi_ls.I`, one `qresi`, or one `K` per scale.

    Args:
        channels: width D.
        num_scales: scales of the pyramid.
        num_shared: convolutions shared by the scales; 1 for a single one, 0 for one per scale.
    """

    def __init__(self, channels: int, num_scales: int, num_shared: int) -> None:
        super().__init__()
        self.num_shared = num_shared
        if num_shared == 1:
            self.qresi = Smoother(channels)
        elif num_shared == 0:
            for scale in range(num_scales):
                self.add_module(str(scale), Smoother(channels))
        else:
            self.qresi_ls = nn.ModuleList(Smoother(channels) for _ in range(num_shared))
        self.indices = smoother_indices(num_scales, num_shared) if num_shared > 1 else []

    def of_scales(self, num_scales: int) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of each scale's smoother."""
        if self.num_shared == 1:
            return [self.qresi.weights()] * num_scales
        if self.num_shared == 0:
            each = [self.get_submodule(str(scale)) for scale in range(num_scales)]
            return [cast(Smoother, smoother).weights() for smoother in each]
        shared = [cast(Smoother, smoother).weights() for smoother in self.qresi_ls]
        return [shared[index] for index in self.indices]


@dataclass(frozen=True)
class Painter:
    """What paints the canvas: plain tensors, so that it works wherever the rest of a tokenizer waits.

    "The canvas" is the sum of the upsampled and smoothed codes so far (the paper's f-hat); it
    starts at zero.

    Attributes:
        scales: side lengths, the last one that of the canvas.
        codes: [V, D], float32 or wider.
        smoothers: weight [D, D, 3, 3] and bias [D] of a convolution for each scale.
    """

    scales: tuple[int, ...]
    codes: Tensor
    smoothers: Sequence[tuple[Tensor, Tensor]]

    @property
    def side(self) -> int:
        """Side P of the canvas."""
        return self.scales[-1]

    def blank(self, batch: int) -> Tensor:
        """The canvas before the first scale, [B, D, P, P]."""
        return self.codes.new_zeros(batch, self.codes.shape[1], self.side, self.side)

    def paint(self, canvas: Tensor, codes: Tensor, scale: int) -> Tensor:
        """The canvas after the codes [B, n, D] of a scale were added."""
        side = self.scales[scale]
        h = codes.transpose(1, 2).unflatten(2, (side, side))
        if scale < len(self.scales) - 1:
            h = F.interpolate(h, size=(self.side, self.side), mode="bicubic")
        h = h.contiguous()
        weight, bias = self.smoothers[scale]
        return canvas + (0.5 * h + 0.5 * F.conv2d(h, weight, bias, padding=1))

    def view(self, canvas: Tensor, scale: int) -> Tensor:
        """The canvas seen at the size of a scale, [B, n, D]: what the transformer is fed there."""
        side = self.scales[scale]
        if scale < len(self.scales) - 1:
            canvas = F.interpolate(canvas, size=(side, side), mode="area")
        return canvas.flatten(2).transpose(1, 2)


class MultiScaleQuantizer(nn.Module):
    """Feature maps [B, D, P, P] to token maps of every scale, coarse to fine, and back.

    A scale codes what the coarser ones left over, see `Painter` for "the canvas".

    Args:
        codebook_size: number of codes V.
        code_dim: width of a code D.
        scales: side lengths, the last one that of the feature map.
        num_shared: see `SharedSmoothers`.

    Paper: Tian et al., "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale
    Prediction", 2024, algorithms 1 and 2.
    """

    def __init__(
        self, codebook_size: int, code_dim: int, scales: Sequence[int], num_shared: int
    ) -> None:
        super().__init__()
        self.scales = tuple(scales)
        self.embedding = Table(codebook_size, code_dim)
        self.quant_resi = SharedSmoothers(code_dim, len(self.scales), num_shared)

    def codes(self) -> Tensor:
        """Codebook [V, D], float32 or wider."""
        return _wide(self.embedding.whole())

    def painter(self) -> Painter:
        """What paints with the current weights."""
        smoothers = self.quant_resi.of_scales(len(self.scales))
        return Painter(self.scales, self.codes(), smoothers)

    def nearest(self, z: Tensor) -> Tensor:
        """Index of the nearest code (Euclidean) of each row of `z` [..., D]."""
        codes = self.codes()
        distance = z.square().sum(-1, keepdim=True) + codes.square().sum(-1) - 2 * (z @ codes.T)
        return distance.argmin(dim=-1)

    def encode(self, features: Tensor) -> Tensor:
        """Code indices [B, L] of all scales of feature maps [B, D, P, P].

        Raises:
            InputError: maps of another size than the finest scale.
        """
        painter = self.painter()
        side = painter.side
        if features.shape[-2:] != (side, side):
            raise InputError(
                f"feature map of {tuple(features.shape[-2:])}: expected {side} x {side}, the finest "
                "scale"
            )
        rest = _wide(features)
        canvas = painter.blank(len(rest))
        indices = []
        for scale in range(len(self.scales)):
            chosen = self.nearest(painter.view(rest - canvas, scale))
            canvas = painter.paint(canvas, painter.codes[chosen], scale)
            indices.append(chosen)
        return torch.cat(indices, dim=1)

    def canvas(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """The finished canvas, and what a transformer is fed on the way.

        Args:
            codes: [B, L, D] of all scales, coarse to fine.

        Returns:
            Canvas [B, D, P, P], and the views [B, L - 1, D] of all scales but the first.
        """
        painter = self.painter()
        canvas = painter.blank(len(codes))
        views = []
        parts = codes.split([side * side for side in self.scales], dim=1)
        for scale, part in enumerate(parts):
            if scale > 0:
                views.append(painter.view(canvas, scale))
            canvas = painter.paint(canvas, part, scale)
        fed = torch.cat(views, dim=1) if views else codes[:, :0]
        return canvas, fed
