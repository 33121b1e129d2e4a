"""NextStep's KL autoencoder: FLUX's layout with a normalised encoder, and tokens of 2 x 2 latents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...checkpoint import load_strictly, read_state_dict, split_placement
from ...errors import CheckpointError
from ...files import user_path
from ...networks import entry, hot_entry
from ...schema import Layers, Levels, Positive, Side, Size
from ..conv_blocks import AttentionBlock, Decoder, Encoder
from ..network import Network
from ..pixels import read_pixels
from .convert import autoencoder_sizes, read_config

WRAPPERS = ("model", "state_dict")


class NextStepAutoencoder(Network):
    """Pixels to tokens, squares of scaled latents, and back.

    Parameter names are those of the published `vae/checkpoint.pt`.

    Args:
        ch: width of the finest level.
        ch_mult: factor of each level, finest first; each level but the last halves the side.
        num_res_blocks: blocks of an encoder level; a decoder level has one more.
        latent_channels: channels of the latents.
        scaling_factor, shift_factor: latents are (mean - shift) * scale.
        encoder_norm: whether the mean is normalised over the values of each token.
        patch_size: side of the square of latents that makes a token.
    """

    @register_to_config
    def __init__(
        self,
        ch: Size = 128,
        ch_mult: Levels = (1, 2, 4, 4),
        num_res_blocks: Layers = 2,
        latent_channels: Size = 16,
        scaling_factor: Positive = 1.0,
        shift_factor: float = 0.0,
        encoder_norm: bool = True,
        patch_size: Side = 2,
    ) -> None:
        super().__init__()
        sizes = (ch, ch_mult, num_res_blocks)
        self.encoder = Encoder(*sizes, 2 * latent_channels, AttentionBlock, None)
        self.decoder = Decoder(*sizes, latent_channels, AttentionBlock, None)

    @classmethod
    def from_official(
        cls, source: str | Path | Mapping[str, Any], **sizes: Any
    ) -> NextStepAutoencoder:
        """Load the authors' checkpoint.

        Args:
            source: folder with `config.json` and `checkpoint.pt`, or a state dict.
            **sizes: what `config.json` would say; for a state dict at least `scaling_factor` and
                `shift_factor`.

        Raises:
            CheckpointError: files that cannot be read or do not fit, naming the key.
        """
        config: dict[str, Any] = {}
        name, weights = "the given state dict", source
        if not isinstance(source, Mapping):
            folder = user_path(source)
            if not folder.is_dir():
                raise CheckpointError(f"{folder}: no such folder; expected one with checkpoint.pt")
            config, weights = read_config(folder / "config.json"), folder / "checkpoint.pt"
            name = str(weights)
        sizes, place = split_placement(sizes)
        tensors = read_state_dict(weights, WRAPPERS)
        return load_strictly(
            cls, autoencoder_sizes(tensors, config, name, sizes), tensors, name, **place
        )

    @property
    def downsample_factor(self) -> int:
        """Pixels per token and side."""
        return self.config["patch_size"] * 2 ** (len(self.config["ch_mult"]) - 1)

    @entry
    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance [B, C, h, w] of the unscaled latents of pixels in [-1, 1]."""
        return self._moments(pixels)

    def _moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder(pixels).chunk(2, dim=1)
        if self.config["encoder_norm"]:
            side, grid = self.config["patch_size"], (mean.shape[2], mean.shape[3])
            tokens = patchify(mean, side)
            normed = nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
            mean = unpatchify(normed, side, (grid[0] // side, grid[1] // side))
        return mean, log_variance

    def encode(self, pixels: Any) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] to tokens [B, N, D] of the mean latents, row by row.

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
        latents = self._moments(pixels)[0] - self.config["shift_factor"]
        return patchify(latents * self.config["scaling_factor"], self.config["patch_size"])

    @entry
    def decode_map(self, latents: Tensor) -> Tensor:
        """Unscaled latents [B, C, h, w] to pixels [B, 3, H, W], about [-1, 1]."""
        return self.decoder(latents)

    @hot_entry
    def decode(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Tokens [B, N, D] to pixels; `grid` is square unless given."""
        side = round(tokens.shape[1] ** 0.5)
        latents = unpatchify(tokens, self.config["patch_size"], grid or (side, side))
        latents = latents / self.config["scaling_factor"] + self.config["shift_factor"]
        return self.decoder(latents)


def patchify(latents: Tensor, side: int) -> Tensor:
    """Latents [B, C, h, w] to tokens [B, N, C * side^2], values in the order channel, row, column."""
    return nn.functional.pixel_unshuffle(latents, side).flatten(2).mT


def unpatchify(tokens: Tensor, side: int, grid: tuple[int, int]) -> Tensor:
    """The reverse of `patchify` for a grid of (rows, columns) tokens."""
    return nn.functional.pixel_shuffle(tokens.mT.unflatten(2, grid), side)
