"""One tile of a draw by inversion, for kernels that walk a law tile by tile."""

# Type checkers see neither a launch nor what becomes of a constexpr.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def inversion_step(mass, token, carry, share, found, last):
    """Look for the first token whose cumulative mass exceeds `share`.

    `mass` [BLOCK] float64 belongs to the ascending `token` [BLOCK]; `carry` is the mass before
    this tile. `found` starts at a number above all tokens; `last` is the last token of positive
    mass, which stands in where rounding leaves no cumulative mass above the share.
    """
    reached = carry + tl.cumsum(mass, 0)
    none = tl.full(token.shape, 1 << 40, tl.int64)
    found = tl.minimum(found, tl.min(tl.where((reached > share) & (mass > 0), token, none), 0))
    last = tl.maximum(last, tl.max(tl.where(mass > 0, token, tl.zeros_like(token)), 0))
    return carry + tl.sum(mass, 0), found, last
