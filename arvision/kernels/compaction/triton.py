"""Cache compaction in Triton: one program holds a row's kept candidates of one head, then writes."""

# Type checkers see neither a launch nor what becomes of a constexpr.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _compact(
    keys, values, lengths, kept, counts, num_rows, width, num_kept,
    stride_l, stride_r, stride_h, stride_s, stride_d,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(0).to(tl.int64) // num_rows
    row = tl.program_id(0).to(tl.int64) % num_rows
    head = tl.program_id(1).to(tl.int64)
    place = tl.arange(0, BLOCK_K).to(tl.int64)
    column = tl.program_id(2).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    used = place < tl.load(counts + row)
    start = tl.load(lengths + row)
    source = start + tl.load(kept + row * num_kept + place, mask=used, other=0)
    inside = used[:, None] & (column[None, :] < width)
    base = layer * stride_l + row * stride_r + head * stride_h
    read = base + source[:, None] * stride_s + column[None, :] * stride_d
    write = base + (start + place)[:, None] * stride_s + column[None, :] * stride_d
    k = tl.load(keys + read, mask=inside)
    v = tl.load(values + read, mask=inside)
    # Sources and goals overlap: nothing is written before everything is read.
    tl.debug_barrier()
    tl.store(keys + write, k, mask=inside)
    tl.store(values + write, v, mask=inside)


def compact_(keys: Tensor, values: Tensor, lengths: Tensor, kept: Tensor, counts: Tensor) -> None:
    """See `arvision.kernels.compaction.compact_`."""
    num_layers, num_rows, num_heads, _, width = keys.shape
    if kept.numel() == 0 or keys.numel() == 0:
        return
    block_k = triton.next_power_of_2(kept.shape[1])
    block_d = min(triton.next_power_of_2(width), max(16, 4096 // block_k))
    grid = (num_layers * num_rows, num_heads, triton.cdiv(width, block_d))
    _compact[grid](
        keys, values, lengths.contiguous(), kept.contiguous(), counts.contiguous(),
        num_rows, width, kept.shape[1], *keys.stride(), BLOCK_K=block_k, BLOCK_D=block_d,
    )  # fmt: skip
