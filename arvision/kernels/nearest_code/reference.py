"""Nearest code in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_SCORES = 1 << 26
"""Inner products held at a time."""


def nearest_code(vectors: Tensor, codes: Tensor, metric: str) -> Tensor:
    """See `arvision.kernels.nearest_code.nearest_code`."""
    offset = None if metric == "inner" else codes.square().sum(-1) / 2
    rows = max(1, MAX_SCORES // len(codes))
    flat = vectors.reshape(-1, vectors.shape[-1])
    if len(flat) <= rows:
        return _best(vectors, codes, offset)
    found = torch.cat([_best(part, codes, offset) for part in flat.split(rows)])
    return found.view(vectors.shape[:-1])


def _best(vectors: Tensor, codes: Tensor, offset: Tensor | None) -> Tensor:
    scores = vectors @ codes.T
    return (scores if offset is None else scores - offset).argmax(dim=-1)
