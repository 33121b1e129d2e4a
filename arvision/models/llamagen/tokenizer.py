"""The VQ image tokenizers of LlamaGen (VQ-16, VQ-8 and smaller ones)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...checkpoint import load_strictly, read_state_dict, split_placement
from ...errors import InputError
from ...kernels.nearest_code import nearest_code
from ...networks import Table, entry, hot_entry
from ...schema import Count, Layers, Levels, Size
from ..conv_blocks import (
    AttentionBlock,
    Downsample,
    ResnetBlock,
    Upsample,
    conv3x3,
    group_norm,
    regroup,
)
from ..network import Network
from ..pixels import check_codes, read_pixels
from .convert import TOKENIZER_WRAPPERS, tokenizer_sizes


class Level(nn.Module):
    """The blocks of one resolution; only the deepest level has attention."""

    def __init__(self, widths: Sequence[int], has_attention: bool) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResnetBlock(a, b) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttentionBlock(b) for b in (widths[1:] if has_attention else ()))

    def forward(self, x: Tensor) -> Tensor:
        """Residual blocks, each followed by its attention where there is one."""
        for index, block in enumerate(self.res):
            x = block(x)
            if len(self.attn) > 0:
                x = self.attn[index](x)
        return x


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList(
        [ResnetBlock(channels, channels), AttentionBlock(channels), ResnetBlock(channels, channels)]
    )


class Encoder(nn.Module):
    """Pixels [B, 3, H, W] to features [B, z, H/f, W/f]."""

    def __init__(self, ch: int, ch_mult: Sequence[int], num_blocks: int, z_channels: int) -> None:
        super().__init__()
        widths = [ch * mult for mult in ch_mult]
        self.conv_in = conv3x3(3, ch)
        self.conv_blocks = nn.ModuleList()
        previous = ch
        for index, width in enumerate(widths):
            deepest = index == len(widths) - 1
            level = Level([previous] + [width] * num_blocks, deepest)
            if not deepest:
                level.downsample = Downsample(width)
            self.conv_blocks.append(level)
            previous = width
        self.mid = _middle(previous)
        self.norm_out = group_norm(previous)
        self.conv_out = conv3x3(previous, z_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Encode."""
        h = self.conv_in(x)
        for level in self.conv_blocks:
            h = level(h)
            if (downsample := getattr(level, "downsample", None)) is not None:
                h = downsample(h)
        for block in self.mid:
            h = block(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Features [B, z, h, w] to pixels [B, 3, h*f, w*f]; level 0 is the deepest."""

    def __init__(self, ch: int, ch_mult: Sequence[int], num_blocks: int, z_channels: int) -> None:
        super().__init__()
        widths = [ch * mult for mult in reversed(ch_mult)]
        previous = widths[0]
        self.conv_in = conv3x3(z_channels, previous)
        self.mid = _middle(previous)
        self.conv_blocks = nn.ModuleList()
        for index, width in enumerate(widths):
            level = Level([previous] + [width] * (num_blocks + 1), index == 0)
            if index < len(widths) - 1:
                level.upsample = Upsample(width)
            self.conv_blocks.append(level)
            previous = width
        self.norm_out = group_norm(previous)
        self.conv_out = conv3x3(previous, 3)

    def forward(self, z: Tensor) -> Tensor:
        """Decode."""
        h = self.conv_in(z)
        for block in self.mid:
            h = block(h)
        for level in self.conv_blocks:
            h = level(h)
            if (upsample := getattr(level, "upsample", None)) is not None:
                h = upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Quantizer(nn.Module):
    """A codebook looked up by cosine similarity.

    `codebook_used` is a training-time record of the official release; it is kept so that official
    files load strictly, and written back unchanged.
    """

    def __init__(self, codebook_size: int, code_dim: int, num_recorded: int) -> None:
        super().__init__()
        self.embedding = Table(codebook_size, code_dim)
        if num_recorded > 0:
            self.register_buffer("codebook_used", torch.zeros(num_recorded))

    def codes(self) -> Tensor:
        """Codebook [V, D], rows of unit length."""
        return F.normalize(self.embedding.whole(), dim=-1)

    def nearest(self, z: Tensor) -> Tensor:
        """Index of the nearest code of each row of `z` [..., D]; both sides are normalised.

        On the unit sphere the nearest code is the one with the largest inner product.
        """
        return nearest_code(F.normalize(z, dim=-1), self.codes())


class LlamaGenTokenizer(Network):
    """Vector-quantised autoencoder: pixels to a grid of code indices and back.

    Args:
        ch: base width.
        ch_mult: width multiplier of each level; every level but the last halves the side.
        num_res_blocks: residual blocks of an encoder level (a decoder level has one more).
        z_channels: width between encoder and quantiser.
        codebook_size: number of codes V.
        code_dim: width of a code.
        num_recorded: length of the official usage record; 0 for none.
        norm_num_groups: groups of channels that are normalised together; see `regroup`.

    Raises:
        InputError: widths that group normalisation cannot split into so many groups.

    Paper: Sun et al., "Autoregressive Model Beats Diffusion", 2024, section 2.2.
    """

    @register_to_config
    def __init__(
        self,
        ch: Size = 128,
        ch_mult: Levels = (1, 1, 2, 2, 4),
        num_res_blocks: Layers = 2,
        z_channels: Size = 256,
        codebook_size: Size = 16384,
        code_dim: Size = 8,
        num_recorded: Count = 65536,
        norm_num_groups: Size = 32,
    ) -> None:
        super().__init__()
        if ch % 32:
            raise InputError(f"ch {ch}: expected a multiple of 32 (group normalisation)")
        self.encoder = Encoder(ch, ch_mult, num_res_blocks, z_channels)
        self.decoder = Decoder(ch, ch_mult, num_res_blocks, z_channels)
        self.quantize = Quantizer(codebook_size, code_dim, num_recorded)
        self.quant_conv = nn.Conv2d(z_channels, code_dim, 1)
        self.post_quant_conv = nn.Conv2d(code_dim, z_channels, 1)
        regroup(self, norm_num_groups)

    @classmethod
    def from_official(
        cls, source: str | Path | Mapping[str, Any], **sizes: Any
    ) -> LlamaGenTokenizer:
        """Load the authors' checkpoint; all sizes are read off its tensors.

        Args:
            source: path or state dict.
            **sizes: checked against the tensors.

        Raises:
            CheckpointError: a file that cannot be read or does not fit, naming the key.
        """
        name = "the given state dict" if isinstance(source, Mapping) else str(source)
        sizes, place = split_placement(sizes)
        tensors = read_state_dict(source, TOKENIZER_WRAPPERS)
        return load_strictly(cls, tokenizer_sizes(tensors, name, sizes), tensors, name, **place)

    @property
    def downsample_factor(self) -> int:
        """Pixels per code along one side."""
        return 2 ** (len(self.config["ch_mult"]) - 1)

    @entry
    def codes(self) -> Tensor:
        """Codebook [V, D], rows of unit length."""
        return self.quantize.codes()

    @entry
    def pre_quant(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] to continuous codes [B, D, h, w] before quantisation.

        Raises:
            InputError: another shape, or sides that the downsampling factor does not divide.
        """
        factor = self.downsample_factor
        if pixels.dim() != 4 or pixels.shape[1] != 3 or any(s % factor for s in pixels.shape[2:]):
            raise InputError(
                f"pixels {tuple(pixels.shape)}: expected [B, 3, H, W] with sides divisible by {factor}"
            )
        return self._features(pixels)

    def _features(self, pixels: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(pixels.to(self.dtype)))

    def encode(self, pixels: Any) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] to code indices [B, h * w] int64, raster order.

        Args:
            pixels: PIL images, arrays or tensors, see `arvision.models.pixels.read_pixels`.

        Raises:
            InputError: another size, a value out of range, NaN or infinity.
        """
        pixels = read_pixels(pixels, self, multiple=self.downsample_factor)
        return self.encode_pixels(pixels)

    @hot_entry
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """`encode` of pixels in the network's type, where it runs."""
        return self.quantize.nearest(self._features(pixels).flatten(2).transpose(1, 2))

    @hot_entry
    def decode(self, indices: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Code indices [B, N] to pixels [B, 3, H, W], nominally in [-1, 1] and not clamped.

        Args:
            indices: int64, raster order.
            grid: rows and columns of codes; None for a square.

        Raises:
            InputError: N is not the size of the grid, or an index is out of range.
        """
        num = indices.shape[-1]
        height, width = grid or (int(num**0.5 + 0.5),) * 2
        if indices.dim() != 2 or height * width != num:
            raise InputError(f"indices {tuple(indices.shape)}: expected [B, {height} * {width}]")
        check_codes(indices, self.config["codebook_size"])
        codes = self.quantize.codes()[indices]
        return self._pixels(codes.transpose(1, 2).unflatten(2, (height, width)))

    @hot_entry
    def decode_codes(self, codes: Tensor) -> Tensor:
        """Quantised codes [B, D, h, w] to pixels [B, 3, H, W]."""
        return self._pixels(codes)

    def _pixels(self, codes: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(codes))
