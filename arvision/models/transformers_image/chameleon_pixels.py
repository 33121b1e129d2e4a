"""The decoder of Chameleon's images, which transformers leaves out, from the authors' file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ...checkpoint import count_numbered, load_strictly, read_state_dict, shape_of, split_placement
from ...schema import Layers, Levels, Size
from ..conv_blocks import AttentionBlock, Decoder
from ..network import Network


class ChameleonDecoder(Network):
    """Latents [B, D, h, w] to pixels [B, 3, 16 h, 16 w], about [-1, 1].

    Args:
        ch: base width.
        ch_mult: width of each level, finest first, in units of `ch`.
        num_blocks: residual blocks of an encoder level.
        latent_dim: D.

    Paper: Gafni et al., "Make-A-Scene", 2022; the file is `vqgan.ckpt` of Chameleon.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        ch: Size = 128,
        ch_mult: Levels = (1, 1, 2, 2, 4),
        num_blocks: Layers = 2,
        latent_dim: Size = 256,
    ) -> None:
        super().__init__()
        self.decoder = Decoder(ch, tuple(ch_mult), num_blocks, latent_dim, AttentionBlock, None)

    @classmethod
    def from_official(
        cls,
        source: str | Path | Mapping[str, Any],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> ChameleonDecoder:
        """Load `vqgan.ckpt` (or its dict); what belongs to the encoder or the training is left out.

        Args:
            source: path or dict.
            dtype: float32 unless given.
            device: the CPU unless given.

        Raises:
            CheckpointError: a file that cannot be read or does not fit, naming the key.
        """
        name = "the given state dict" if isinstance(source, Mapping) else str(source)
        every = read_state_dict(source, ["state_dict"])
        tensors = {key: value for key, value in every.items() if key.startswith("decoder.")}
        levels = count_numbered(tensors, "decoder.up")
        ch = shape_of(tensors, "decoder.conv_out.weight", 4, name)[1]
        deepest = shape_of(tensors, "decoder.conv_in.weight", 4, name)
        widths = [
            shape_of(tensors, f"decoder.up.{level}.block.0.conv1.weight", 4, name)[0]
            for level in range(levels)
        ]
        sizes = {
            "ch": ch,
            "ch_mult": tuple(width // ch for width in widths),
            "num_blocks": count_numbered(tensors, "decoder.up.0.block") - 1,
            "latent_dim": deepest[1],
        }
        _, place = split_placement({"dtype": dtype, "device": device})
        return load_strictly(cls, sizes, tensors, name, **place)

    def forward(self, latents: Tensor) -> Tensor:
        """Decode."""
        return self.decoder(latents)
