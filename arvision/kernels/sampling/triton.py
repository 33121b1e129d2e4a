"""Shaping and drawing in Triton.

`_cut` finds, for each row, what is kept: all logits above a value, and of those equal to it the
ones up to an index. Then one of three kernels uses that: `_write` writes the law, `_gumbel` and
`_inverse` draw from it. `_draw` draws from laws that were written.
"""

# Type checkers see neither a launch nor what becomes of a constexpr.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.random import philox_impl

from ..inversion.triton import inversion_step
from .reference import Shaping

BLOCK = 2048
SPLIT = 8192
"""Logits of one program of `_gumbel`."""


@triton.jit
def _logit(
    cond, null, at, inside, scale, temperature, GUIDED: tl.constexpr, TEMPERED: tl.constexpr
):
    """Guided and tempered logits; every step rounds as PyTorch's does."""
    c = tl.load(cond + at, mask=inside, other=float("-inf"))
    if GUIDED:
        n = tl.load(null + at, mask=inside, other=0.0)
        difference = (c.to(tl.float32) - n.to(tl.float32)).to(c.dtype)
        scaled = (scale * difference.to(tl.float32)).to(c.dtype)
        c = (n.to(tl.float32) + scaled.to(tl.float32)).to(c.dtype)
    x = c.to(tl.float32)
    if TEMPERED:
        x = tl.div_rn(x, temperature)
    # -0 equals 0, but its bits do not.
    x = tl.where(x == 0, 0.0, x)
    return tl.where(inside, x, float("-inf"))


