"""Sizes of official MAR checkpoints, read off their tensors; no parameter is renamed."""

from __future__ import annotations

from typing import Any

from ...checkpoint import StateDict, check_sizes, count_numbered, known_sizes, shape_of
from ...errors import CheckpointError, InputError

TRANSFORMER_WRAPPERS = ("model_ema", "model", "state_dict")
AUTOENCODER_WRAPPERS = ("model", "state_dict")

OFFICIAL_HEADS = {
    # (blocks of the encoder, width): heads
    (12, 768): 12,
    (16, 1024): 16,
    (20, 1280): 16,
}
"""Heads of MAR base, large and huge; they cannot be read off the tensors."""

KL8_CHANNELS, KL8_SCALE = 4, 0.18215
"""Channels of KL-8's latents, and one over their standard deviation (Rombach et al.,
"High-Resolution Image Synthesis with Latent Diffusion Models", 2022)."""

ALIASES = {
    "encoder_embed_dim": "hidden_size",
    "decoder_embed_dim": "hidden_size",
    "encoder_num_heads": "num_heads",
    "decoder_num_heads": "num_heads",
    "vae_embed_dim": "latent_dim",
    "class_num": "num_classes",
    "buffer_size": "num_buffer",
    "diffloss_d": "head_depth",
    "diffloss_w": "head_width",
    "z_channels": "latent_dim",
    "embed_dim": "latent_dim",
}
"""The authors' argument names and ours."""

TRANSFORMER_SIZES = (
    "latent_dim",
    "grid",
    "hidden_size",
    "encoder_depth",
    "decoder_depth",
    "num_heads",
    "head_width",
    "head_depth",
    "num_classes",
    "num_buffer",
    "num_sampling_steps",
)


def transformer_sizes(tensors: StateDict, name: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments of the transformer that `tensors` fits.

    Args:
        tensors: official names to tensors.
        name: of the file, for messages.
        sizes: what the caller knows, our names or the authors'; it must agree with the tensors.

    Raises:
        CheckpointError: a size that can neither be read off nor looked up, or disagrees.
    """
    given = known_sizes(sizes, TRANSFORMER_SIZES, "MAR transformer", ALIASES)
    width, latent_dim = shape_of(tensors, "z_proj.weight", 2, name)
    num_tokens = shape_of(tensors, "diffusion_pos_embed_learned", 3, name)[1]
    found: dict[str, Any] = {
        "latent_dim": latent_dim,
        "hidden_size": width,
        "encoder_depth": count_numbered(tensors, "encoder_blocks"),
        "decoder_depth": count_numbered(tensors, "decoder_blocks"),
        "head_width": shape_of(tensors, "diffloss.net.input_proj.weight", 2, name)[0],
        "head_depth": count_numbered(tensors, "diffloss.net.res_blocks"),
        "num_classes": shape_of(tensors, "class_emb.weight", 2, name)[0],
        "num_buffer": shape_of(tensors, "encoder_pos_embed_learned", 3, name)[1] - num_tokens,
    }
    check_sizes(found, given, name)
    heads = given.get("num_heads") or OFFICIAL_HEADS.get((found["encoder_depth"], width))
    if heads is None:
        raise CheckpointError(
            f"{name}: {found['encoder_depth']} blocks of width {width} are no official size, so "
            "num_heads cannot be looked up: pass num_heads"
        )
    side = round(num_tokens**0.5)
    grid = tuple(given.get("grid", (side, side)))
    if grid[0] * grid[1] != num_tokens:
        raise CheckpointError(f"{name}: {num_tokens} positions do not fit a grid of {grid}")
    steps = {k: int(given[k]) for k in ("num_sampling_steps",) if k in given}
    return found | {"num_heads": heads, "grid": grid} | steps


def autoencoder_sizes(tensors: StateDict, name: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments of the autoencoder that `tensors` fits.

    Raises:
        CheckpointError: a layout that is not this autoencoder's, or sizes that disagree.
    """
    known = ("ch", "ch_mult", "num_res_blocks", "latent_dim", "scaling_factor", "patch_size")
    given = known_sizes(sizes, known, "MAR autoencoder", ALIASES)
    ch = shape_of(tensors, "encoder.conv_in.weight", 4, name)[0]
    levels = count_numbered(tensors, "encoder.down")
    widths = [
        shape_of(tensors, f"encoder.down.{i}.block.0.conv1.weight", 4, name)[0]
        for i in range(levels)
    ]
    found = {
        "ch": ch,
        "ch_mult": tuple(width // ch for width in widths),
        "num_res_blocks": count_numbered(tensors, "encoder.down.0.block"),
        "latent_dim": shape_of(tensors, "post_quant_conv.weight", 4, name)[0],
        "level_attention": f"encoder.down.{levels - 1}.attn.0.norm.weight" in tensors,
    }
    check_sizes(found, given, name)
    scale = {"scaling_factor": KL8_SCALE} if found["latent_dim"] == KL8_CHANNELS else {}
    return found | scale | {k: given[k] for k in ("scaling_factor", "patch_size") if k in given}


def token_side(latent_dim: int, channels: int) -> int:
    """Side of the square of latents that makes a token.

    Args:
        latent_dim: numbers of a token.
        channels: of a latent.

    Raises:
        InputError: no square has that many.
    """
    side = round((latent_dim / channels) ** 0.5)
    if channels * side * side != latent_dim:
        raise InputError(
            f"the autoencoder has latents of width {channels}: expected {latent_dim}, the "
            "transformer's, or that over a square, whose side is patch_size"
        )
    return side
