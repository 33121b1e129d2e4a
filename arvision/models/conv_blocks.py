"""Convolutional autoencoders of image tokenizers: the blocks, and the layout that VAR, MAR and Infinity share.

Parameter names are those of the published checkpoints (all descend from the autoencoder of latent
diffusion).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError


def group_norm(channels: int) -> nn.GroupNorm:
    """Normalisation over 32 groups, or 24 where 32 do not divide the channels."""
    return nn.GroupNorm(24 if channels % 32 else 32, channels, eps=1e-6)


def regroup(network: nn.Module, num_groups: int) -> None:
    """Normalise over other groups in all layers of a network; the parameters keep their shapes.

    32 stands for the layout that was published, see `group_norm`, and changes nothing.

    A group of one channel (32 groups at a width of 32) forgets how bright the channel is, and with
    it flat colours. The published widths have four channels or more in each.

    Raises:
        InputError: a width that so many groups do not divide.
    """
    if num_groups == 32:
        return
    for norm in network.modules():
        if isinstance(norm, nn.GroupNorm):
            if norm.num_channels % num_groups:
                raise InputError(
                    f"norm_num_groups {num_groups}: expected a divisor of all widths, such as "
                    f"{norm.num_channels}"
                )
            norm.num_groups = num_groups


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the side."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions with group normalisation and swish, and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(in_channels), conv3x3(in_channels, out_channels)
        self.norm2, self.conv2 = group_norm(out_channels), conv3x3(out_channels, out_channels)
        self.nin_shortcut = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] to [B, out, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Single-head attention among the positions of feature maps [B, C, H, W]."""
    # Rows whose numbers lie apart in memory would take SDPA's slow path.
    rows = [part.flatten(2).mT.contiguous()[:, None] for part in (q, k, v)]
    out = F.scaled_dot_product_attention(rows[0], rows[1], rows[2])
    return out[:, 0].mT.reshape(q.shape)


class AttentionBlock(nn.Module):
    """Attention over the positions of a feature map, with a layer each for q, k and v."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same."""
        normed = self.norm(x)
        return x + self.proj_out(attend(self.q(normed), self.k(normed), self.v(normed)))


class FusedAttentionBlock(nn.Module):
    """Attention over the positions of a feature map, with q, k and v in one layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same."""
        return x + self.proj_out(attend(*self.qkv(self.norm(x)).chunk(3, dim=1)))


Attention = Callable[[int], nn.Module]
"""Makes the attention block of a width."""


class Downsample(nn.Module):
    """Halve the side: pad right and bottom by one zero, then a 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, H/2, W/2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the side by nearest neighbours, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, 2H, 2W]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, attention after each where it has any, then a resize.

    Args:
        in_channels, channels: widths before and behind the first block.
        num_blocks: residual blocks.
        attention: None for a level without.
    """

    def __init__(
        self, in_channels: int, channels: int, num_blocks: int, attention: Attention | None
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else channels, channels) for i in range(num_blocks)
        )
        made = [] if attention is None else [attention(channels) for _ in range(num_blocks)]
        self.attn = nn.ModuleList(made)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] to the next resolution, or the same at the end of the network."""
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        for name in ("downsample", "upsample"):
            if (resize := getattr(self, name, None)) is not None:
                x = resize(x)
        return x


class Middle(nn.Module):
    """The bottom of the network: block, attention where there is any, block."""

    def __init__(self, channels: int, attention: Attention | None) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        if attention is not None:
            self.attn_1 = attention(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same."""
        x = self.block_1(x)
        if (attend := getattr(self, "attn_1", None)) is not None:
            x = attend(x)
        return self.block_2(x)


class Encoder(nn.Module):
    """Pixels [B, 3, H, W] to features [B, out, H/f, W/f]; `down.0` has the full resolution.

    Args:
        ch: base width.
        ch_mult: width multiplier of each level; every level but the last halves the side.
        num_blocks: residual blocks of a level.
        out_channels: width of the features.
        attention: of the middle; None for none.
        level_attention: of the deepest level; None for none.
    """

    def __init__(
        self,
        ch: int,
        ch_mult: Sequence[int],
        num_blocks: int,
        out_channels: int,
        attention: Attention | None,
        level_attention: Attention | None,
    ) -> None:
        super().__init__()
        widths = [ch] + [ch * mult for mult in ch_mult]
        last = len(ch_mult) - 1
        self.conv_in = conv3x3(3, ch)
        self.down = nn.ModuleList()
        for index in range(len(ch_mult)):
            own = level_attention if index == last else None
            level = Level(widths[index], widths[index + 1], num_blocks, own)
            if index < last:
                level.downsample = Downsample(widths[index + 1])
            self.down.append(level)
        self.mid = Middle(widths[-1], attention)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = conv3x3(widths[-1], out_channels)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode."""
        h = self.conv_in(pixels)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Features [B, in, h, w] to pixels [B, 3, hf, wf]; `up.0` has the full resolution, runs last.

    Args:
        ch: base width.
        ch_mult: as in `Encoder`.
        num_blocks: residual blocks of an encoder level; a level has one more.
        in_channels: width of the features.
        attention: of the middle; None for none.
        level_attention: of the deepest level; None for none.
    """

    def __init__(
        self,
        ch: int,
        ch_mult: Sequence[int],
        num_blocks: int,
        in_channels: int,
        attention: Attention | None,
        level_attention: Attention | None,
    ) -> None:
        super().__init__()
        widths = [ch * mult for mult in ch_mult]
        last = len(widths) - 1
        self.conv_in = conv3x3(in_channels, widths[-1])
        self.mid = Middle(widths[-1], attention)
        self.up = nn.ModuleList()
        for index, width in enumerate(widths):
            own = level_attention if index == last else None
            level = Level(widths[min(index + 1, last)], width, num_blocks + 1, own)
            if index > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = group_norm(widths[0])
        self.conv_out = conv3x3(widths[0], 3)

    def forward(self, features: Tensor) -> Tensor:
        """Decode."""
        h = self.mid(self.conv_in(features))
        for level in reversed(list(self.up)):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))
