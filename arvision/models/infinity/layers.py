"""Building blocks of the Infinity transformer, with the parameter names of the release.

Source: Han et al., "Infinity: Scaling Bitwise AutoRegressive Modeling for High-Resolution Image
Synthesis", 2024, section 3, and the authors' published checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...decoding.scale_state import Compute, ScaleCache
from ...kernels.linear import Linear
from ..adaptive import MAX_LOG_SCALE, FeedForward, modulated_norm


@dataclass
class Text:
    """What a block needs to know of the captions.

    Attributes:
        rows: [R, T, C], right-padded.
        mask: [R, 1, 1, T] bool, true where there is text; None for everywhere.
    """

    rows: Tensor
    mask: Tensor | None


def heads_first(x: Tensor, num_heads: int) -> Tensor:
    """[R, T, H * D] to [R, H, T, D]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (2i, 2i + 1) of heads [R, H, T, D] by angles [T, D/2] or [R, T, D/2]."""
    angles = angles if angles.dim() == 2 else angles[:, None]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class SelfAttention(nn.Module):
    """Attention with queries and keys of unit length, a learnt scale per head, and rotary positions.

    Args:
        width: C.
        num_heads: H.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.mat_qkv = Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4.0)))
        self.proj = Linear(width, width)

    def forward(
        self, x: Tensor, angles: Tensor, layer: int, mask: Tensor | None, cache: ScaleCache | None
    ) -> Tensor:
        """Attend.

        Args:
            x: [R, T, C].
            angles: [T, D/2] or [R, T, D/2], see `rotate`.
            layer: index of this layer in the cache.
            mask: [T, S] bool, true where a query may look; None for everything.
            cache: takes the new keys and values and gives all so far.
        """
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = self.mat_qkv(x)
        q, k, v = (
            heads_first(part, self.num_heads) for part in (qkv + bias.to(qkv.dtype)).chunk(3, -1)
        )
        length = self.scale_mul_1H11.clamp(max=MAX_LOG_SCALE).exp()
        q, k = F.normalize(q, dim=-1) * length, F.normalize(k, dim=-1)
        q, k = rotate(q, angles).to(v.dtype), rotate(k, angles).to(v.dtype)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        return self.proj(out.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of image tokens to the text.

    Args:
        width: C.
        num_heads: H.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.mat_q = Linear(width, width)
        self.mat_kv = Linear(width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, text: Text) -> Tensor:
        """[R, T, C] to [R, T, C]."""
        keys, values = self.mat_kv(text.rows).chunk(2, dim=-1)
        q, k, v = (
            heads_first(part, self.num_heads)
            for part in (self.mat_q(x), keys, values + self.v_bias.to(values.dtype))
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=text.mask)
        return self.proj(out.transpose(1, 2).flatten(2))


class TextPool(nn.Module):
    """Text features to one vector: a learnt query per head looks at all words.

    Args:
        text_width: of the features.
        width: C.
        num_heads: of the pooling, which has more heads than the blocks.
    """

    def __init__(self, text_width: int, width: int, num_heads: int) -> None:
        super().__init__()
        self.mat_q = nn.Parameter(torch.empty(1, num_heads, width // num_heads))
        self.mat_kv = Linear(text_width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = Linear(width, width)

    def forward(self, text: Text) -> Tensor:
        """Normalised features to [R, C]."""
        keys, values = self.mat_kv(text.rows).chunk(2, dim=-1)
        num_heads = self.mat_q.shape[1]
        k, v = (
            heads_first(part, num_heads) for part in (keys, values + self.v_bias.to(values.dtype))
        )
        q = self.mat_q.to(k.dtype)[:, :, None].expand(len(k), -1, -1, -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=text.mask)
        return self.proj(out.flatten(1))


class TextPoolHolder(nn.Module):
    """Keeps the pooling under the name `ca`, as published."""

    def __init__(self, text_width: int, width: int, num_heads: int) -> None:
        super().__init__()
        self.ca = TextPool(text_width, width, num_heads)

    def forward(self, text: Text) -> Tensor:
        """Normalised features to [R, C]."""
        return self.ca(text)


class TextNorm(nn.Module):
    """Root-mean-square normalisation of text features, in float32 or wider."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to the same."""
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return (normed * self.weight).to(self.weight.dtype)


class Block(nn.Module):
    """Self-attention, attention to the text, feed-forward.

    Scale, shift and gate of the first and the last come from the text as a whole; each block adds a
    table of its own.

    Args:
        width: C.
        num_heads: H.
        hidden: width of the feed-forward.
        eps: of the normalisations.
    """

    def __init__(self, width: int, num_heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.sa = SelfAttention(width, num_heads)
        self.ca = CrossAttention(width, num_heads)
        self.ca_norm = nn.LayerNorm(width, eps=eps)
        self.ffn = FeedForward(width, hidden)
        self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)

    def shrink_gates(self) -> None:
        """For training from scratch: gates start almost closed, scales and shifts small."""
        self.ada_gss[0, 0, :2].mul_(1e-5)
        self.ada_gss[0, 0, 2:].mul_(0.5)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text: Text,
        angles: Tensor,
        layer: int,
        mask: Tensor | None,
        cache: ScaleCache | None,
        compute: Compute,
    ) -> Tensor:
        """[R, T, C] to [R, T, C].

        Args:
            x: [R, T, C].
            modulation: [R, 1, 6, C], what all blocks share.
            text: keys and values of the second attention.
            angles: [T, D/2].
            layer: index of the block.
            mask: see `SelfAttention`.
            cache: see `SelfAttention`.
            compute: runs each part, on all rows or some.
        """
        gate1, gate2, scale1, scale2, shift1, shift2 = (self.ada_gss + modulation).unbind(2)

        def attend(rows: Tensor, places: Tensor | None) -> Tensor:
            turned = angles if places is None else angles[places]
            h = modulated_norm(rows, scale1, shift1, self.eps)
            return gate1 * self.sa(h, turned, layer, mask, cache)

        def read(rows: Tensor, places: Tensor | None) -> Tensor:
            return self.ca(self.ca_norm(rows), text)

        def think(rows: Tensor, places: Tensor | None) -> Tensor:
            return gate2 * self.ffn(modulated_norm(rows, scale2, shift2, self.eps))

        for name, part in (("attend", attend), ("read", read), ("think", think)):
            x = x + compute((layer, name), x, part)
        return x
