"""The KL autoencoders of MAR: KL-16, KL-8 with squares of latents as tokens, and smaller ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...checkpoint import load_strictly, read_state_dict, split_placement
from ...networks import entry, hot_entry
from ...schema import Layers, Levels, Positive, Side, Size
from ..conv_blocks import AttentionBlock, Decoder, Encoder, regroup
from ..network import Network
from ..pixels import read_pixels
from .convert import AUTOENCODER_WRAPPERS, autoencoder_sizes

OFFICIAL_SCALE = 0.2325
"""One over the standard deviation of KL-16's latents on ImageNet; their mean is not removed."""


class MARAutoencoder(Network):
    """Pixels to latents of unit scale and back.

    Parameter names are those of the published `kl16.ckpt`. A token is a latent, or a square of
    `patch_size` x `patch_size` latents: channel by channel, each row by row.

    Args:
        ch: width of the finest level.
        ch_mult: factor of each level, finest first; each level but the last halves the side.
        num_res_blocks: blocks of an encoder level; a decoder level has one more.
        latent_dim: channels of the latents.
        scaling_factor: multiplies the latents; one over their standard deviation.
        patch_size: side of the square of latents that makes a token of D = latent_dim patch_size^2.
        level_attention: whether the deepest level of the encoder has attention, as KL-16's.
        norm_num_groups: groups of channels that are normalised together; see `regroup`.
    """

    @register_to_config
    def __init__(
        self,
        ch: Size = 128,
        ch_mult: Levels = (1, 1, 2, 2, 4),
        num_res_blocks: Layers = 2,
        latent_dim: Size = 16,
        scaling_factor: Positive = OFFICIAL_SCALE,
        patch_size: Side = 1,
        level_attention: bool = True,
        norm_num_groups: Size = 32,
    ) -> None:
        super().__init__()
        sizes = (ch, ch_mult, num_res_blocks)
        deepest = AttentionBlock if level_attention else None
        self.encoder = Encoder(*sizes, 2 * latent_dim, AttentionBlock, deepest)
        self.decoder = Decoder(*sizes, latent_dim, AttentionBlock, None)
        self.quant_conv = nn.Conv2d(2 * latent_dim, 2 * latent_dim, 1)
        self.post_quant_conv = nn.Conv2d(latent_dim, latent_dim, 1)
        regroup(self, norm_num_groups)

    @classmethod
    def from_official(cls, source: str | Path | Mapping[str, Any], **sizes: Any) -> MARAutoencoder:
        """Load the authors' checkpoint, such as `kl16.ckpt`, or KL-8 of latent diffusion.

        Args:
            source: path or state dict.
            **sizes: `patch_size` (1 unless given) and `scaling_factor` (that of KL-16, or for
                latents of 4 channels of KL-8); others are checked against the tensors. `dtype` and
                `device`.

        Raises:
            CheckpointError: a file that cannot be read or does not fit, naming the key.
        """
        name = str(source) if isinstance(source, (str, Path)) else "the given state dict"
        sizes, place = split_placement(sizes)
        tensors = read_state_dict(source, AUTOENCODER_WRAPPERS)
        return load_strictly(cls, autoencoder_sizes(tensors, name, sizes), tensors, name, **place)

    @property
    def downsample_factor(self) -> int:
        """Pixels per token and side."""
        return self.config["patch_size"] * 2 ** (len(self.config["ch_mult"]) - 1)

    @property
    def token_dim(self) -> int:
        """D, numbers of a token."""
        return self.config["latent_dim"] * self.config["patch_size"] ** 2

    @entry
    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance [B, D, h, w] of the unscaled latents of pixels in [-1, 1]."""
        return self._moments(pixels)

    def _moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    @entry
    def decode_map(self, latents: Tensor) -> Tensor:
        """Unscaled latents [B, D, h, w] to pixels [B, 3, H, W], about [-1, 1]."""
        return self._pixels(latents)

    def _pixels(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))

    def encode(self, pixels: Any) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] to mean latents [B, N, D], scaled, row by row.

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
        side, means = self.config["patch_size"], self._moments(pixels)[0]
        squares = F.pixel_unshuffle(means, side)
        return squares.flatten(2).mT * self.config["scaling_factor"]

    @hot_entry
    def decode(self, latents: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Scaled latents [B, N, D] to pixels; `grid` is square unless given."""
        side = round(latents.shape[1] ** 0.5)
        rows, columns = grid or (side, side)
        squares = latents.mT.unflatten(2, (rows, columns)) / self.config["scaling_factor"]
        return self._pixels(F.pixel_shuffle(squares, self.config["patch_size"]))
