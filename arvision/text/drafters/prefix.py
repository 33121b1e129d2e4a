"""A decoder layer over a whole prefix: what heads draft from, where the last hidden state alone is too little.

Hydra++ calls it prefix attention, Clover the augmenting block, Chimera the full-context encoder. The
layer reads the target's hidden states of all known places, once each; its keys and values stay in a
cache, so that a pass costs one layer over the tokens that became final (`FeatureState`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from .features import cache_name

HEAD_WIDTH = 64
"""Of the layer's attention."""

THETA = 10_000.0
"""Base of its rotation."""


class PrefixLayer(nn.Module):
    """A Llama layer of its own, which at first passes on what it reads.

    Args:
        hidden_size: C of the target.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        width = min(HEAD_WIDTH, hidden_size + hidden_size % 2)
        heads = max(1, hidden_size // width)
        config = LlamaConfig(
            hidden_size=hidden_size,
            intermediate_size=8 * hidden_size // 3,
            num_hidden_layers=1,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=width,
            vocab_size=1,
            bos_token_id=None,
            eos_token_id=None,
        )
        config._attn_implementation = "sdpa"
        self.self_attn = LlamaAttention(config, 0)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(hidden_size)
        self.post_attention_layernorm = LlamaRMSNorm(hidden_size)
        nn.init.zeros_(self.self_attn.o_proj.weight)
        nn.init.zeros_(self.mlp.down_proj.weight)
        self.cache_sizes = heads, width, width
        self._cache = cache_name(self.self_attn)

    def forward(self, hidden: Tensor, mask: Tensor, positions: Tensor, cache: Any = None) -> Tensor:
        """What the layer makes of hidden states [B, T, C].

        Args:
            hidden: see above.
            mask: [B or 1, 1, T, S], additive.
            positions: [B, T] int64.
            cache: takes keys and values, as transformers' caches do; None for none.
        """
        rotation = _rotation(positions, self.cache_sizes[1], hidden.dtype)
        attended, _ = self.self_attn(
            self.input_layernorm(hidden),
            position_embeddings=rotation,
            attention_mask=mask,
            **{self._cache: cache},
        )
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


def _rotation(positions: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, T, width] of rotary embeddings."""
    powers = torch.arange(0, width, 2, device=positions.device) / width
    angles = positions[..., None].float() * THETA**-powers
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)
