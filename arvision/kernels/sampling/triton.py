"""Shaping and drawing in Triton.

`_cut` finds, for each row, what is kept: all logits above a value, and of those equal to it the
ones up to an index; and it draws from what is kept, where that is asked for. `_write` writes the law
that it found, `_gumbel` (a row for several programs) and `_inverse` draw from it. `_draw` draws from
laws that were written.
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

from ..inversion.triton import inversion_step
from .contest import bits_of, contend
from .reference import Shaping

BLOCK = 2048
SPLIT = 8192
"""Logits of one program of `_gumbel` and `_draw`."""

DRAWN_ALONE = 32768
"""Logits of a row that the program which cuts it draws from as well."""

DRAWN_AT_ONCE = 1024
"""Tokens that contend together: few, as most blocks then have no score that could win."""


@triton.jit
def _weight(scale, row, WEIGHTED: tl.constexpr):
    """The guidance scale of a row: one for all, or its own."""
    weight = scale
    if WEIGHTED:
        weight = tl.load(scale + row)
    return weight


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
    cond, null, tops, cuts, lasts, log_sums, words, positions, tokens,
    num, use, size, scales, temperature, top_k, top_p,
    GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, DRAWS: tl.constexpr,
    GUIDED: tl.constexpr, WEIGHTED: tl.constexpr, TEMPERED: tl.constexpr, BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scale = _weight(scales, row, WEIGHTED)
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
    foremost = tl.full([], 1 << 40, tl.int64)
    for start in range(0, size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < size
        x = _logit(cond, null, base + token, inside, scale, temperature, GUIDED, TEMPERED)
        key = _key(x)
        # A NaN may have either sign, and spoils the row with both.
        counts = (key > cut) | (x != x)
        above += tl.sum(tl.where(counts, tl.exp(x - top), 0.0).to(tl.float64), 0)
        is_tie = (key == cut) & inside
        if GREEDY:
            here = tl.where(is_tie, token.to(tl.int64), 1 << 40)
            foremost = tl.minimum(foremost, tl.min(here, 0))
        else:
            num_ties += tl.sum(is_tie.to(tl.int64), 0)
    value = _value(cut)
    each = tl.exp(value - top).to(tl.float64)
    kept = num_ties
    last = tl.full([], 1 << 40, tl.int64)
    if GREEDY:
        kept += 1
        last = foremost
    if TOP_P:
        # Tie j, from 0, stays while the mass before it is below the goal; all do if they weigh
        # nothing.
        room = tl.ceil((goal - above) / each)
        kept = tl.minimum(tl.maximum(room, 1.0), num_ties.to(tl.float64)).to(tl.int64)
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
    log_sum = tl.log(above + kept.to(tl.float64) * each).to(tl.float32)
    tl.store(tops + row, top)
    tl.store(cuts + row, value)
    tl.store(lasts + row, last)
    tl.store(log_sums + row, log_sum)
    if DRAWS and GREEDY:
        tl.store(tokens + row, last)
    elif DRAWS:
        position = tl.load(positions + row)
        best = tl.full([], float("-inf"), tl.float32)
        index = tl.zeros([], tl.int64)
        for start in range(0, size, AT_ONCE):
            token = start + tl.arange(0, AT_ONCE).to(tl.int64)
            x = _logit(cond, null, base + token, token < size, scale, temperature, GUIDED, TEMPERED)
            logp = _kept(x, token, top, value, last, log_sum)
            bits = bits_of(words + tl.program_id(0) // num * 3, position, use, start, AT_ONCE)
            best, index = contend(logp, bits, token, best, index, tl.float32)
        tl.store(tokens + row, index)


@triton.jit
def _kept(x, token, top, cut, last, log_sum):
    """Logits to log-probabilities, -inf where cut."""
    is_kept = (x > cut) | ((x == cut) & (token <= last))
    return tl.where(is_kept, x - top - log_sum, float("-inf"))


@triton.jit
def _logp(
    cond, null, tops, cuts, lasts, log_sums, row, token, size, scales, temperature,
    GUIDED: tl.constexpr, WEIGHTED: tl.constexpr, TEMPERED: tl.constexpr,
):  # fmt: skip
    """The law of some tokens of a row."""
    scale = _weight(scales, row, WEIGHTED)
    x = _logit(cond, null, row * size + token, token < size, scale, temperature, GUIDED, TEMPERED)
    top, cut, last = tl.load(tops + row), tl.load(cuts + row), tl.load(lasts + row)
    return _kept(x, token, top, cut, last, tl.load(log_sums + row))


@triton.jit
def _write(
    cond, null, tops, cuts, lasts, log_sums, out, first, step, size, scales, temperature,
    GUIDED: tl.constexpr, WEIGHTED: tl.constexpr, TEMPERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    logp = _logp(
        cond, null, tops, cuts, lasts, log_sums, first + place * step, token, size, scales,
        temperature, GUIDED, WEIGHTED, TEMPERED,
    )  # fmt: skip
    tl.store(out + place * size + token, logp, mask=token < size)


@triton.jit
def _gumbel(
    cond, null, tops, cuts, lasts, log_sums, words, positions, scores, tokens,
    num, use, size, scales, temperature, num_splits,
    GUIDED: tl.constexpr, WEIGHTED: tl.constexpr, TEMPERED: tl.constexpr, BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    position = tl.load(positions + row)
    best = tl.full([], float("-inf"), tl.float32)
    index = tl.zeros([], tl.int64)
    for start in range(0, SPLIT, BLOCK):
        first = split * SPLIT + start
        token = first + tl.arange(0, BLOCK)
        logp = _logp(
            cond, null, tops, cuts, lasts, log_sums, row, token, size, scales, temperature,
            GUIDED, WEIGHTED, TEMPERED,
        )  # fmt: skip
        bits = bits_of(words + tl.program_id(0) // num * 3, position, use, first, BLOCK)
        best, index = contend(logp, bits, token, best, index, tl.float32)
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
        part = tl.load(base + token, mask=token < size, other=float("-inf"))
        bits = bits_of(words + tl.program_id(0) // num * 3, position, 0, first, BLOCK)
        best, index = contend(part, bits, token, best, index, DTYPE)
    tl.store(scores + law * num_splits + split, best)
    tl.store(tokens + law * num_splits + split, index)


@triton.jit
def _inverse(
    cond, null, tops, cuts, lasts, log_sums, uniforms, tokens, size, scales, temperature,
    GUIDED: tl.constexpr, WEIGHTED: tl.constexpr, TEMPERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([], tl.float64)
    for start in range(0, size, BLOCK):
        token = start + tl.arange(0, BLOCK).to(tl.int64)
        logp = _logp(
            cond, null, tops, cuts, lasts, log_sums, row, token, size, scales, temperature,
            GUIDED, WEIGHTED, TEMPERED,
        )  # fmt: skip
        total += tl.sum(tl.exp(logp).to(tl.float64), 0)
    share = tl.load(uniforms + row) * total
    carry = tl.zeros([], tl.float64)
    found = tl.full([], 1 << 40, tl.int64)
    last = tl.zeros([], tl.int64)
    for start in range(0, size, BLOCK):
        token = start + tl.arange(0, BLOCK).to(tl.int64)
        logp = _logp(
            cond, null, tops, cuts, lasts, log_sums, row, token, size, scales, temperature,
            GUIDED, WEIGHTED, TEMPERED,
        )  # fmt: skip
        mass = tl.exp(logp).to(tl.float64)
        carry, found, last = inversion_step(mass, token, carry, share, found, last)
    tl.store(tokens + row, tl.where(found < size, found, last))


def _warps(block: int) -> int:
    """Of a program that has a row for itself: as many as keep all its numbers in registers."""
    return max(4, min(8, block // 128))


class Cut:
    """What is kept of rows of logits, and draws from it.

    Args:
        logits: [R, V].
        how: see `arvision.kernels.sampling.shape`, and so the others.
        guidance_scale: a number, or one for each row, [R] float32.
        noise: words [B, 3], positions [B, T] with B T = R, and the counter's last word, for a draw
            from each row in the same launch; None for no draw. It is not made for rows of more
            than `DRAWN_ALONE` logits: ask `gumbel`.

    Attributes:
        log_sums: [R] float32, NaN for a row that is no law.
        tokens: [R] int64, what was drawn; None where nothing was.
    """

    def __init__(
        self,
        logits: Tensor,
        how: Shaping,
        null_logits: Tensor | None,
        guidance_scale: float | Tensor,
        noise: tuple[Tensor, Tensor, int] | None = None,
    ) -> None:
        temperature, top_k, top_p = how.temperature, how.top_k, how.top_p
        self.rows, self.size = logits.shape
        cond = logits.contiguous()
        null = cond if null_logits is None else null_logits.contiguous()
        num, device = len(logits), logits.device
        tops, cuts, log_sums = torch.empty(3, num, device=device, dtype=torch.float32)
        lasts = torch.empty(num, device=device, dtype=torch.int64)
        self.block = max(16, min(BLOCK, triton.next_power_of_2(self.size)))
        self._pointers = (cond, null, tops, cuts, lasts, log_sums)
        self.log_sums = log_sums
        is_weighted = isinstance(guidance_scale, Tensor)
        scale = guidance_scale.contiguous() if is_weighted else float(guidance_scale)
        self._scalars = (scale, float(temperature))
        # A product and a sum must not be fused: PyTorch rounds between them.
        self._options: dict[str, Any] = {
            "GUIDED": null_logits is not None,
            "WEIGHTED": is_weighted,
            "TEMPERED": temperature not in (0, 1),
            "enable_fp_fusion": False,
        }
        self.tokens: Tensor | None = None
        words = positions = lasts
        each, use = 1, 0
        if noise is not None and self.size <= DRAWN_ALONE:
            words, positions, use = noise[0].contiguous(), noise[1].contiguous(), noise[2]
            each = positions.shape[1]
            self.tokens = torch.empty(num, device=device, dtype=torch.int64)
        is_greedy = temperature == 0
        if num:
            _cut[(num,)](
                *self._pointers, words, positions, lasts if self.tokens is None else self.tokens,
                each, use, self.size, *self._scalars, top_k, float(top_p),
                GREEDY=is_greedy, TOP_K=not is_greedy and 0 < top_k < self.size,
                TOP_P=not is_greedy and top_p < 1, DRAWS=self.tokens is not None,
                BLOCK=self.block, AT_ONCE=min(self.block, DRAWN_AT_ONCE),
                num_warps=_warps(self.block), **self._options,
            )  # fmt: skip

    def write(self, first: int = 0, step: int = 1) -> Tensor:
        """The laws of rows `first`, `first` + `step`, ..., [R / step, V]."""
        num = len(range(first, self.rows, step))
        out = torch.empty(num, self.size, device=self.log_sums.device, dtype=torch.float32)
        if num:
            grid = (num, triton.cdiv(self.size, self.block))
            _write[grid](
                *self._pointers, out, first, step, self.size, *self._scalars, BLOCK=self.block,
                **self._options,
            )  # fmt: skip
        return out

    def gumbel(self, words: Tensor, positions: Tensor, use: int) -> Tensor:
        """Tokens [R]; see `arvision.kernels.sampling.sample_gumbel`."""
        block = min(self.block, DRAWN_AT_ONCE)
        split = max(block, min(SPLIT, triton.next_power_of_2(self.size)))
        scores, tokens, splits = _winners(self.rows, self.size, split, self.log_sums)
        if self.rows:
            _gumbel[(self.rows, splits)](
                *self._pointers, words.contiguous(), positions.contiguous(), scores, tokens,
                positions.shape[1], use, self.size, *self._scalars, splits,
                BLOCK=block, SPLIT=split, **self._options,
            )  # fmt: skip
        return _winner(scores, tokens)

    def inverse(self, uniforms: Tensor) -> Tensor:
        """Tokens [R]; see `arvision.kernels.sampling.sample_inverse`."""
        tokens = torch.empty(self.rows, device=uniforms.device, dtype=torch.int64)
        if self.rows:
            _inverse[(self.rows,)](
                *self._pointers, uniforms.contiguous(), tokens, self.size, *self._scalars,
                BLOCK=self.block, num_warps=_warps(self.block), **self._options,
            )  # fmt: skip
        return tokens


def _winners(rows: int, size: int, split: int, like: Tensor) -> tuple[Tensor, Tensor, int]:
    """Room for the best score of each part of each row and for its token, and the number of parts."""
    splits = triton.cdiv(size, split)
    scores = torch.empty(rows, splits, device=like.device, dtype=like.dtype)
    return scores, torch.empty(rows, splits, device=like.device, dtype=torch.int64), splits


def _winner(scores: Tensor, tokens: Tensor) -> Tensor:
    """The token [R] with the best of the scores [R, S]."""
    if scores.shape[1] == 1:
        return tokens[:, 0]
    return tokens.gather(1, scores.argmax(1, keepdim=True))[:, 0]


def shape(
    logits: Tensor, how: Shaping, null_logits: Tensor | None, guidance_scale: float
) -> Tensor:
    """See `arvision.kernels.sampling.shape`."""
    return Cut(logits, how, null_logits, guidance_scale).write()


def sample_gumbel(
    logits: Tensor,
    identity: Tensor,
    how: Shaping,
    use: int,
    null_logits: Tensor | None,
    guidance_scale: float,
) -> Tensor:
    """See `arvision.kernels.sampling.sample_gumbel`."""
    noise = (identity[:, :3], identity[:, 3:], use)
    cut = Cut(logits, how, null_logits, guidance_scale, noise)
    return cut.gumbel(*noise) if cut.tokens is None else cut.tokens


def draw_gumbel(logp: Tensor, words: Tensor, positions: Tensor) -> Tensor:
    """See `arvision.kernels.sampling.draw_gumbel`."""
    batch, num = positions.shape
    size = logp.shape[2]
    if logp.stride(2) != 1:
        logp = logp.contiguous()
    block = max(16, min(DRAWN_AT_ONCE, triton.next_power_of_2(size)))
    split = max(block, min(SPLIT // 2, triton.next_power_of_2(size)))
    scores, tokens, splits = _winners(batch * num, size, split, logp)
    if batch * num:
        dtype = tl.float64 if logp.dtype == torch.float64 else tl.float32
        stride_t = 0 if logp.shape[1] == 1 else logp.stride(1)
        _draw[(batch * num, splits)](
            logp, words.contiguous(), positions.contiguous(), scores, tokens, num, size,
            logp.stride(0), stride_t, splits, DTYPE=dtype, BLOCK=block, SPLIT=split,
        )  # fmt: skip
    return _winner(scores, tokens).view(batch, num)


def sample_inverse(
    logits: Tensor,
    uniforms: Tensor,
    how: Shaping,
    null_logits: Tensor | None,
    guidance_scale: float,
) -> Tensor:
    """See `arvision.kernels.sampling.sample_inverse`."""
    return Cut(logits, how, null_logits, guidance_scale).inverse(uniforms)
