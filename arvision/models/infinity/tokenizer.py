"""The bitwise multi-scale image tokenizer of Infinity as a diffusers model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ...checkpoint import load_strictly, read_state_dict, split_placement
from ...errors import InputError
from ...networks import entry, hot_entry
from ...schema import Layers, Levels, Maps, Size
from ..conv_blocks import Decoder, Encoder
from ..network import Network
from ..pixels import read_pixels
from .bits import BitPyramid
from .convert import TOKENIZER_WRAPPERS, tokenizer_sizes, tokenizer_weights
from .schedules import Scales, check_scales, scale_schedule


class InfinityTokenizer(Network):
    """Autoencoder whose features are coded scale by scale, one bit per channel.

    Args:
        scale_schedule: height and width of each scale in tokens; None for the square 1M schedule.
        patchify: whether a token is 2 x 2 latents, and holds four times the bits.
        ch: base width.
        ch_mult: width multiplier of each level of the encoder; every level but the last halves the
            side.
        decoder_ch_mult: of the decoder; None for the same.
        num_res_blocks: residual blocks of an encoder level (a decoder level has one more).
        z_channels: channels of a latent, which are its bits.

    Raises:
        InputError: scales that do not grow.

    Paper: Han et al., "Infinity", 2024, section 3 (bitwise visual tokenizer).
    """

    @register_to_config
    def __init__(
        self,
        scale_schedule: Maps | None = None,
        patchify: bool = False,
        ch: Size = 128,
        ch_mult: Levels = (1, 2, 4, 4, 4),
        decoder_ch_mult: Levels | None = None,
        num_res_blocks: Layers = 2,
        z_channels: Size = 32,
    ) -> None:
        super().__init__()
        self.set_scales(scale_schedule)
        widths = tuple(decoder_ch_mult or ch_mult)
        self.encoder = Encoder(ch, ch_mult, num_res_blocks, z_channels, None, None)
        self.decoder = Decoder(ch, widths, num_res_blocks, z_channels, None, None)

    @classmethod
    def from_official(
        cls, source: str | Path | Mapping[str, Any], **sizes: Any
    ) -> InfinityTokenizer:
        """Load the authors' checkpoint, such as `infinity_vae_d32reg.pth`.

        Args:
            source: path or state dict.
            **sizes: `scale_schedule` in tokens (or `pixels` and `aspect_ratio`), and `patchify`;
                others are checked against the tensors.

        Raises:
            CheckpointError: a file that cannot be read or does not fit, naming the key.
        """
        name = "the given state dict" if isinstance(source, Mapping) else str(source)
        sizes, place = split_placement(sizes)
        tensors = tokenizer_weights(read_state_dict(source, TOKENIZER_WRAPPERS))
        return load_strictly(cls, tokenizer_sizes(tensors, name, sizes), tensors, name, **place)

    def set_scales(self, scales: Sequence[Sequence[int]] | None) -> None:
        """Code pictures of another size from now on.

        Raises:
            InputError: maps that do not grow.
        """
        checked = scale_schedule() if scales is None else check_scales(scales)
        self.register_to_config(scale_schedule=checked)

    @property
    def scales(self) -> Scales:
        """Height and width of each scale in tokens."""
        return check_scales(self.config["scale_schedule"])

    @property
    def pyramid(self) -> BitPyramid:
        """How bits and maps belong together."""
        return BitPyramid(self.scales, self.config["z_channels"], self.config["patchify"])

    @property
    def downsample_factor(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.config["ch_mult"]) - 1)

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of a picture, in pixels."""
        height, width = self.pyramid.latent_size(-1)
        return height * self.downsample_factor, width * self.downsample_factor

    @entry
    def features(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] to features [B, D, h, w] before they become bits.

        Raises:
            InputError: another shape than the finest scale asks for.
        """
        height, width = self.picture_size
        if pixels.shape[1:] != (3, height, width):
            raise InputError(f"pixels {tuple(pixels.shape)}: expected [B, 3, {height}, {width}]")
        return self._features(pixels)

    def _features(self, pixels: Tensor) -> Tensor:
        return self.encoder(pixels.to(self.dtype))

    def encode(self, pixels: Any) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] to bits [B, L, d] int64, scales coarse to fine.

        Args:
            pixels: PIL images, arrays or tensors, see `arvision.models.pixels.read_pixels`.

        Raises:
            InputError: another size, a value out of range, NaN or infinity.
        """
        return self.encode_pixels(read_pixels(pixels, self, size=self.picture_size))

    @hot_entry
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """`encode` of pixels in the network's type, where it runs."""
        features = self._features(pixels)
        wide = features if features.dtype == torch.float64 else features.float()
        return self.pyramid.encode(wide)

    @hot_entry
    def decode(self, bits: Tensor) -> Tensor:
        """Bits [B, L, d] of all scales to pixels [B, 3, H, W] in [-1, 1].

        Raises:
            InputError: bits of another shape, or other values than 0 and 1.
        """
        pyramid = self.pyramid
        shape = (pyramid.num_tokens, pyramid.num_bits)
        if bits.dim() != 3 or bits.shape[1:] != shape:
            raise InputError(f"bits {tuple(bits.shape)}: expected [B, {shape[0]}, {shape[1]}]")
        check_bits(bits)
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return self._pixels(pyramid.canvas(bits, dtype)[0]).clamp(-1, 1)

    @entry
    def decode_part(self, bits: Tensor, is_final: Tensor) -> Tensor:
        """As `decode` where bits [B, L, d] are final (`is_final` [B, L]); others paint nothing."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        # Halfway between 0 and 1 stands the code 0.
        known = torch.where(is_final[..., None], bits.to(dtype), 0.5)
        return self._pixels(self.pyramid.canvas(known, dtype)[0])

    @entry
    def paint(self, features: Tensor) -> Tensor:
        """Features [B, D, h, w] to pixels that are not clamped, for training."""
        return self._pixels(features)

    def _pixels(self, features: Tensor) -> Tensor:
        return self.decoder(features.to(self.dtype))


def check_bits(bits: Tensor) -> None:
    """Refuse other values than 0 and 1; a compiled graph takes bits as checked.

    Raises:
        InputError: see above.
    """
    if torch.compiler.is_compiling():
        return
    if bits.numel() and not bool(((bits == 0) | (bits == 1)).all()):
        raise InputError("bits must be 0 or 1")
