"""Sizes of official LlamaGen checkpoints, read off their tensors.

Parameter names are kept as published, so nothing is renamed: what remains is to find the sizes, drop
what is not a weight, and refuse what does not fit.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from ...checkpoint import StateDict, check_sizes, count_numbered, known_sizes, shape_of
from ...errors import CheckpointError

TRANSFORMER_WRAPPERS = ("model", "module", "state_dict")
TOKENIZER_WRAPPERS = ("ema", "model", "state_dict")
STRAY_KEYS = ("freqs_cis",)

OFFICIAL_HEADS = {
    # (layers, width): heads
    (12, 768): 12,
    (24, 1024): 16,
    (36, 1280): 20,
    (48, 1536): 24,
    (24, 3200): 32,
}
"""Heads of LlamaGen B, L, XL, XXL and 3B; they cannot be read off the tensors."""

ALIASES = {
    "dim": "hidden_size",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_kv_head": "num_kv_heads",
    "block_size": "num_tokens",
    "cls_token_num": "num_condition_tokens",
    "codebook_embed_dim": "code_dim",
}
"""The authors' argument names and ours."""

TRANSFORMER_SIZES = (
    "vocab_size",
    "grid",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "intermediate_size",
    "num_classes",
    "caption_dim",
    "caption_length",
    "norm_eps",
    "rope_theta",
)


def transformer_sizes(
    tensors: StateDict, name: str, sizes: dict[str, Any], source: object = None
) -> dict[str, Any]:
    """Constructor arguments of the transformer that `tensors` fits.

    Args:
        tensors: official names to tensors.
        name: of the file, for messages.
        sizes: what the caller knows; it wins over the tables and must agree with the tensors.
        source: path of the file; `_256`, `_384` and `_512` in it tell the grid.

    Raises:
        CheckpointError: a size that can neither be read off nor looked up, or disagrees.
    """
    extra = ("num_tokens", "num_condition_tokens", "model_type", "grid_size")
    given = known_sizes(sizes, TRANSFORMER_SIZES + extra, "LlamaGen transformer", ALIASES)
    vocab, width = shape_of(tensors, "tok_embeddings.weight", 2, name)
    layers = count_numbered(tensors, "layers")
    hidden = shape_of(tensors, "layers.0.feed_forward.w1.weight", 2, name)[0]
    found: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": width,
        "num_layers": layers,
        "intermediate_size": hidden,
    }
    if "cls_embedding.uncond_embedding" in tensors:
        length, caption_dim = shape_of(tensors, "cls_embedding.uncond_embedding", 2, name)
        found |= {"num_classes": None, "caption_dim": caption_dim, "caption_length": length}
        num_conditions = length
    else:
        table = shape_of(tensors, "cls_embedding.embedding_table.weight", 2, name)
        found |= {"num_classes": table[0] - 1}
        num_conditions = 1
    found |= _heads(tensors, name, given, layers, width)
    check_sizes(found, given, name)
    found["grid"] = _grid(tensors, name, given, num_conditions, source)
    if given.get("num_condition_tokens", num_conditions) != num_conditions:
        raise CheckpointError(
            f"{name}: its tensors say {num_conditions} conditioning tokens, not "
            f"{given['num_condition_tokens']}"
        )
    return found | {k: given[k] for k in ("norm_eps", "rope_theta") if k in given}


def _heads(
    tensors: StateDict, name: str, given: dict[str, Any], layers: int, width: int
) -> dict[str, int]:
    table = tensors.get("freqs_cis")
    recorded = None
    if table is not None and table.dim() == 3 and width % (2 * table.shape[1]) == 0:
        recorded = width // (2 * table.shape[1])
    heads = given.get("num_heads") or recorded or OFFICIAL_HEADS.get((layers, width))
    if recorded is not None and heads != recorded:
        raise CheckpointError(f"{name}: key 'freqs_cis' says num_heads {recorded}, not {heads}")
    if heads is None:
        raise CheckpointError(
            f"{name}: {layers} layers of width {width} are no official size, so num_heads cannot be "
            "looked up: pass num_heads"
        )
    if width % heads:
        raise CheckpointError(f"{name}: num_heads {heads} does not divide the width {width}")
    rows = shape_of(tensors, "layers.0.attention.wqkv.weight", 2, name)[0]
    head_dim = width // heads
    groups, rest = divmod(rows - width, 2 * head_dim)
    if rest or groups < 1 or heads % groups:
        raise CheckpointError(
            f"{name}: key 'layers.0.attention.wqkv.weight' has {rows} rows, which do not fit "
            f"num_heads {heads} of width {head_dim}"
        )
    return {"num_heads": heads, "num_kv_heads": groups}


