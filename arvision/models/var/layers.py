"""Building blocks of the VAR transformer, with the parameter names of the release.

Source: Tian et al., "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale
Prediction", 2024, section 3.3 and appendix, and the authors' published checkpoints.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...decoding.scale_state import Compute, ScaleCache, compute_all
from ...kernels.linear import Linear
from ...networks import Entered, entry
from ..adaptive import MAX_LOG_SCALE, FeedForward, modulated_norm, projection


class Attention(nn.Module):
    """Self-attention; queries and keys of unit length times a learnt scale per head, or plain.

    Args:
        width: C.
        num_heads: H.
        l2_norm: whether queries and keys are normalised; plain attention scales its products by a
            quarter of the usual 1/sqrt(D), as published.
    """

    def __init__(self, width: int, num_heads: int, l2_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.mat_qkv = Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        if l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4.0)))
        self.l2_norm = l2_norm
        self.scale = 1.0 if l2_norm else 0.25 / (width // num_heads) ** 0.5
        self.proj = Linear(width, width)

    def forward(
        self, x: Tensor, layer: int, mask: Tensor | None, cache: ScaleCache | None
    ) -> Tensor:
        """Attend.

        Args:
            x: [R, T, C].
            layer: index of this layer in the cache.
            mask: [T, S] bool, true where a query may look; None for everything.
            cache: takes the new keys and values and gives all so far.
        """
        rows, num, width = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = self.mat_qkv(x)
        qkv = qkv + bias.to(qkv.dtype)
        q, k, v = qkv.view(rows, num, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.l2_norm:
            length = self.scale_mul_1H11.clamp(max=MAX_LOG_SCALE).exp()
            q, k = F.normalize(q, dim=-1) * length, F.normalize(k, dim=-1)
            q, k = q.to(v.dtype), k.to(v.dtype)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return self.proj(out.transpose(1, 2).reshape(rows, num, width))


class Block(Entered):
    """A transformer block whose normalisations take scale, shift and gate from the condition.

    Args:
        width: C.
        num_heads: H.
        shared_aln: whether the projection of the condition is shared by all blocks, each adding a
            table of its own, instead of one projection per block.
        l2_norm: see `Attention`.
        eps: of the normalisation.
    """

    def __init__(
        self, width: int, num_heads: int, shared_aln: bool, l2_norm: bool, eps: float
    ) -> None:
        super().__init__()
        self.eps = eps
        self.is_shared = shared_aln
        self.attn = Attention(width, num_heads, l2_norm)
        self.ffn = FeedForward(width, 4 * width)
        if shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)
        else:
            self.ada_lin = projection(width, 6)

    def shrink_gates(self) -> None:
        """For training from scratch: gates start almost closed, scales and shifts small."""
        width = self.attn.mat_qkv.in_features
        table = self.ada_gss[0, 0] if self.is_shared else self.ada_lin[1].weight.view(6, width, -1)
        table[:2].mul_(1e-5)
        table[2:].mul_(0.5)

    @entry
    def modulation(self, condition: Tensor) -> Tensor:
        """Gates, scales and shifts [R, 1, 6, C] of the condition.

        Args:
            condition: [R, C], or the shared projection [R, 1, 6, C] of a shared-AdaLN model.
        """
        if self.is_shared:
            return self.ada_gss + condition
        return self.ada_lin(condition).view(len(condition), 1, 6, -1)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        layer: int,
        mask: Tensor | None,
        cache: ScaleCache | None,
        compute: Compute = compute_all,
    ) -> Tensor:
        """[R, T, C] to [R, T, C].

        Args:
            x: [R, T, C].
            modulation: [R, 1, 6, C].
            layer: see `Attention`, and so mask and cache.
            mask: see `Attention`.
            cache: see `Attention`.
            compute: runs each part, on all rows or some.
        """
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.unbind(2)

        def attend(rows: Tensor, places: Tensor | None) -> Tensor:
            h = modulated_norm(rows, scale1, shift1, self.eps)
            return gate1 * self.attn(h, layer, mask, cache)

        def think(rows: Tensor, places: Tensor | None) -> Tensor:
            return gate2 * self.ffn(modulated_norm(rows, scale2, shift2, self.eps))

        x = x + compute((layer, "attend"), x, attend)
        return x + compute((layer, "think"), x, think)
