"""Attention of a tree of candidates over a long cache, split along the cache.

Each program attends to one stretch of the cache, read once for all queries of a key/value head's
group; a second kernel merges the stretches by their log-sum-exp. The ancestor mask is one 64-bit
integer per candidate.

The reference is PyTorch's own attention under a dense mask, which reads all of it; on a CPU that is
the fast path, too, and what the models call. FlexAttention takes such a mask as blocks, and compiles
for each shape of the tree. `benchmarks/kernels.py` measures the three side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError
from ..dispatch import choose
from . import reference

__all__ = ["tree_attention"]

MAX_CANDIDATES = 64
MAX_WIDTH = 256


def tree_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    ancestors: Tensor,
    *,
    open_columns: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """What T candidates see: their row's committed prefix, and their ancestors among themselves.

    Slots behind a row's candidates are never read as numbers: they may hold anything.

    Args:
        queries: [B, Hq, T, D].
        keys: [B, Hkv, S, D], same dtype, any strides; Hq is a multiple of Hkv, and query head h
            uses key/value head h // (Hq / Hkv). Candidate t of row b stands in slot
            `lengths[b] + t`.
        values: like `keys`.
        lengths: [B] int64, committed length of each row; `lengths[b] + T <= S`.
        ancestors: [T, T] or [B, T, T] bool, true where candidate t looks at candidate u; every
            candidate looks at itself.
        open_columns: [B, P] bool, false where one of the first P <= S slots is padding; P may not
            exceed any row's length.
        scale: of the scores; None for D ** -0.5.
        backend: see `arvision.kernels.dispatch`; Triton takes T <= 64, D <= 256, no float64 and no
            gradients.

    Returns:
        [B, Hq, T, D], the queries' dtype.

    Raises:
        InputError: shapes or dtypes that do not fit together.
    """
    batch, num_heads, num, width = queries.shape
    if (
        keys.shape != values.shape
        or keys.dim() != 4
        or (keys.shape[0], keys.shape[3]) != (batch, width)
        or num_heads % keys.shape[1]
    ):
        raise InputError(
            f"queries {tuple(queries.shape)}, keys {tuple(keys.shape)}, values "
            f"{tuple(values.shape)}: expected [B, Hq, T, D] and [B, Hkv, S, D] twice, Hq a multiple "
            f"of Hkv"
        )
    if not queries.dtype == keys.dtype == values.dtype:
        raise InputError(f"queries are {queries.dtype}, keys {keys.dtype}: expected one dtype")
    if ancestors.shape not in ((num, num), (batch, num, num)) or ancestors.dtype != torch.bool:
        raise InputError(
            f"ancestors {tuple(ancestors.shape)} {ancestors.dtype}: expected [{num}, {num}] or "
            f"[{batch}, {num}, {num}] bool"
        )
    if lengths.shape != (batch,):
        raise InputError(f"lengths {tuple(lengths.shape)}: expected [{batch}]")
    if open_columns is not None and (
        open_columns.dim() != 2
        or len(open_columns) != batch
        or open_columns.shape[1] > keys.shape[2]
    ):
        raise InputError(
            f"open_columns {tuple(open_columns.shape)}: expected [{batch}, P <= {keys.shape[2]}]"
        )
    given = (queries, keys, values, lengths, ancestors, open_columns)
    factor = width**-0.5 if scale is None else scale
    if choose("tree_attention", queries, backend, _limit(queries, keys, values)).is_triton:
        from . import triton

        return triton.tree_attention(*given, factor)
    return reference.tree_attention(*given, factor)


def _limit(queries: Tensor, keys: Tensor, values: Tensor) -> str | None:
    if queries.shape[2] > MAX_CANDIDATES:
        return f"tree_attention takes at most {MAX_CANDIDATES} candidates, not {queries.shape[2]}"
    if queries.shape[3] > MAX_WIDTH:
        return f"tree_attention takes heads of width <= {MAX_WIDTH}, not {queries.shape[3]}"
    if queries.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"tree_attention takes no {queries.dtype}"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (queries, keys, values)):
        return "tree_attention gives no gradients"
    return None
