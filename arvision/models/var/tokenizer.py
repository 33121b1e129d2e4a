"""The multi-scale VQ image tokenizer of VAR as a diffusers model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...checkpoint import load_strictly, read_state_dict, split_placement
from ...errors import InputError
from ...networks import entry, hot_entry
from ...schema import Between, Layers, Levels, Modules, Scales, Size
from ..conv_blocks import Decoder, Encoder, FusedAttentionBlock, regroup
from ..network import Network
from ..pixels import check_codes, read_pixels
from .convert import TOKENIZER_WRAPPERS, tokenizer_sizes, without_records
from .quantizer import MultiScaleQuantizer, Painter


def check_scales(scales: Sequence[int]) -> tuple[int, ...]:
    """The side lengths of the scales, growing.

    Raises:
        InputError: none, or a list that does not grow.
    """
    sides = tuple(int(side) for side in scales)
    if not sides or sides[0] < 1 or any(b <= a for a, b in pairwise(sides)):
        raise InputError(f"patch_nums {list(scales)}: expected growing side lengths from 1 up")
    return sides


class VARTokenizer(Network):
    """Autoencoder whose features are coded scale by scale with one codebook.

    Args:
        patch_nums: side lengths of the scales; the last one is that of the feature map.
        ch: base width.
        ch_mult: width multiplier of each level; every level but the last halves the side.
        num_res_blocks: residual blocks of an encoder level (a decoder level has one more).
        z_channels: width of features and codes.
        codebook_size: number of codes V.
        num_shared: convolutions behind the upsampled codes, shared by the scales; 1 for a single
            one, 0 for one per scale.
        norm_num_groups: groups of channels that are normalised together; see `regroup`.

    Raises:
        InputError: scales that do not grow, or a width that has not so many groups.

    Paper: Tian et al., "Visual Autoregressive Modeling", 2024, section 3.2 and appendix.
    """

    @register_to_config
    def __init__(
        self,
        patch_nums: Scales = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        ch: Size = 160,
        ch_mult: Levels = (1, 1, 2, 2, 4),
        num_res_blocks: Layers = 2,
        z_channels: Size = 32,
        codebook_size: Size = 4096,
        num_shared: Annotated[int, Between(0, 1 << 20), Modules] = 4,
        norm_num_groups: Size = 32,
    ) -> None:
        super().__init__()
        if ch % 32:
            raise InputError(f"ch {ch}: expected a multiple of 32 (group normalisation)")
        scales = check_scales(patch_nums)
        shape, attention = (ch, ch_mult, num_res_blocks, z_channels), FusedAttentionBlock
        self.encoder = Encoder(*shape, attention, attention)
        self.decoder = Decoder(*shape, attention, attention)
        self.quantize = MultiScaleQuantizer(codebook_size, z_channels, scales, num_shared)
        self.quant_conv = nn.Conv2d(z_channels, z_channels, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 3, padding=1)
        regroup(self, norm_num_groups)

    @classmethod
    def from_official(cls, source: str | Path | Mapping[str, Any], **sizes: Any) -> VARTokenizer:
        """Load the authors' checkpoint, such as `vae_ch160v4096z32.pth`.

        Args:
            source: path or state dict.
            **sizes: `patch_nums` where they are not those of the 256-pixel models; others are
                checked against the tensors.

        Raises:
            CheckpointError: a file that cannot be read or does not fit, naming the key.
        """
        name = "the given state dict" if isinstance(source, Mapping) else str(source)
        sizes, place = split_placement(sizes)
        tensors = read_state_dict(source, TOKENIZER_WRAPPERS)
        found = tokenizer_sizes(tensors, name, sizes)
        return load_strictly(cls, found, without_records(tensors), name, **place)

    @property
    def scales(self) -> tuple[int, ...]:
        """Side lengths of the scales."""
        return self.quantize.scales

    @property
    def num_tokens(self) -> int:
        """Tokens of one image, over all scales."""
        return sum(side * side for side in self.scales)

    @property
    def downsample_factor(self) -> int:
        """Pixels per feature along one side."""
        return 2 ** (len(self.config["ch_mult"]) - 1)

    @entry
    def codes(self) -> Tensor:
        """Codebook [V, D], float32 or wider."""
        return self.quantize.codes()

    @entry
    def painter(self) -> Painter:
        """What paints the canvas that a transformer is fed."""
        return self.quantize.painter()

    @entry
    def pre_quant(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, H] in [-1, 1] to features [B, D, P, P] before quantisation.

        Raises:
            InputError: another shape than the finest scale asks for.
        """
        side = self.scales[-1] * self.downsample_factor
        if pixels.shape[1:] != (3, side, side):
            raise InputError(f"pixels {tuple(pixels.shape)}: expected [B, 3, {side}, {side}]")
        return self._features(pixels)

    def _features(self, pixels: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(pixels.to(self.dtype)))

    def encode(self, pixels: Any) -> Tensor:
        """Pixels [B, 3, H, H] in [-1, 1] to code indices [B, L] int64, scales coarse to fine.

        Args:
            pixels: PIL images, arrays or tensors, see `arvision.models.pixels.read_pixels`.

        Raises:
            InputError: another size, a value out of range, NaN or infinity.
        """
        side = self.scales[-1] * self.downsample_factor
        pixels = read_pixels(pixels, self, size=(side, side))
        return self.encode_pixels(pixels)

    @hot_entry
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """`encode` of pixels in the network's type, where it runs."""
        return self.quantize.encode(self._features(pixels))

    @entry
    def look_up(self, indices: Tensor) -> Tensor:
        """Codes [B, L, D] of code indices [B, L].

        Raises:
            InputError: another number of indices than the scales have, or one out of range.
        """
        return self._look_up(indices)

    def _look_up(self, indices: Tensor) -> Tensor:
        if indices.dim() != 2 or indices.shape[1] != self.num_tokens:
            raise InputError(
                f"indices {tuple(indices.shape)}: expected [B, {self.num_tokens}], all tokens of the "
                f"scales {', '.join(map(str, self.scales))}"
            )
        check_codes(indices, self.config["codebook_size"])
        return self.quantize.codes()[indices]

    @hot_entry
    def decode(self, indices: Tensor) -> Tensor:
        """Code indices [B, L], or vectors [B, L, D] in their place, to pixels [B, 3, H, H].

        Pixels are clamped to [-1, 1].

        Raises:
            InputError: shapes or indices that do not fit.
        """
        codes = indices if indices.is_floating_point() else self._look_up(indices)
        if codes.shape[1:] != (self.num_tokens, self.config["z_channels"]):
            raise InputError(
                f"vectors {tuple(codes.shape)}: expected [B, {self.num_tokens}, "
                f"{self.config['z_channels']}]"
            )
        return self._pixels(self._canvas(codes)).clamp(-1, 1)

    @hot_entry
    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Vectors [B, L, D] in the place of codes to pixels [B, 3, H, H], not clamped."""
        return self._pixels(self._canvas(vectors))

    def _canvas(self, codes: Tensor) -> Tensor:
        return self.quantize.canvas(codes.to(self.quantize.codes().dtype))[0]

    @entry
    def paint(self, features: Tensor) -> Tensor:
        """Features [B, D, P, P] to pixels that are not clamped, for training."""
        return self._pixels(features)

    def _pixels(self, features: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(features.to(self.dtype)))

    @torch.no_grad()
    @entry
    def views(self, indices: Tensor) -> Tensor:
        """What a transformer is fed for code indices [B, L]: [B, L - 1, D], without scale 0."""
        return self.quantize.canvas(self._look_up(indices))[1]