@triton.jit
def _key(x):
    """Integers ordered like the float32 numbers they stand for."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _value(key):
    """The inverse of `_key`."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _search(
    cond, null, base, size, scale, temperature, low, high, floor, top, limit,
    BY_MASS: tl.constexpr, GUIDED: tl.constexpr, TEMPERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The smallest key in low..high above which less than `limit` lies, in tokens or in mass."""
    while low < high:
        pivots = low + (high - low) * tl.arange(0, 8) // 8
        above = tl.zeros([8], tl.float64)
        for start in range(0, size, BLOCK):
            token = start + tl.arange(0, BLOCK)
            x = _logit(cond, null, base + token, token < size, scale, temperature, GUIDED, TEMPERED)
            key = _key(x)
            if BY_MASS:
                weight = tl.where(key >= floor, tl.exp(x - top), 0.0).to(tl.float64)
            else:
                weight = tl.full([BLOCK], 1.0, tl.float64)
            above += tl.sum(tl.where(key[:, None] > pivots[None, :], weight[:, None], 0.0), axis=0)
        is_enough = above < limit
        next_high = tl.minimum(high, tl.min(tl.where(is_enough, pivots, high), 0))
        low = tl.maximum(low, tl.max(tl.where(is_enough, low, pivots + 1), 0))
        high = next_high
    return high


@triton.jit
def _cut(
    cond, null, tops, cuts, lasts, log_sums, size, scale, temperature, top_k, top_p,
    GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
    GUIDED: tl.constexpr, TEMPERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base = row * size
    top = tl.full([], float("-inf"), tl.float32)
    bottom = tl.full([], float("inf"), tl.float32)
    for start in range(0, size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < size
        x = _logit(cond, null, base + token, inside, scale, temperature, GUIDED, TEMPERED)
        top = tl.maximum(top, tl.max(x, 0))
        bottom = tl.minimum(bottom, tl.min(tl.where(inside, x, float("inf")), 0))
    highest = _key(top)
    cut = _key(bottom)
    if GREEDY:
        cut = highest
    if TOP_K:
        cut = _search(
            cond, null, base, size, scale, temperature, cut, highest, cut, top, top_k,
            False, GUIDED, TEMPERED, BLOCK,
        )  # fmt: skip
    goal = tl.zeros([], tl.float64)
    if TOP_P:
        for start in range(0, size, BLOCK):
            token = start + tl.arange(0, BLOCK)
            x = _logit(cond, null, base + token, token < size, scale, temperature, GUIDED, TEMPERED)
            goal += tl.sum(tl.where(_key(x) >= cut, tl.exp(x - top), 0.0).to(tl.float64), 0)
        goal *= top_p
        cut = _search(
            cond, null, base, size, scale, temperature, cut, highest, cut, top, goal,
            True, GUIDED, TEMPERED, BLOCK,
        )  # fmt: skip

    above = tl.zeros([], tl.float64)
    num_ties = tl.zeros([], tl.int64)
    for start in range(0, size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < size
        x = _logit(cond, null, base + token, inside, scale, temperature, GUIDED, TEMPERED)
        key = _key(x)
        above += tl.sum(tl.where(key > cut, tl.exp(x - top), 0.0).to(tl.float64), 0)
        num_ties += tl.sum(((key == cut) & inside).to(tl.int64), 0)
    value = _value(cut)
    each = tl.exp(value - top).to(tl.float64)
    kept = num_ties
    if GREEDY:
        kept = tl.minimum(num_ties, 1)
    if TOP_P:
        # Tie j, from 0, stays while the mass before it is below the goal; all do if they weigh
        # nothing.
        room = tl.ceil((goal - above) / each)
        kept = tl.minimum(tl.maximum(room, 1.0), num_ties.to(tl.float64)).to(tl.int64)
    last = tl.full([], 1 << 40, tl.int64)
    if kept < num_ties:
        seen = tl.zeros([], tl.int64)
        for start in range(0, size, BLOCK):
            token = start + tl.arange(0, BLOCK)
            inside = token < size
            x = _logit(cond, null, base + token, inside, scale, temperature, GUIDED, TEMPERED)
            is_tie = ((_key(x) == cut) & inside).to(tl.int64)
            rank = seen + tl.cumsum(is_tie, 0)
            is_last = (is_tie > 0) & (rank == kept)
            last = tl.minimum(last, tl.min(tl.where(is_last, token.to(tl.int64), 1 << 40), 0))
            seen += tl.sum(is_tie, 0)
    tl.store(tops + row, top)
    tl.store(cuts + row, value)
    tl.store(lasts + row, last)
    tl.store(log_sums + row, tl.log(above + kept.to(tl.float64) * each).to(tl.float32))


@triton.jit
def _logp(
    cond, null, tops, cuts, lasts, log_sums, row, token, size, scale, temperature,
    GUIDED: tl.constexpr, TEMPERED: tl.constexpr,
):  # fmt: skip
    """The law of some tokens of a row, -inf where cut."""
    at = row * size + token
    x = _logit(cond, null, at, token < size, scale, temperature, GUIDED, TEMPERED)
    cut = tl.load(cuts + row)
    is_kept = (x > cut) | ((x == cut) & (token <= tl.load(lasts + row)))
    logp = x - tl.load(tops + row) - tl.load(log_sums + row)
    return tl.where(is_kept, logp, float("-inf"))


@triton.jit
def _write(
    cond, null, tops, cuts, lasts, log_sums, out, size, scale, temperature,
    GUIDED: tl.constexpr, TEMPERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    logp = _logp(
        cond, null, tops, cuts, lasts, log_sums, row, token, size, scale, temperature,
        GUIDED, TEMPERED,
    )  # fmt: skip
    tl.store(out + row * size + token, logp, mask=token < size)


@triton.jit
def _noise(words, position, use, first, BLOCK: tl.constexpr):
    """Gumbel numbers [BLOCK] float64 of tokens `first`, `first` + 1, ..."""
    zero = tl.zeros([BLOCK // 4], tl.uint32)
    low = zero + tl.load(words).to(tl.uint32)
    high = zero + tl.load(words + 1).to(tl.uint32)
    image = zero + tl.load(words + 2).to(tl.uint32)
    where = zero + position.to(tl.uint32)
    purpose = (zero + use).to(tl.uint32)
    lane = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    w0, w1, w2, w3 = philox_impl(image, where, lane, purpose, low, high)
    bits = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    uniform = (bits.to(tl.float64) + 0.5) * 2.3283064365386963e-10
    return -tl.log(-tl.log(uniform))


@triton.jit
def _better(score, token, best, index):
    """The best score so far and its token, the first of equal ones."""
    top = tl.max(score, 0)
    where = tl.min(tl.where(score == top, token, 1 << 40), 0)
    return tl.maximum(top, best), tl.where(top > best, where, index)


@triton.jit
def _gumbel(
    cond, null, tops, cuts, lasts, log_sums, identity, use, scores, tokens, size, scale,
    temperature, num_splits,
    GUIDED: tl.constexpr, TEMPERED: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    best = tl.full([], float("-inf"), tl.float32)
    index = tl.zeros([], tl.int64)
    for start in range(0, SPLIT, BLOCK):
        first = split * SPLIT + start
        token = first + tl.arange(0, BLOCK)
        logp = _logp(
            cond, null, tops, cuts, lasts, log_sums, row, token, size, scale, temperature,
            GUIDED, TEMPERED,
        )  # fmt: skip
        noise = _noise(identity + row * 4, tl.load(identity + row * 4 + 3), use, first, BLOCK)
        score = logp + noise.to(tl.float32)
        best, index = _better(score, token, best, index)
    tl.store(scores + row * num_splits + split, best)
    tl.store(tokens + row * num_splits + split, index)


@triton.jit
def _draw(
    logp, words, positions, scores, tokens, num, size, stride_b, stride_t, num_splits,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    law = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    base = logp + (law // num) * stride_b + (law % num) * stride_t
    position = tl.load(positions + law)
    best = tl.full([], float("-inf"), DTYPE)
    index = tl.zeros([], tl.int64)
    for start in range(0, SPLIT, BLOCK):
        first = split * SPLIT + start
        token = first + tl.arange(0, BLOCK)
        score = tl.load(base + token, mask=token < size, other=float("-inf"))
        score += _noise(words + law // num * 3, position, 0, first, BLOCK).to(DTYPE)
        best, index = _better(score, token, best, index)
    tl.store(scores + law * num_splits + split, best)
    tl.store(tokens + law * num_splits + split, index)


@triton.jit
def _inverse(
    cond, null, tops, cuts, lasts, log_sums, uniforms, tokens, size, scale, temperature,
    GUIDED: tl.constexpr, TEMPERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([], tl.float64)
    for start in range(0, size, BLOCK):
        token = start + tl.arange(0, BLOCK).to(tl.int64)
        logp = _logp(
            cond, null, tops, cuts, lasts, log_sums, row, token, size, scale, temperature,
            GUIDED, TEMPERED,
        )  # fmt: skip
        total += tl.sum(tl.exp(logp).to(tl.float64), 0)
    share = tl.load(uniforms + row) * total
    carry = tl.zeros([], tl.float64)
    found = tl.full([], 1 << 40, tl.int64)
    last = tl.zeros([], tl.int64)
    for start in range(0, size, BLOCK):
        token = start + tl.arange(0, BLOCK).to(tl.int64)
        logp = _logp(
            cond, null, tops, cuts, lasts, log_sums, row, token, size, scale, temperature,
            GUIDED, TEMPERED,
        )  # fmt: skip
        mass = tl.exp(logp).to(tl.float64)
        carry, found, last = inversion_step(mass, token, carry, share, found, last)
    tl.store(tokens + row, tl.where(found < size, found, last))


def _warps(block: int) -> int:
    """Of a program that has a row for itself: as many as keep all its numbers in registers."""
    return max(4, min(8, block // 128))


class _Cut:
    """The rows' cuts, and the arguments that every kernel after `_cut` begins and ends with."""

    def __init__(
        self,
        logits: Tensor,
        how: Shaping,
        null_logits: Tensor | None,
        guidance_scale: float,
    ) -> None:
        temperature, top_k, top_p = how.temperature, how.top_k, how.top_p
        self.rows, self.size = logits.shape
        cond = logits.contiguous()
        null = cond if null_logits is None else null_logits.contiguous()
        num = len(logits)
        tops, cuts, log_sums = torch.empty(3, num, device=logits.device, dtype=torch.float32)
        lasts = torch.empty(num, device=logits.device, dtype=torch.int64)
        self.block = max(16, min(BLOCK, triton.next_power_of_2(self.size)))
        self.pointers = (cond, null, tops, cuts, lasts, log_sums)
        self.scalars = (float(guidance_scale), float(temperature))
        # A product and a sum must not be fused: PyTorch rounds between them.
        self.options: dict[str, Any] = {
            "GUIDED": null_logits is not None,
            "TEMPERED": temperature not in (0, 1),
            "BLOCK": self.block,
            "enable_fp_fusion": False,
        }
        is_greedy = temperature == 0
        if num:
            _cut[(num,)](
                *self.pointers, self.size, *self.scalars, top_k, float(top_p),
                GREEDY=is_greedy, TOP_K=not is_greedy and 0 < top_k < self.size,
                TOP_P=not is_greedy and top_p < 1, num_warps=_warps(self.block), **self.options,
            )  # fmt: skip


