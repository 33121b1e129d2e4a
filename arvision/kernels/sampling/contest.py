"""The noise of the package in Triton, and which token wins under it."""

# Type checkers do not see what becomes of a constexpr.
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.random import philox_impl

MARGIN = tl.constexpr(0.01)
"""How far a rough Gumbel number may be off: fifty times as far as the worst one is."""


@triton.jit
def bits_of(words, position, use, first, BLOCK: tl.constexpr):
    """Random words [BLOCK] of tokens `first`, `first` + 1, ..."""
    zero = tl.zeros([BLOCK // 4], tl.uint32)
    low = zero + tl.load(words).to(tl.uint32)
    high = zero + tl.load(words + 1).to(tl.uint32)
    image = zero + tl.load(words + 2).to(tl.uint32)
    where = zero + position.to(tl.uint32)
    purpose = (zero + use).to(tl.uint32)
    lane = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    w0, w1, w2, w3 = philox_impl(image, where, lane, purpose, low, high)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def contend(logp, bits, token, best, index, DTYPE: tl.constexpr):
    """The best log p + g so far and its token, the first of equal ones, after some tokens more.

    The noise of the package has two logarithms in float64, which cards make slowly. Numbers in
    float32 that are at most `MARGIN` off tell first whether any of these tokens can win.
    """
    u = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    # Next to 1 a float32 has lost what counts; its distance to 1 has not.
    v = ((bits ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    late = tl.where(v < 0.004, v * (1.0 + v * (0.5 + v * 0.33333334)), -tl.log(u))
    rough = tl.max(logp.to(tl.float32) - tl.log(late), 0)
    if rough >= best.to(tl.float32) - MARGIN:
        noise = -tl.log(-tl.log((bits.to(tl.float64) + 0.5) * 2.3283064365386963e-10))
        score = logp + noise.to(DTYPE)
        top = tl.max(score, 0)
        if top > best:
            index = tl.min(tl.where(score == top, token, 1 << 40), 0)
            best = top
    return best, index
