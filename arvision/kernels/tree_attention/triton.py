"""Tree attention in Triton: `_attend` to stretches of the cache, then `_merge` them."""

# Type checkers see neither a launch nor what becomes of a constexpr.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from . import Sight


@triton.jit
def _attend(
    queries, keys, values, lengths, bits, open_columns, firsts, partial, log_sums,
    num, group, width, num_heads, num_slots, num_open, stretch, num_splits, scale,
    q_b, q_h, q_t, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d,
    PADDED: tl.constexpr, WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64) // num_heads
    head = tl.program_id(0).to(tl.int64) % num_heads
    split = tl.program_id(2).to(tl.int64)
    # A row of the tile is a candidate of one of the query heads that share the key/value head.
    member = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    candidate = member % num
    is_member = member < num * group
    column = tl.arange(0, BLOCK_D).to(tl.int64)
    is_column = column < width
    q_head = head * group + member // num
    q_at = batch * q_b + q_head[:, None] * q_h + candidate[:, None] * q_t + column[None, :] * q_d
    q = tl.load(queries + q_at, mask=is_member[:, None] & is_column[None, :], other=0.0)
    seen = tl.load(bits + batch * num + candidate, mask=is_member, other=0)
    length = tl.load(lengths + batch)
    begin = split * stretch
    # A chain may run past the end of the cache: what runs over is not there.
    end = tl.minimum(begin + stretch, tl.minimum(length + num, num_slots))

    if WINDOWED:
        first = tl.load(firsts + batch * num + candidate, mask=is_member, other=num_slots)
        # What lies behind all candidates' windows is not read.
        lowest = tl.maximum(tl.min(first, 0), 0)
        begin = tl.maximum(begin, lowest // BLOCK_N * BLOCK_N)

    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N).to(tl.int64)
        inside = slot < end
        if PADDED:
            # Behind the padding's columns everything is open.
            flag = tl.load(open_columns + batch * num_open + slot, mask=slot < num_open, other=1)
            inside = inside & (flag != 0)
        held = inside[:, None] & is_column[None, :]
        k_at = batch * k_b + head * k_h + slot[:, None] * k_s + column[None, :] * k_d
        k = tl.load(keys + k_at, mask=held, other=0.0)
        v_at = batch * v_b + head * v_h + slot[:, None] * v_s + column[None, :] * v_d
        v = tl.load(values + v_at, mask=held, other=0.0)
        offset = slot - length
        shift = tl.minimum(tl.maximum(offset, 0), 63)
        is_ancestor = ((seen[:, None] >> shift[None, :]) & 1) != 0
        committed = (offset < 0)[None, :]
        if WINDOWED:
            committed = committed & (slot[None, :] >= first[:, None])
        visible = inside[None, :] & (committed | ((offset >= 0)[None, :] & is_ancestor))
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(visible, scores, float("-inf"))
        next_most = tl.maximum(most, tl.max(scores, 1))
        # A row that has seen nothing yet has no maximum to subtract.
        base = tl.where(next_most == float("-inf"), 0.0, next_most)
        weights = tl.exp(scores - base[:, None])
        shrink = tl.exp(most - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        most = next_most
    is_empty = total == 0
    acc = acc / tl.where(is_empty, 1.0, total)[:, None]
    log_sum = tl.where(is_empty, float("-inf"), most + tl.log(tl.where(is_empty, 1.0, total)))
    at = (tl.program_id(0).to(tl.int64) * num_splits + split) * num * group + member
    tl.store(log_sums + at, log_sum, mask=is_member)
    out = partial + at[:, None] * width + column[None, :]
    tl.store(out, acc, mask=is_member[:, None] & is_column[None, :])


@triton.jit
def _merge(
    partial, log_sums, out, num_members, width, num_splits,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0).to(tl.int64)
    member = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_member = member < num_members
    column = tl.arange(0, BLOCK_D).to(tl.int64)
    held = is_member[:, None] & (column[None, :] < width)
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for split in range(num_splits):
        at = (unit * num_splits + split) * num_members + member
        log_sum = tl.load(log_sums + at, mask=is_member, other=0.0)
        part = tl.load(partial + at[:, None] * width + column[None, :], mask=held, other=0.0)
        next_most = tl.maximum(most, log_sum)
        base = tl.where(next_most == float("-inf"), 0.0, next_most)
        shrink = tl.exp(most - base)
        weight = tl.exp(log_sum - base)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + part * weight[:, None]
        most = next_most
    acc = acc / total[:, None]
    goal = out + (unit * num_members + member)[:, None] * width + column[None, :]
    tl.store(goal, acc.to(out.dtype.element_ty), mask=held)


def num_stretches(device: torch.device, num_units: int, num_tiles: int) -> int:
    """Into how many stretches the cache of `num_tiles` tiles is split, for `num_units` programs."""
    wanted = 4
    if device.type == "cuda":
        # Two programs for each multiprocessor keep the memory busy.
        wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(num_tiles, wanted // max(1, num_units)))


def tree_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    sight: Sight,
    scale: float,
    num_splits: int | None = None,
) -> Tensor:
    """See `arvision.kernels.tree_attention.tree_attention`; `num_splits` is for tests."""
    batch, num_heads, num, width = queries.shape
    num_slots = keys.shape[2]
    if queries.numel() == 0:
        return torch.empty_like(queries)
    units, group = batch * keys.shape[1], num_heads // keys.shape[1]
    members = num * group
    block_d = max(16, triton.next_power_of_2(width))
    block_m = max(16, min(64, triton.next_power_of_2(members)))
    is_large = block_d > 128 or (queries.element_size() == 4 and block_d >= 64)
    block_n = 32 if is_large else 64
    # With fewer warps a thread's share of the accumulator does not fit its registers; AMD's wider
    # ones do better with four.
    is_wide = block_d > 64 or queries.element_size() == 4
    num_warps = 8 if is_wide and torch.version.hip is None else 4
    tiles = triton.cdiv(members, block_m)
    columns = triton.cdiv(num_slots, block_n)
    splits = num_splits or num_stretches(queries.device, units * tiles, columns)
    stretch = triton.cdiv(columns, splits) * block_n
    splits = triton.cdiv(num_slots, stretch)

    float32 = {"device": queries.device, "dtype": torch.float32}
    partial = torch.empty(units, splits, members, width, **float32)
    log_sums = torch.empty(units, splits, members, **float32)
    out = torch.empty(queries.shape, device=queries.device, dtype=queries.dtype)
    padding, firsts = sight.open_columns, sight.firsts
    num_open = 0 if padding is None else padding.shape[1]
    _attend[(units, tiles, splits)](
        queries, keys, values, sight.lengths, sight.bits, sight.bits if padding is None else padding,
        sight.bits if firsts is None else firsts, partial, log_sums, num, group, width, keys.shape[1], num_slots, num_open, stretch, splits,
        float(scale),
        *queries.stride(), *keys.stride(), *values.stride(),
        PADDED=padding is not None, WINDOWED=firsts is not None, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d,
        num_stages=2, num_warps=num_warps,
    )  # fmt: skip
    _merge[(units, triton.cdiv(members, 16))](
        partial, log_sums, out, members, width, splits, BLOCK_M=16, BLOCK_D=block_d
    )
    return out