def shape(
    logits: Tensor, how: Shaping, null_logits: Tensor | None, guidance_scale: float
) -> Tensor:
    """See `arvision.kernels.sampling.shape`."""
    cut = _Cut(logits, how, null_logits, guidance_scale)
    out = torch.empty(cut.rows, cut.size, device=logits.device, dtype=torch.float32)
    if cut.rows:
        grid = (cut.rows, triton.cdiv(cut.size, cut.block))
        _write[grid](*cut.pointers, out, cut.size, *cut.scalars, **cut.options)
    return out


def sample_gumbel(
    logits: Tensor,
    identity: Tensor,
    how: Shaping,
    use: int,
    null_logits: Tensor | None,
    guidance_scale: float,
) -> Tensor:
    """See `arvision.kernels.sampling.sample_gumbel`."""
    cut = _Cut(logits, how, null_logits, guidance_scale)
    split = max(cut.block, min(SPLIT, triton.next_power_of_2(cut.size)))
    num_splits = triton.cdiv(cut.size, split)
    scores = torch.empty(cut.rows, num_splits, device=identity.device, dtype=torch.float32)
    tokens = torch.empty(cut.rows, num_splits, device=identity.device, dtype=torch.int64)
    if cut.rows:
        _gumbel[(cut.rows, num_splits)](
            *cut.pointers, identity.contiguous(), use, scores, tokens, cut.size, *cut.scalars,
            num_splits, SPLIT=split, **cut.options,
        )  # fmt: skip
    return tokens.gather(1, scores.argmax(1, keepdim=True))[:, 0]


