"""Sizes of official Infinity checkpoints, read off their tensors.

Parameter names of the transformer are kept as published; the tokenizer's lose an inner level. What
remains is to find the sizes, to drop buffers that are no weights, and to refuse what does not fit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...checkpoint import StateDict, check_sizes, count_numbered, known_sizes, shape_of
from ...errors import CheckpointError, InputError
from .bits import PATCH
from .schedules import check_scales, scale_schedule

TRANSFORMER_WRAPPERS = ("trainer.gpt_fsdp", "gpt_fsdp", "trainer.gpt_wo_ddp", "gpt_wo_ddp", "model")
TOKENIZER_WRAPPERS = ("vae", "trainer.vae_local", "vae_local", "state_dict")

RECORDS = re.compile(r".*\.zero_k_bias|quantizer?\.lfq\.mask")
"""Buffers of the release that hold nothing to learn."""

INNER = re.compile(r"\.(norm\d|norm_out|conv\d|conv_in|conv_out|conv|nin_shortcut)\.(norm|conv)\.")
"""A layer of the published tokenizer within its wrapper."""

PATCHED_BITS = {56}
"""Bits of a token in official models whose tokens are 2 x 2 latents (the 8B)."""

ALIASES = {
    "depth": "num_layers",
    "embed_dim": "hidden_size",
    "text_channels": "text_dim",
    "text_maxlen": "text_length",
    "block_chunks": "num_chunks",
    "apply_spatial_patchify": "patchify",
    "h_div_w": "aspect_ratio",
    "h_div_w_template": "aspect_ratio",
    "pn": "pixels",
    "codebook_dim": "z_channels",
    "vae_type": "z_channels",
    "encoder_ch_mult": "ch_mult",
}
"""The authors' argument names and ours."""

TRANSFORMER_SIZES = (
    "scale_schedule",
    "pixels",
    "aspect_ratio",
    "rope_grid",
    "num_bits",
    "patchify",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_chunks",
    "intermediate_size",
    "text_dim",
    "text_length",
    "pool_heads",
    "max_scales",
    "guidance_layer",
    "norm_eps",
)
TOKENIZER_SIZES = (
    "scale_schedule",
    "pixels",
    "aspect_ratio",
    "patchify",
    "patch_size",
    "ch",
    "ch_mult",
    "decoder_ch_mult",
    "num_res_blocks",
    "z_channels",
)


def without_records(tensors: StateDict) -> StateDict:
    """The weights alone."""
    return {key: value for key, value in tensors.items() if not RECORDS.fullmatch(key)}


def tokenizer_weights(tensors: StateDict) -> StateDict:
    """The tokenizer's weights under our names."""
    return {INNER.sub(r".\1.", key): value for key, value in without_records(tensors).items()}


def chosen_scales(given: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    """The scales that a caller names, taken out of `given`: a list, or a size and a ratio.

    Raises:
        InputError: both, or something that no model has.
    """
    listed, named = given.pop("scale_schedule", None), {}
    for name in ("pixels", "aspect_ratio"):
        if name in given:
            named[name] = given.pop(name)
    if listed is None:
        return scale_schedule(**named)
    if named:
        raise InputError(f"scale_schedule beside {' and '.join(named)}: expected one or the other")
    return check_scales(listed)


def split_sizes(sizes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a caller says about a model: sizes of the transformer, and of the tokenizer alone.

    Raises:
        InputError: a name that neither knows.
    """
    every = (*TRANSFORMER_SIZES, *(n for n in TOKENIZER_SIZES if n not in TRANSFORMER_SIZES))
    given = known_sizes(sizes, every, "Infinity model", ALIASES)
    both = {name: value for name, value in given.items() if name in TRANSFORMER_SIZES}
    return both, {name: value for name, value in given.items() if name not in both}


def transformer_sizes(tensors: StateDict, name: str, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of the transformer that `tensors` fits.

    Args:
        tensors: official names to tensors.
        name: of the file, for messages.
        sizes: what the caller knows; it must agree with the tensors.

    Raises:
        CheckpointError: a size that cannot be read off, or disagrees.
        InputError: an unknown size, or scales that no model has.
    """
    given = known_sizes(sizes, TRANSFORMER_SIZES, "Infinity transformer", ALIASES)
    width, num_bits = shape_of(tensors, "word_embed.weight", 2, name)
    text_length, text_dim = shape_of(tensors, "cfg_uncond", 2, name)
    chunks = count_numbered(tensors, "block_chunks")
    found: dict[str, Any] = {
        "num_bits": num_bits,
        "hidden_size": width,
        "num_layers": sum(
            count_numbered(tensors, f"block_chunks.{chunk}.module") for chunk in range(chunks)
        ),
        "num_chunks": chunks,
        "num_heads": shape_of(tensors, "block_chunks.0.module.0.sa.scale_mul_1H11", 4, name)[1],
        "intermediate_size": shape_of(tensors, "block_chunks.0.module.0.ffn.fc1.weight", 2, name)[
            0
        ],
        "text_dim": text_dim,
        "text_length": text_length,
        "pool_heads": shape_of(tensors, "text_proj_for_sos.ca.mat_q", 3, name)[1],
        "max_scales": shape_of(tensors, "lvl_embed.weight", 2, name)[0],
    }
    check_sizes(found, given, name)
    given.setdefault("patchify", num_bits in PATCHED_BITS)
    return {"scale_schedule": chosen_scales(given)} | given | found


def tokenizer_sizes(tensors: StateDict, name: str, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of the tokenizer that `tensors`, under our names, fits.

    Raises:
        CheckpointError: a layout that is not an Infinity tokenizer's, or sizes that disagree.
        InputError: an unknown size, or scales that no model has.
    """
    given = known_sizes(sizes, TOKENIZER_SIZES, "Infinity tokenizer", ALIASES)
    ch = shape_of(tensors, "encoder.conv_in.weight", 4, name)[0]
    if "encoder.mid.attn_1.norm.weight" in tensors:
        raise CheckpointError(
            f"{name}: key 'encoder.mid.attn_1.norm.weight' is unexpected: Infinity's tokenizer has "
            "no attention"
        )
    found: dict[str, Any] = {
        "ch": ch,
        "ch_mult": _multipliers(tensors, "encoder.down", ch, name),
        "decoder_ch_mult": _multipliers(tensors, "decoder.up", ch, name),
        "num_res_blocks": count_numbered(tensors, "encoder.down.0.block"),
        "z_channels": shape_of(tensors, "encoder.conv_out.weight", 4, name)[0],
    }
    patch_size = 2 ** (len(found["ch_mult"]) - 1)
    check_sizes(found | {"patch_size": patch_size}, given, name)
    given.pop("patch_size", None)
    return {"scale_schedule": chosen_scales(given)} | given | found


def _multipliers(tensors: StateDict, prefix: str, ch: int, name: str) -> Sequence[int]:
    """Width multiplier of each level."""
    levels = range(count_numbered(tensors, prefix))
    keys = [f"{prefix}.{level}.block.0.conv1.weight" for level in levels]
    return tuple(shape_of(tensors, key, 4, name)[0] // ch for key in keys)


def is_patched(num_bits: int, channels: int) -> bool:
    """Whether tokens of so many bits are 2 x 2 latents of so many channels.

    Raises:
        InputError: neither one latent nor 2 x 2.
    """
    if num_bits not in (channels, PATCH**2 * channels):
        raise InputError(
            f"the tokenizer has {channels} channels: expected {num_bits}, the bits of the "
            f"transformer's tokens, or a quarter of it for tokens of {PATCH} x {PATCH} latents"
        )
    return num_bits != channels
