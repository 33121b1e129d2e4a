"""Philox4x32-10 in Triton, one counter per lane."""

# Type checkers see neither a launch nor what becomes of a constexpr.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.random import philox_impl

BLOCK = 1024


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1, words, num, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num
    w0, w1, w2, w3 = philox_impl(
        tl.load(c0 + at, mask=inside, other=0).to(tl.uint32),
        tl.load(c1 + at, mask=inside, other=0).to(tl.uint32),
        tl.load(c2 + at, mask=inside, other=0).to(tl.uint32),
        tl.load(c3 + at, mask=inside, other=0).to(tl.uint32),
        tl.load(k0 + at, mask=inside, other=0).to(tl.uint32),
        tl.load(k1 + at, mask=inside, other=0).to(tl.uint32),
    )
    tl.store(words + at * 4, w0.to(tl.int64), mask=inside)
    tl.store(words + at * 4 + 1, w1.to(tl.int64), mask=inside)
    tl.store(words + at * 4 + 2, w2.to(tl.int64), mask=inside)
    tl.store(words + at * 4 + 3, w3.to(tl.int64), mask=inside)


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> Tensor:
    """See `arvision.kernels.philox.philox4x32`."""
    inputs = torch.broadcast_tensors(*counter, *key)
    words = torch.empty(*inputs[0].shape, 4, dtype=torch.int64, device=inputs[0].device)
    num = inputs[0].numel()
    if num:
        flat = [tensor.contiguous() for tensor in inputs]
        _philox[(triton.cdiv(num, BLOCK),)](*flat, words, num, BLOCK=BLOCK)
    return words
