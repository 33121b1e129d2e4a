"""Building blocks of the LlamaGen transformer.

Source: Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation",
2024, section 2.3, and the authors' published checkpoints, whose parameter names are kept.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.linear import Linear


class AttentionCache(Protocol):
    """Where an attention layer puts its keys and values, and what it may look at."""

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store [R, H, T, D] and return everything visible, [R, H, S, D]."""
        ...


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, computed in float32 (or wider) and scaled after the cast."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of `x`."""
        if x.dtype in (torch.float32, torch.float64):
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        return F.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(x.dtype) * self.weight


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = Linear(width, hidden, bias=False)
        self.w3 = Linear(width, hidden, bias=False)
        self.w2 = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to [..., C]."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Attention(nn.Module):
    """Self-attention with rotary positions and, where a checkpoint has it, grouped queries."""

    def __init__(self, width: int, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = width // num_heads
        self.wqkv = Linear(width, (num_heads + 2 * num_kv_heads) * self.head_dim, bias=False)
        self.wo = Linear(width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        rotary: Tensor,
        layer: int,
        mask: Tensor | None = None,
        is_causal: bool = False,
        cache: AttentionCache | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: [R, T, C].
            rotary: [T, D/2, 2] or [R, T, D/2, 2], (cos, sin) of each position.
            layer: index of this layer in the cache.
            mask: [R or 1, 1, T, S] bool, true where a query may look; None for everything.
            is_causal: a causal mask over the T positions, without a cache.
            cache: takes the new keys and values and gives all visible ones.
        """
        rows, num, _ = x.shape
        heads, groups, dim = self.num_heads, self.num_kv_heads, self.head_dim
        qk, v = self.wqkv(x).split([(heads + groups) * dim, groups * dim], dim=-1)
        qk = apply_rotary(qk.view(rows, num, heads + groups, dim), rotary).transpose(1, 2)
        q, k = qk.split([heads, groups], dim=1)
        v = v.view(rows, num, groups, dim).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        if groups == heads:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        else:
            out = _grouped_attention(q, k, v, mask, is_causal)
        return self.wo(out.transpose(1, 2).reshape(rows, num, heads * dim))


def _grouped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool
) -> Tensor:
    """Attention of [R, H, T, D] queries to [R, G, S, D] keys, G < H, without repeating the keys.

    The H/G queries that share a key head become further query positions of that head.
    """
    rows, heads, num, dim = q.shape
    groups = k.shape[1]
    if is_causal:
        mask = torch.ones(num, k.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]
    if mask is not None:
        mask = mask.repeat(1, 1, heads // groups, 1)
    q = q.reshape(rows, groups, heads // groups * num, dim)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.reshape(rows, heads, num, dim)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(
        self, width: int, num_heads: int, num_kv_heads: int, hidden: int, eps: float
    ) -> None:
        super().__init__()
        self.attention = Attention(width, num_heads, num_kv_heads)
        self.feed_forward = FeedForward(width, hidden)
        self.attention_norm = RMSNorm(width, eps)
        self.ffn_norm = RMSNorm(width, eps)

    def forward(self, x: Tensor, rotary: Tensor, layer: int, **attend) -> Tensor:
        """[R, T, C] to [R, T, C]; `attend` as in `Attention.forward`."""
        x = x + self.attention(self.attention_norm(x), rotary, layer, **attend)
        return x + self.feed_forward(self.ffn_norm(x))


class ClassEmbedding(nn.Module):
    """Class ids [R] to one conditioning row [R, 1, C]; id `num_classes` is the null class."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, class_ids: Tensor) -> Tensor:
        """Look the classes up."""
        return self.embedding_table(class_ids).unsqueeze(1)


class CaptionEmbedding(nn.Module):
    """Caption features [R, L, caption_dim] to conditioning rows [R, L, C].

    The learnt null caption `uncond_embedding` [L, caption_dim] stands before the projection.
    """

    def __init__(self, caption_dim: int, width: int, caption_length: int) -> None:
        super().__init__()
        self.cap_proj = CaptionProjection(caption_dim, width)
        self.register_buffer(
            "uncond_embedding", torch.randn(caption_length, caption_dim) / caption_dim**0.5
        )

    def forward(self, features: Tensor) -> Tensor:
        """Project the features."""
        return self.cap_proj(features)


class CaptionProjection(nn.Module):
    """Two linear layers with a tanh-GELU between them."""

    def __init__(self, caption_dim: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(caption_dim, width, bias=False)
        self.fc2 = nn.Linear(width, width, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """[..., caption_dim] to [..., C]."""
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))


def rotary_table(
    grid: tuple[int, int], head_dim: int, num_conditions: int, theta: float = 10000.0
) -> Tensor:
    """(cos, sin) of every position of a sequence, [num_conditions + H * W, head_dim / 2, 2] float64.

    The first half of the rotated pairs turns with the row of an image token, the second half with
    its column. Conditioning rows are all zero: that sets their queries and keys to zero, as the
    published models expect (not the identity rotation).
    """
    height, width = grid
    half = head_dim // 2
    frequencies = theta ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
    rows = torch.arange(height, dtype=torch.float64)[:, None] * frequencies
    columns = torch.arange(width, dtype=torch.float64)[:, None] * frequencies
    angles = torch.cat(
        [
            rows[:, None].expand(height, width, -1),
            columns[None].expand(height, width, -1),
        ],
        dim=-1,
    ).reshape(height * width, half)
    image = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([image.new_zeros(num_conditions, half, 2), image])


def apply_rotary(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate adjacent pairs of [R, T, H, D] by (cos, sin) [T, D/2, 2] or [R, T, D/2, 2]."""
    pairs = torch.view_as_complex(x.to(rotary.dtype).unflatten(-1, (-1, 2)))
    turned = pairs * torch.view_as_complex(rotary).unsqueeze(-2)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)
