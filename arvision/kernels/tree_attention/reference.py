"""Tree attention in plain PyTorch: `scaled_dot_product_attention` under the whole mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
    sees = visible(lengths, ancestors, keys.shape[2], open_columns)
    # A weight of zero does not remove a NaN.
    used = sees.any(1)[:, None, :, None]
    return F.scaled_dot_product_attention(
        queries,
        torch.where(used, keys, 0),
        torch.where(used, values, 0),
        attn_mask=sees[:, None],
        scale=scale,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )


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
