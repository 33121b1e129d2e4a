"""Sizes of official VAR checkpoints, read off their tensors.

Parameter names are kept as published. What remains is to find the sizes, to drop records and tables
that are no weights, and to refuse what does not fit.
"""

from __future__ import annotations

import re
from typing import Any

from ...checkpoint import StateDict, check_sizes, count_numbered, known_sizes, shape_of
from ...errors import CheckpointError

TRANSFORMER_WRAPPERS = ("trainer.var_wo_ddp", "var_wo_ddp", "state_dict", "model")
TOKENIZER_WRAPPERS = ("trainer.vae_local", "vae_local", "state_dict", "model")

OFFICIAL_SCALES: dict[int, tuple[int, ...]] = {
    680: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    2240: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    9451: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
"""Tokens of an image of 256, 512 and 1024 pixels to the side lengths of its scales."""

HEAD_DIM = 64
"""Width of a head in every official model."""

RECORDS = re.compile(
    r"lvl_1L|attn_bias_for_masking|.*\.zero_k_bias|.*\.ema_vocab_hit_SV|quantize\.beta"
)
"""Buffers of the release that are tables or training records."""

ALIASES = {
    "depth": "num_layers",
    "width": "hidden_size",
    "embed_dim": "hidden_size",
    "vocab_size": "codebook_size",
    "share_quant_resi": "num_shared",
    "Cvae": "z_channels",
    "vae_ch": "ch",
    "vae_ch_mult": "ch_mult",
}
"""The authors' argument names and ours."""

TRANSFORMER_SIZES = (
    "patch_nums",
    "codebook_size",
    "z_channels",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_classes",
    "shared_aln",
    "attn_l2_norm",
    "norm_eps",
)
TOKENIZER_SIZES = (
    "patch_nums",
    "ch",
    "ch_mult",
    "num_res_blocks",
    "z_channels",
    "codebook_size",
    "num_shared",
)


def without_records(tensors: StateDict) -> StateDict:
    """The weights alone."""
    return {key: value for key, value in tensors.items() if not RECORDS.fullmatch(key)}


def _scales(
    tensors: StateDict, name: str, given: dict[str, Any], length: int, count: int
) -> tuple[int, ...]:
    """Side lengths from the table of levels, the caller, or the number of tokens."""
    levels = tensors.get("lvl_1L")
    sides = given.get("patch_nums") or OFFICIAL_SCALES.get(length)
    if levels is not None:
        counts = levels.flatten().long().bincount().tolist()
        read = tuple(round(number**0.5) for number in counts)
        if [side * side for side in read] != counts or len(read) != count:
            raise CheckpointError(f"{name}: key 'lvl_1L' holds no scales of square token maps")
        sides = given.get("patch_nums") or read
        if sides != read:
            raise CheckpointError(f"{name}: its tensors say patch_nums {read}, not {sides}")
    if sides is None:
        raise CheckpointError(
            f"{name}: {length} tokens in {count} scales are no official model's: pass patch_nums"
        )
    if len(sides) != count or sum(side * side for side in sides) != length:
        raise CheckpointError(
            f"{name}: patch_nums {sides} are {len(sides)} scales of "
            f"{sum(side * side for side in sides)} tokens: its tensors hold {count} scales of "
            f"{length} tokens"
        )
    return tuple(sides)


def transformer_sizes(tensors: StateDict, name: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments of the transformer that `tensors` fits.

    Args:
        tensors: official names to tensors.
        name: of the file, for messages.
        sizes: what the caller knows; it must agree with the tensors.

    Raises:
        CheckpointError: a size that cannot be read off, or disagrees.
    """
    given = known_sizes(sizes, TRANSFORMER_SIZES, "VAR transformer", ALIASES)
    width, z_channels = shape_of(tensors, "word_embed.weight", 2, name)
    count = shape_of(tensors, "lvl_embed.weight", 2, name)[0]
    length = shape_of(tensors, "pos_1LC", 3, name)[1]
    has_l2_norm = "blocks.0.attn.scale_mul_1H11" in tensors
    found: dict[str, Any] = {
        "patch_nums": _scales(tensors, name, given, length, count),
        "codebook_size": shape_of(tensors, "head.weight", 2, name)[0],
        "z_channels": z_channels,
        "hidden_size": width,
        "num_layers": count_numbered(tensors, "blocks"),
        "num_classes": shape_of(tensors, "class_emb.weight", 2, name)[0] - 1,
        "shared_aln": "shared_ada_lin.1.weight" in tensors,
        "attn_l2_norm": has_l2_norm,
    }
    if has_l2_norm:
        found["num_heads"] = shape_of(tensors, "blocks.0.attn.scale_mul_1H11", 4, name)[1]
    elif "num_heads" not in given:
        if width % HEAD_DIM:
            raise CheckpointError(
                f"{name}: width {width} is no multiple of {HEAD_DIM}: pass num_heads"
            )
        found["num_heads"] = width // HEAD_DIM
    check_sizes(found, given, name)
    return given | found


def tokenizer_sizes(tensors: StateDict, name: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments of the tokenizer that `tensors` fits.

    Raises:
        CheckpointError: a layout that is not a VAR tokenizer's, or sizes that disagree.
    """
    given = known_sizes(sizes, TOKENIZER_SIZES, "VAR tokenizer", ALIASES)
    ch = shape_of(tensors, "encoder.conv_in.weight", 4, name)[0]
    levels = count_numbered(tensors, "encoder.down")
    widths = [
        shape_of(tensors, f"encoder.down.{i}.block.0.conv1.weight", 4, name)[0]
        for i in range(levels)
    ]
    codebook_size, z_channels = shape_of(tensors, "quantize.embedding.weight", 2, name)
    if "quantize.quant_resi.qresi.weight" in tensors:
        num_shared = 1
    else:
        num_shared = count_numbered(tensors, "quantize.quant_resi.qresi_ls")
    found = {
        "ch": ch,
        "ch_mult": tuple(width // ch for width in widths),
        "num_res_blocks": count_numbered(tensors, "encoder.down.0.block"),
        "z_channels": z_channels,
        "codebook_size": codebook_size,
        "num_shared": num_shared,
    }
    record = tensors.get("quantize.ema_vocab_hit_SV")
    count = None if record is None else len(record)
    if num_shared == 0:
        count = count_numbered(tensors, "quantize.quant_resi")
    sides = given.get("patch_nums") or (OFFICIAL_SCALES[680] if count in (None, 10) else None)
    if sides is None:
        raise CheckpointError(f"{name}: {count} scales of unknown sides: pass patch_nums")
    if count is not None and len(sides) != count:
        raise CheckpointError(
            f"{name}: patch_nums {sides} are {len(sides)} scales: its tensors hold {count}"
        )
    check_sizes(found, given, name)
    return given | found | {"patch_nums": sides}
