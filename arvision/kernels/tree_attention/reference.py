"""Tree attention in plain PyTorch, with the whole mask and all scores in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def tree_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    ancestors: Tensor,
    open_columns: Tensor | None,
    scale: float,
) -> Tensor:
    """See `arvision.kernels.tree_attention.tree_attention`."""
    num_heads = queries.shape[1]
    sees = visible(lengths, ancestors, keys.shape[2], open_columns)
    # Half precision is attended to in float32, as fused kernels accumulate.
    dtype = torch.promote_types(queries.dtype, torch.float32)
    used = sees.any(1)[:, None, :, None]
    keys = torch.where(used, keys, 0).to(dtype)
    values = torch.where(used, values, 0).to(dtype)
    grouped = queries.to(dtype).unflatten(1, (keys.shape[1], num_heads // keys.shape[1]))
    scores = grouped @ keys[:, :, None].transpose(-1, -2) * scale
    scores = scores.masked_fill(~sees[:, None, None], float("-inf"))
    return (scores.softmax(-1) @ values[:, :, None]).flatten(1, 2).to(queries.dtype)


def visible(
    lengths: Tensor, ancestors: Tensor, num_slots: int, open_columns: Tensor | None
) -> Tensor:
    """[B, T, S] bool: which slots each candidate looks at."""
    batch, num = len(lengths), ancestors.shape[-1]
    offset = torch.arange(num_slots, device=lengths.device) - lengths[:, None]
    index = offset.clamp(0, num - 1)[:, None].expand(batch, num, num_slots)
    is_candidate = ((offset >= 0) & (offset < num))[:, None]
    tree = ancestors.expand(batch, num, num).gather(2, index) & is_candidate
    committed = offset < 0
    if open_columns is not None:
        committed[:, : open_columns.shape[1]] &= open_columns
    return committed[:, None] | tree