def _grid(
    tensors: StateDict, name: str, given: dict[str, Any], num_conditions: int, source: object
) -> tuple[int, int]:
    num_tokens = given.get("num_tokens")
    grid = given.get("grid", given.get("grid_size"))
    if grid is not None:
        grid = (grid, grid) if isinstance(grid, int) else (int(grid[0]), int(grid[1]))
    if "freqs_cis" in tensors:
        num_tokens, grid = _recorded_grid(
            tensors["freqs_cis"], name, num_conditions, grid, num_tokens
        )
    if grid is not None:
        if num_tokens is not None and grid[0] * grid[1] != num_tokens:
            raise CheckpointError(f"{name}: grid {grid} has not the {num_tokens} tokens given")
        return grid
    file_name = Path(source).name if isinstance(source, (str, Path)) else ""
    if num_tokens is None and (pixels := re.search(r"_(256|384|512)(?=\D|$)", file_name)):
        num_tokens = (int(pixels[1]) // 16) ** 2
    side = round((num_tokens or 0) ** 0.5)
    if not num_tokens or side * side != num_tokens:
        raise CheckpointError(
            f"{name}: the grid of image tokens cannot be read off the tensors or the file's name: "
            "pass grid=(rows, columns)"
        )
    return side, side


def _recorded_grid(
    table: Tensor,
    name: str,
    num_conditions: int,
    grid: tuple[int, int] | None,
    num_tokens: int | None,
) -> tuple[int, tuple[int, int] | None]:
    """Image tokens that a rotary table was made for, and their grid where it tells one.

    The first pair of numbers of a token turns by its row, in steps of one radian: the tokens before
    the first turn are a row of the grid.

    Raises:
        CheckpointError: the caller says something else.
    """
    num = len(table) - num_conditions
    columns = 0
    if table.dim() == 3 and table.shape[2] == 2 and num > 0:
        cosine, sine = table[num_conditions:, 0].float().unbind(-1)
        is_first = (cosine > 0.9) & (sine.abs() < 0.1)
        columns = int(is_first.long().cumprod(0).sum())
    found = (num // columns, columns) if columns and num % columns == 0 else None
    for what, given, read in (("num_tokens", num_tokens, num), ("grid", grid, found)):
        if given is not None and read is not None and given != read:
            raise CheckpointError(f"{name}: key 'freqs_cis' says {what} {read}, not {given}")
    if grid is not None and grid[0] * grid[1] != num:
        raise CheckpointError(
            f"{name}: key 'freqs_cis' has {len(table)} rows, {num} behind the condition: grid {grid} "
            f"has {grid[0] * grid[1]} tokens"
        )
    return num, grid or found


def tokenizer_sizes(tensors: StateDict, name: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments of the tokenizer that `tensors` fits; everything is read off.

    Raises:
        CheckpointError: a layout that is not a LlamaGen tokenizer's, or sizes that disagree.
    """
    known = (
        "ch",
        "ch_mult",
        "num_res_blocks",
        "z_channels",
        "codebook_size",
        "code_dim",
        "num_recorded",
        "image_size",
    )
    given = known_sizes(sizes, known, "LlamaGen tokenizer", ALIASES)
    ch = shape_of(tensors, "encoder.conv_in.weight", 4, name)[0]
    levels = count_numbered(tensors, "encoder.conv_blocks")
    if levels < 1:
        raise CheckpointError(f"{name}: key 'encoder.conv_blocks.0.res.0.conv1.weight' is missing")
    widths = [
        shape_of(tensors, f"encoder.conv_blocks.{i}.res.0.conv1.weight", 4, name)[0]
        for i in range(levels)
    ]
    codebook_size, code_dim = shape_of(tensors, "quantize.embedding.weight", 2, name)
    record = tensors.get("quantize.codebook_used")
    found = {
        "ch": ch,
        "ch_mult": tuple(width // ch for width in widths),
        "num_res_blocks": count_numbered(tensors, "encoder.conv_blocks.0.res"),
        "z_channels": shape_of(tensors, "encoder.conv_out.weight", 4, name)[0],
        "codebook_size": codebook_size,
        "code_dim": code_dim,
        "num_recorded": 0 if record is None else len(record),
    }
    check_sizes(found, given, name)
    return found