def draw_gumbel(logp: Tensor, words: Tensor, positions: Tensor) -> Tensor:
    """See `arvision.kernels.sampling.draw_gumbel`."""
    batch, num = positions.shape
    size = logp.shape[2]
    if logp.stride(2) != 1:
        logp = logp.contiguous()
    block = max(16, min(BLOCK // 2, triton.next_power_of_2(size)))
    split = max(block, min(SPLIT // 2, triton.next_power_of_2(size)))
    splits = triton.cdiv(size, split)
    scores = torch.empty(batch * num, splits, device=logp.device, dtype=logp.dtype)
    tokens = torch.empty(batch * num, splits, device=logp.device, dtype=torch.int64)
    if batch * num:
        dtype = tl.float64 if logp.dtype == torch.float64 else tl.float32
        stride_t = 0 if logp.shape[1] == 1 else logp.stride(1)
        _draw[(batch * num, splits)](
            logp, words.contiguous(), positions.contiguous(), scores, tokens, num, size,
            logp.stride(0), stride_t, splits, DTYPE=dtype, BLOCK=block, SPLIT=split,
        )  # fmt: skip
    if splits == 1:
        return tokens.view(batch, num)
    return tokens.gather(1, scores.argmax(1, keepdim=True)).view(batch, num)


def sample_inverse(
    logits: Tensor,
    uniforms: Tensor,
    how: Shaping,
    null_logits: Tensor | None,
    guidance_scale: float,
) -> Tensor:
    """See `arvision.kernels.sampling.sample_inverse`."""
    cut = _Cut(logits, how, null_logits, guidance_scale)
    tokens = torch.empty(cut.rows, device=uniforms.device, dtype=torch.int64)
    if cut.rows:
        _inverse[(cut.rows,)](
            *cut.pointers, uniforms.contiguous(), tokens, cut.size, *cut.scalars,
            num_warps=_warps(cut.block), **cut.options,
        )  # fmt: skip
    return tokens
