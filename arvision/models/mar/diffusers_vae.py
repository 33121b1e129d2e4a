"""The published autoencoder as diffusers' `AutoencoderKL`, where it fits exactly."""

from __future__ import annotations

import re
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from ...errors import InputError
from .autoencoder import MARAutoencoder

RENAMES = (
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"^encoder\.down\.(\d+)\.block\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (r"^encoder\.down\.(\d+)\.attn\.(\d+)\.", r"encoder.down_blocks.\1.attentions.\2."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.up\.(\d+)\.block\.(\d+)\.", r"decoder.up_blocks.\1.resnets.\2."),
    (r"^decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)
ATTENTION = (
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.q\.", r"\1.to_q."),
    (r"(attentions\.\d+)\.k\.", r"\1.to_k."),
    (r"(attentions\.\d+)\.v\.", r"\1.to_v."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)


def to_diffusers(autoencoder: MARAutoencoder) -> AutoencoderKL:
    """The same autoencoder with the same weights and scaling factor as an `AutoencoderKL`.

    The last block of the encoder is the kind with attention where ours has it. Tokens of several
    latents (`patch_size`) are no business of an `AutoencoderKL`.

    Raises:
        InputError: a single level, which has no block without attention to stand before it.
    """
    config = autoencoder.config
    widths = [config["ch"] * factor for factor in config["ch_mult"]]
    num = len(widths)
    if num < 2:
        raise InputError("an autoencoder of one level: AutoencoderKL needs at least two")
    deepest = "AttnDownEncoderBlock2D" if config["level_attention"] else "DownEncoderBlock2D"
    sizes: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * (num - 1) + (deepest,),
        "up_block_types": ("UpDecoderBlock2D",) * num,
        "block_out_channels": tuple(widths),
        "layers_per_block": config["num_res_blocks"],
        "latent_channels": config["latent_dim"],
        "scaling_factor": config["scaling_factor"],
        "norm_num_groups": config["norm_num_groups"],
    }
    out = AutoencoderKL(**sizes)
    # AutoencoderKL sizes the head of a block's attention by the number before its width.
    out.load_state_dict(
        {_rename(k, num): _shape(_rename(k, num), v) for k, v in autoencoder.state_dict().items()}
    )
    out.to(dtype=autoencoder.dtype)  # pyright: ignore[reportCallIssue]
    return out.eval()


def _rename(key: str, num_levels: int) -> str:
    # diffusers counts the decoder's levels in the order of their use, coarse to fine.
    key = re.sub(r"^decoder\.up\.(\d+)", lambda m: f"decoder.up.{num_levels - 1 - int(m[1])}", key)
    for pattern, name in (*RENAMES, *ATTENTION):
        key = re.sub(pattern, name, key)
    return key


def _shape(key: str, value: Tensor) -> Tensor:
    """Attention projections are 1x1 convolutions here and linear layers there."""
    return value[:, :, 0, 0] if ".to_" in key and value.dim() == 4 else value
