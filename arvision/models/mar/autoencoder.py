"""The KL autoencoder of MAR (KL-16 and smaller ones)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ...decoding.checkpoint import load_strictly, read_state_dict
from .convert import AUTOENCODER_WRAPPERS, autoencoder_sizes

OFFICIAL_SCALE = 0.2325
"""One over the standard deviation of KL-16's latents on ImageNet; their mean is not removed."""


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two 3x3 convolutions with group normalisation and swish, and a shortcut."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(channels_in), nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm2, self.conv2 = _norm(channels), nn.Conv2d(channels, channels, 3, padding=1)
        if channels_in != channels:
            self.nin_shortcut = nn.Conv2d(channels_in, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] to [B, out, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionBlock(nn.Module):
    """Single-head attention over the positions of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same."""
        normed = self.norm(x)
        q, k, v = (f(normed).flatten(2).mT[:, None] for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)[:, 0].mT
        return x + self.proj_out(out.reshape(x.shape))


class Resample(nn.Module):
    """Halve a side (padding right and bottom), or double it by nearest neighbours; convolve."""

    def __init__(self, channels: int, is_down: bool) -> None:
        super().__init__()
        self.is_down = is_down
        self.conv = (
            nn.Conv2d(channels, channels, 3, stride=2)
            if is_down
            else nn.Conv2d(channels, channels, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, H/2, W/2] or [B, C, 2H, 2W]."""
        return self.conv(
            F.pad(x, (0, 1, 0, 1)) if self.is_down else F.interpolate(x, scale_factor=2)
        )


class Level(nn.Module):
    """Blocks of one resolution, with attention after each where the level has it."""

    def __init__(self, channels_in: int, channels: int, num: int, has_attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResBlock(channels_in if i == 0 else channels, channels) for i in range(num)
        )
        self.attn = nn.ModuleList(AttentionBlock(channels) for _ in range(num * has_attention))

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] to [B, out, H', W']."""
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn) > 0:
                x = self.attn[i](x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


class Middle(nn.Module):
    """Two blocks around one attention."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Pixels [B, 3, H, W] to features [B, 2D, H/f, W/f]."""

    def __init__(self, widths: Sequence[int], ch: int, num_blocks: int, latent_dim: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        last = len(widths) - 1
        for i, width in enumerate(widths):
            level = Level(ch if i == 0 else widths[i - 1], width, num_blocks, i == last)
            if i < last:
                level.downsample = Resample(width, is_down=True)
            self.down.append(level)
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = (
            _norm(widths[-1]),
            nn.Conv2d(widths[-1], 2 * latent_dim, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents [B, D, h, w] to pixels [B, 3, H, W]; level 0 of `up` is the finest."""

    def __init__(self, widths: Sequence[int], num_blocks: int, latent_dim: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(latent_dim, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            before = widths[min(i + 1, len(widths) - 1)]
            level = Level(before, width, num_blocks + 1, False)
            if i > 0:
                level.upsample = Resample(width, is_down=False)
            self.up.append(level)
        self.norm_out, self.conv_out = _norm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class MARAutoencoder(ModelMixin, ConfigMixin):
    """Pixels to latents of unit scale and back.

    Parameter names are those of the published `kl16.ckpt`.

    Args:
        ch: width of the finest level.
        ch_mult: factor of each level, finest first; each level but the last halves the side.
        num_res_blocks: blocks of an encoder level; a decoder level has one more.
        latent_dim: D, channels of the latents.
        scaling_factor: multiplies the latents; one over their standard deviation.
    """

    @register_to_config
    def __init__(
        self,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        latent_dim: int = 16,
        scaling_factor: float = OFFICIAL_SCALE,
    ) -> None:
        super().__init__()
        widths = [ch * factor for factor in ch_mult]
        self.encoder = Encoder(widths, ch, num_res_blocks, latent_dim)
        self.decoder = Decoder(widths, num_res_blocks, latent_dim)
        self.quant_conv = nn.Conv2d(2 * latent_dim, 2 * latent_dim, 1)
        self.post_quant_conv = nn.Conv2d(latent_dim, latent_dim, 1)

    @classmethod
    def from_official(cls, source: str | Path | Mapping[str, Any], **sizes: Any) -> MARAutoencoder:
        """Load the authors' checkpoint, such as `kl16.ckpt`.

        Raises:
            CheckpointError: a file that cannot be read or does not fit, naming the key.
        """
        name = str(source) if isinstance(source, (str, Path)) else "the given state dict"
        tensors = read_state_dict(source, AUTOENCODER_WRAPPERS)
        return load_strictly(cls, autoencoder_sizes(tensors, name, sizes), tensors, name)

    @property
    def downscale(self) -> int:
        """Pixels per latent and side."""
        return 2 ** (len(self.config["ch_mult"]) - 1)

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance [B, D, h, w] of the unscaled latents of pixels in [-1, 1]."""
        mean, log_variance = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def decode_map(self, latents: Tensor) -> Tensor:
        """Unscaled latents [B, D, h, w] to pixels [B, 3, H, W], about [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents))

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] to mean latents [B, N, D], scaled, row by row."""
        return self.moments(pixels)[0].flatten(2).mT * self.config["scaling_factor"]

    def decode(self, latents: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Scaled latents [B, N, D] to pixels; `grid` is square unless given."""
        side = round(latents.shape[1] ** 0.5)
        rows, columns = grid or (side, side)
        feature_map = latents.mT.unflatten(2, (rows, columns)) / self.config["scaling_factor"]
        return self.decode_map(feature_map)
