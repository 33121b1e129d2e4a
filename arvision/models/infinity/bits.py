"""Bits, the codes that they stand for, and the canvas that codes are painted on.

A token holds d bits. Without patches a token is one latent of D = d channels; with patches it is
2 x 2 latents of D = d / 4 channels each. Bit 1 stands for +1/sqrt(D), bit 0 for -1/sqrt(D), so that
codes have length one. There is nothing to learn here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .schedules import Scales

PATCH = 2
"""Latents along a side of a token with patches."""


class BitPyramid:
    """Token maps of growing size, as bits, and the canvas that they sum to.

    Args:
        scales: height and width of each scale in tokens.
        channels: of a latent, D.
        patchify: whether a token is 2 x 2 latents.

    Paper: Han et al., "Infinity", 2024, section 3 (bitwise multi-scale residual quantisation, with
    the codes of Zhao et al., "Binary Spherical Quantization", 2024).
    """

    def __init__(self, scales: Scales, channels: int, patchify: bool) -> None:
        self.scales, self.channels, self.patchify = scales, channels, patchify
        self.side = PATCH if patchify else 1
        self.num_bits = channels * self.side**2
        self.counts = [height * width for height, width in scales]
        self.num_tokens = sum(self.counts)

    def latent_size(self, scale: int) -> tuple[int, int]:
        """Height and width of a scale in latents."""
        height, width = self.scales[scale]
        return height * self.side, width * self.side

    def fold(self, latents: Tensor) -> Tensor:
        """Maps of latents [B, D, H, W] to rows of tokens [B, n, d]."""
        if self.patchify:
            latents = F.pixel_unshuffle(latents, PATCH)
        return latents.flatten(2).mT

    def unfold(self, rows: Tensor, scale: int) -> Tensor:
        """Rows of tokens [B, n, d] of a scale to a map of latents [B, D, H, W]."""
        maps = rows.mT.unflatten(2, self.scales[scale])
        return F.pixel_shuffle(maps, PATCH) if self.patchify else maps

    def codes(self, bits: Tensor, dtype: torch.dtype) -> Tensor:
        """What bits (0 or 1) stand for, same shape."""
        return (2 * bits.to(dtype) - 1) * self.channels**-0.5

    def blank(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The canvas before the first scale, [B, D, H, W] of zeros."""
        return torch.zeros(batch, self.channels, *self.latent_size(-1), device=device, dtype=dtype)

    def paint(self, canvas: Tensor, bits: Tensor, scale: int) -> Tensor:
        """The canvas after the bits [B, n, d] of a scale were added."""
        codes = self.unfold(self.codes(bits, canvas.dtype), scale)
        if scale < len(self.scales) - 1:
            codes = F.interpolate(codes, size=canvas.shape[2:], mode="bilinear")
        return canvas + codes

    def view(self, canvas: Tensor, scale: int) -> Tensor:
        """The canvas seen at the size of a scale, [B, n, d]: what the transformer is fed there."""
        size = self.latent_size(scale)
        return self.fold(F.interpolate(canvas, size=size, mode="bilinear"))

    def encode(self, features: Tensor) -> Tensor:
        """Bits [B, L, d] int64 of features [B, D, H, W]; each scale codes what is left over."""
        rest, parts = features, []
        for scale in range(len(self.scales)):
            seen = F.interpolate(rest, size=self.latent_size(scale), mode="area")
            bits = self.fold((seen > 0).long().to(rest.dtype)).long()
            parts.append(bits)
            rest = rest - self.paint(torch.zeros_like(rest), bits, scale)
        return torch.cat(parts, dim=1)

    def canvas(self, bits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The finished canvas, and what a transformer is fed on the way.

        Args:
            bits: [B, L, d] of all scales, coarse to fine.
            dtype: of the canvas.

        Returns:
            Canvas [B, D, H, W], and the views [B, L - n_0, d] of all scales but the first.
        """
        canvas = self.blank(len(bits), bits.device, dtype)
        views = [canvas.new_zeros(len(bits), 0, self.num_bits)]
        for scale, part in enumerate(bits.split(self.counts, dim=1)):
            if scale > 0:
                views.append(self.view(canvas, scale))
            canvas = self.paint(canvas, part, scale)
        return canvas, torch.cat(views, dim=1)
