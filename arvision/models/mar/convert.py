"""Sizes of official MAR checkpoints, read off their tensors; no parameter is renamed."""

from __future__ import annotations

import re
from typing import Any

from ...decoding.checkpoint import StateDict, shape_of
from ...errors import CheckpointError, unknown_name

TRANSFORMER_WRAPPERS = ("model_ema", "model", "state_dict")
AUTOENCODER_WRAPPERS = ("model", "state_dict")

OFFICIAL_HEADS = {
    # (blocks of the encoder, width): heads
    (12, 768): 12,
    (16, 1024): 16,
    (20, 1280): 16,
}
"""Heads of MAR base, large and huge; they cannot be read off the tensors."""

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


def _ours(sizes: dict[str, Any], known: tuple[str, ...], kind: str) -> dict[str, Any]:
    renamed = {}
    for name, value in sizes.items():
        ours = ALIASES.get(name, name)
        if ours not in known:
            raise unknown_name(f"size of a {kind}:", name, known)
        if value is not None:
            renamed[ours] = value
    return renamed


def _count(tensors: StateDict, prefix: str) -> int:
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    return 1 + max((int(m[1]) for key in tensors if (m := pattern.match(key))), default=-1)


def transformer_sizes(tensors: StateDict, name: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments of the transformer that `tensors` fits.

    Args:
        tensors: official names to tensors.
        name: of the file, for messages.
        sizes: what the caller knows, our names or the authors'; it must agree with the tensors.

    Raises:
        CheckpointError: a size that can neither be read off nor looked up, or disagrees.
    """
    given = _ours(sizes, TRANSFORMER_SIZES, "MAR transformer")
    width, latent_dim = shape_of(tensors, "z_proj.weight", 2, name)
    num_tokens = shape_of(tensors, "diffusion_pos_embed_learned", 3, name)[1]
    found: dict[str, Any] = {
        "latent_dim": latent_dim,
        "hidden_size": width,
        "encoder_depth": _count(tensors, "encoder_blocks"),
        "decoder_depth": _count(tensors, "decoder_blocks"),
        "head_width": shape_of(tensors, "diffloss.net.input_proj.weight", 2, name)[0],
        "head_depth": _count(tensors, "diffloss.net.res_blocks"),
        "num_classes": shape_of(tensors, "class_emb.weight", 2, name)[0],
        "num_buffer": shape_of(tensors, "encoder_pos_embed_learned", 3, name)[1] - num_tokens,
    }
    for key, value in found.items():
        if given.get(key, value) != value:
            raise CheckpointError(f"{name}: its tensors say {key} {value}, not {given[key]}")
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
    known = ("ch", "ch_mult", "num_res_blocks", "latent_dim", "scaling_factor")
    given = _ours(sizes, known, "MAR autoencoder")
    ch = shape_of(tensors, "encoder.conv_in.weight", 4, name)[0]
    levels = _count(tensors, "encoder.down")
    widths = [
        shape_of(tensors, f"encoder.down.{i}.block.0.conv1.weight", 4, name)[0]
        for i in range(levels)
    ]
    found = {
        "ch": ch,
        "ch_mult": tuple(width // ch for width in widths),
        "num_res_blocks": _count(tensors, "encoder.down.0.block"),
        "latent_dim": shape_of(tensors, "post_quant_conv.weight", 4, name)[0],
    }
    for key, value in found.items():
        said = given.get(key, value)
        if (tuple(said) if isinstance(said, (list, tuple)) else said) != value:
            raise CheckpointError(f"{name}: its tensors say {key} {value}, not {given[key]}")
    return found | {k: given[k] for k in ("scaling_factor",) if k in given}
