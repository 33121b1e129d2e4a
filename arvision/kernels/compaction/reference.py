"""Cache compaction in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def compact_(keys: Tensor, values: Tensor, lengths: Tensor, kept: Tensor, counts: Tensor) -> None:
    """See `arvision.kernels.compaction.compact_`."""
    order = torch.arange(kept.shape[1], device=kept.device)
    used = order < counts[:, None]
    # Nothing is read back: what is not kept repeats the first move of its row, or makes none.
    begin = lengths[:, None].clamp(max=keys.shape[3] - 1)
    first = torch.where(counts[:, None] > 0, kept[:, :1], 0)
    source = torch.where(used, lengths[:, None] + kept, begin + first)
    goal = torch.where(used, lengths[:, None] + order, begin)
    rows = torch.arange(len(kept), device=kept.device)[:, None]
    keys[:, rows, :, goal] = keys[:, rows, :, source]
    values[:, rows, :, goal] = values[:, rows, :, source]
