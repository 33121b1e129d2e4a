"""Cache compaction in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def compact_(keys: Tensor, values: Tensor, lengths: Tensor, kept: Tensor, counts: Tensor) -> None:
    """See `arvision.kernels.compaction.compact_`."""
    used = torch.arange(kept.shape[1], device=kept.device) < counts[:, None]
    rows, places = used.nonzero(as_tuple=True)
    source = lengths[rows] + kept[rows, places]
    goal = lengths[rows] + places
    keys[:, rows, :, goal] = keys[:, rows, :, source]
    values[:, rows, :, goal] = values[:, rows, :, source]
