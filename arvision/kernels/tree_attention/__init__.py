"""Attention of a tree of candidates over a long cache, split along the cache.

Each program attends to one stretch of the cache, read once for all queries of a key/value head's
group; a second kernel merges the stretches by their log-sum-exp. The ancestor mask is one 64-bit
integer per candidate.

The reference is PyTorch's own attention under a dense mask, which reads all of it; on a CPU that is
the fast path, too. FlexAttention takes such a mask as blocks, and compiles for each shape of the
tree. `benchmarks/kernels.py` measures the three side by side.

Models call `attend`: a cache hangs a `Sight` on the mask of a pass where the kernel may run, and the
mask that arrives with it at a layer is the very one that the cache made.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError
from ..dispatch import choose, explain, stays
from . import reference

__all__ = ["Sight", "attend", "carry", "look", "sight_of", "spread", "tree_attention"]

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
    factor = width**-0.5 if scale is None else scale
    limit = _limit(num, width, queries.dtype) or _gradients(queries, keys, values)
    if choose("tree_attention", queries, backend, limit).is_triton:
        from . import triton

        sight = Sight.of(lengths, ancestors, num, open_columns)
        return triton.tree_attention(queries, keys, values, sight, factor)
    given = (queries, keys, values, lengths, ancestors, open_columns)
    return reference.tree_attention(*given, factor)


@dataclass(frozen=True)
class Sight:
    """What the candidates of a pass look at, packed once for all layers.

    Attributes:
        lengths: [B] int64, committed length of each row.
        bits: [B, T] int64, bit u of candidate t set where it looks at candidate u.
        open_columns: [B, P] int8, 0 where one of the first P slots is padding; None for no padding.
        firsts: [B, T] int64, the first committed slot that each candidate looks at; None for all.
    """

    lengths: Tensor
    bits: Tensor
    open_columns: Tensor | None
    firsts: Tensor | None = None

    @classmethod
    def of(
        cls, lengths: Tensor, ancestors: Tensor | None, num: int, open_columns: Tensor | None
    ) -> Sight:
        """Pack arguments of `tree_attention`; `ancestors` None for a chain of `num` candidates."""
        order = torch.arange(num, device=lengths.device)
        if ancestors is None:
            ancestors = order <= order[:, None]
        bits = (ancestors.expand(len(lengths), num, num).long() << order).sum(-1)
        padding = None if open_columns is None else open_columns.to(torch.int8).contiguous()
        return cls(lengths.contiguous(), bits, padding)

    def within(self, window: int, positions: Tensor) -> Sight:
        """The same in a layer that looks at the last `window` positions alone, its own included.

        Args:
            window: at least 1.
            positions: [B or 1, T] int64, of the candidates; committed slots are positions.
        """
        rows, num = self.bits.shape
        positions = positions.expand(rows, num)
        order = torch.arange(num, device=positions.device)
        is_near = positions[:, :, None] - positions[:, None] < window
        near = (is_near.long() << order).sum(-1)
        firsts = (positions - window + 1).contiguous()
        return replace(self, bits=self.bits & near, firsts=firsts)

    def fits(self, queries: Tensor, keys: Tensor, values: Tensor) -> bool:
        """Whether a layer's tensors are those of the pass: some layers cut or widen them first."""
        rows, _, num, _ = queries.shape
        return keys.shape == values.shape and len(keys) == rows and self.bits.shape == (rows, num)


def look(
    keys: Tensor,
    lengths: Tensor,
    ancestors: Tensor | None,
    num: int,
    open_columns: Tensor | None = None,
) -> Sight | None:
    """What a cache hangs on the mask of its pass; None where the kernel would not run.

    Args:
        keys: [..., D], of the cache.
        lengths: [B] int64.
        ancestors: [T, T] or [B, T, T] bool; None for a chain.
        num: T.
        open_columns: [B, P], see `tree_attention`.
    """
    if stays(keys) or torch.compiler.is_compiling():
        return None
    if not explain(keys.device, limit=_limit(num, keys.shape[-1], keys.dtype)).is_triton:
        return None
    return Sight.of(lengths, ancestors, num, open_columns)


def carry(mask: Tensor, sight: Sight | None) -> Tensor:
    """`mask`, which then leads `attend` to the kernel; as it is without a sight."""
    if sight is not None:
        named: Any = mask
        named.sight = sight
    return mask


def sight_of(mask: Any) -> Sight | None:
    """What hangs on a mask; None where nothing does."""
    return getattr(mask, "sight", None)


def spread(mask: Tensor, rows: int) -> Tensor:
    """A mask [R or 1, 1, T, S] for all rows, [rows, 1, T, S], with what hangs on it."""
    return carry(mask.expand(rows, -1, -1, -1), sight_of(mask))


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention of a layer: the kernel where the mask carries a `Sight`, else PyTorch's.

    Without a mask PyTorch's flash attention reads the cache once, in parallel pieces, so that the
    kernel has nothing to win: one candidate behind rows of one length comes so.

    Args:
        queries: [B, Hq, T, D].
        keys: [B, Hkv, S, D], see `tree_attention`.
        values: [B, Hkv, S, D].
        mask: [B or 1, 1, T, S] additive or bool; None for everything.
        is_causal: a causal mask instead.
        scale: of the scores; None for D ** -0.5.

    Returns:
        [B, Hq, T, D].
    """
    sight = None if torch.compiler.is_compiling() else sight_of(mask)
    if sight is not None:
        limit = _gradients(queries, keys, values)
        if choose("tree_attention", queries, "auto", limit).is_triton:
            from . import triton

            factor = queries.shape[-1] ** -0.5 if scale is None else scale
            return triton.tree_attention(queries, keys, values, sight, factor)
    group = queries.shape[1] // keys.shape[1]
    if group == 1:
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=is_causal, scale=scale
        )
    # The queries that share a key head become further query positions of that head.
    rows, heads, num, width = queries.shape
    if is_causal:
        mask = torch.ones(num, keys.shape[2], dtype=torch.bool, device=keys.device).tril()
        mask = mask[None, None]
    if mask is not None:
        mask = mask.repeat(1, 1, group, 1)
    stacked = queries.reshape(rows, keys.shape[1], group * num, width)
    out = F.scaled_dot_product_attention(stacked, keys, values, attn_mask=mask, scale=scale)
    return out.reshape(rows, heads, num, width)


def _limit(num: int, width: int, dtype: torch.dtype) -> str | None:
    if num > MAX_CANDIDATES:
        return f"tree_attention takes at most {MAX_CANDIDATES} candidates, not {num}"
    if width > MAX_WIDTH:
        return f"tree_attention takes heads of width <= {MAX_WIDTH}, not {width}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"tree_attention takes no {dtype}"
    return None


def _gradients(*tensors: Tensor) -> str | None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "tree_attention gives no gradients"
    return None
