"""Nearest code in Triton: a block of vectors walks the codebook and remembers the best."""

# Type checkers see neither a launch nor what becomes of a constexpr.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _nearest(
    vectors, codes, found, num, size, width,
    EUCLIDEAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    z = tl.load(
        vectors + row[:, None] * width + column[None, :],
        mask=(row[:, None] < num) & (column[None, :] < width),
        other=0.0,
    )
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    index = tl.zeros([BLOCK_N], tl.int64)
    for start in range(0, size, BLOCK_V):
        code = start + tl.arange(0, BLOCK_V).to(tl.int64)
        c = tl.load(
            codes + code[:, None] * width + column[None, :],
            mask=(code[:, None] < size) & (column[None, :] < width),
            other=0.0,
        )
        # Full precision: with TF32 the nearest of two close codes is a matter of luck.
        scores = tl.dot(z, tl.trans(c), input_precision="ieee")
        if EUCLIDEAN:
            squared = tl.sum(c.to(tl.float32) * c.to(tl.float32), axis=1) / 2
            scores -= squared[None, :]
        scores = tl.where(code[None, :] < size, scores, float("-inf"))
        top = tl.max(scores, axis=1)
        first = tl.min(tl.where(scores == top[:, None], code[None, :], 1 << 40), axis=1)
        # Strictly better only, so that of equals the first stays.
        index = tl.where(top > best, first, index)
        best = tl.maximum(top, best)
    tl.store(found + row, index, mask=row < num)


def nearest_code(vectors: Tensor, codes: Tensor, metric: str) -> Tensor:
    """See `arvision.kernels.nearest_code.nearest_code`."""
    flat = vectors.reshape(-1, vectors.shape[-1]).contiguous()
    found = torch.empty(len(flat), dtype=torch.int64, device=flat.device)
    if len(flat):
        block_d = max(16, triton.next_power_of_2(flat.shape[1]))
        block_v = 128 if block_d <= 64 else 32
        _nearest[(triton.cdiv(len(flat), 32),)](
            flat, codes.contiguous(), found, len(flat), len(codes), flat.shape[1],
            EUCLIDEAN=metric == "euclidean", BLOCK_N=32, BLOCK_V=block_v, BLOCK_D=block_d,
        )  # fmt: skip
    return found.view(vectors.shape[:-1])
