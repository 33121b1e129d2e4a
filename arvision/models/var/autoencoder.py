"""Encoder and decoder of VAR's image tokenizer, with the parameter names of the release."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut, which is a 1x1 convolution where needed."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] to [B, out, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class PositionAttention(nn.Module):
    """Single-head attention over all positions of a feature map, queries to values in one layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, H, W]."""
        flat = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # [B, HW, 3C]
        q, k, v = (part.unsqueeze(1) for part in flat.chunk(3, dim=-1))
        out = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.proj_out(out.transpose(1, 2).reshape(x.shape))


class Shrink(nn.Module):
    """Half the side: one zero to the right and below, then a 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, H/2, W/2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Grow(nn.Module):
    """Twice the side by nearest neighbours, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, 2H, 2W]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """One resolution: residual blocks, attention after each at the lowest one, then a resize."""

    def __init__(
        self, in_channels: int, channels: int, num_blocks: int, has_attention: bool
    ) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * num_blocks
        self.block = nn.ModuleList(
            ResidualBlock(widths[i], widths[i + 1]) for i in range(num_blocks)
        )
        self.attn = nn.ModuleList(
            PositionAttention(channels) for _ in range(num_blocks if has_attention else 0)
        )

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
    """The bottom of the network: block, attention, block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = PositionAttention(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, H, W]."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Pixels [B, 3, H, W] to features [B, z, H/f, W/f]; `down.0` has the full resolution."""

    def __init__(self, ch: int, ch_mult: Sequence[int], num_blocks: int, z_channels: int) -> None:
        super().__init__()
        widths = [ch] + [ch * mult for mult in ch_mult]
        last = len(ch_mult) - 1
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for index in range(len(ch_mult)):
            level = Level(widths[index], widths[index + 1], num_blocks, index == last)
            if index < last:
                level.downsample = Shrink(widths[index + 1])
            self.down.append(level)
        self.mid = Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode."""
        h = self.conv_in(pixels)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Features [B, z, h, w] to pixels [B, 3, hf, wf]; `up.0` has the full resolution and runs last."""

    def __init__(self, ch: int, ch_mult: Sequence[int], num_blocks: int, z_channels: int) -> None:
        super().__init__()
        widths = [ch * mult for mult in ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for index, width in enumerate(widths):
            level = Level(widths[min(index + 1, last)], width, num_blocks + 1, index == last)
            if index > 0:
                level.upsample = Grow(width)
            self.up.append(level)
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """Decode."""
        h = self.mid(self.conv_in(features))
        for level in reversed(list(self.up)):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))
