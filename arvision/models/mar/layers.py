"""Building blocks of the MAR transformer.

Source: Li et al., "Autoregressive Image Generation without Vector Quantization", 2024, section 4,
and the authors' published checkpoints, whose parameter names are kept.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.linear import Linear

NORM_EPS = 1e-6


class KeptKeys:
    """Keys and values of one block at all places, as they were when last computed.

    Args:
        num_slots: places; one more takes what pads short rows.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._both: tuple[Tensor, Tensor] | None = None

    def merge(self, slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v [R, H, T, d] at `slots` [R, T]; returns those of all places.

        The first call sets the number of rows; later ones may bring the first of them only.
        """
        if self._both is None:
            shape = (*k.shape[:2], self._num_slots + 1, k.shape[3])
            self._both = k.new_zeros(shape), v.new_zeros(shape)
        at = slots[:, None, :, None].expand_as(k)
        kept = [all_rows[: len(k)] for all_rows in self._both]
        for target, part in zip(kept, (k, v), strict=True):
            target.scatter_(2, at, part)
        return kept[0][:, :, : self._num_slots], kept[1][:, :, : self._num_slots]

    def values(self, num_rows: int) -> Tensor:
        """A copy of the values [R, H, S, d] of the first rows, after a first `merge`."""
        assert self._both is not None
        return self._both[1][:num_rows, :, : self._num_slots].clone()


Kept = tuple[KeptKeys, Tensor]
"""What a block keeps, and the slots [R, T] of the rows that it is given."""


class Attention(nn.Module):
    """Bidirectional self-attention."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, kept: Kept | None = None) -> Tensor:
        """Attend among [R, T, C]; `mask` [R, 1, 1, T] bool is true where a key counts.

        With `kept` the rows attend to all places; `mask` is one of places then.
        """
        rows, num, width = x.shape
        qkv = self.qkv(x).view(rows, num, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if kept is not None:
            k, v = kept[0].merge(kept[1], k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).reshape(rows, num, width))


class FeedForward(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to [..., C]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = FeedForward(width, 4 * width)

    def forward(self, x: Tensor, mask: Tensor | None = None, kept: Kept | None = None) -> Tensor:
        """[R, T, C] to [R, T, C]; see `Attention`."""
        return self.think(self.attend(x, mask, kept))

    def attend(self, x: Tensor, mask: Tensor | None = None, kept: Kept | None = None) -> Tensor:
        """The first half."""
        return x + self.attn(self.norm1(x), mask, kept)

    def think(self, x: Tensor) -> Tensor:
        """The second half."""
        return x + self.mlp(self.norm2(x))
