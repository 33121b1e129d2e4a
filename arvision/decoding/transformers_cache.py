"""What networks of transformers see of our cache, and the sizes that it takes from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from ..errors import InputError
from .cache import KVCache


@dataclass(frozen=True)
class TextSizes:
    """Sizes of a language model that its cache and its drafters need.

    Attributes:
        head_dim: of the keys; `value_dim` of the values. Latent attention (DeepSeek) caches one
            latent per position for keys and one for rotations for values.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    hidden_size: int
    num_positions: int

    @classmethod
    def of(cls, network: Any) -> TextSizes:
        """Read from the configuration of a network."""
        config = network.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        heads = text.num_attention_heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        # Falcon's newer layers write their few heads down once for each query head.
        if getattr(text, "multi_query", False) and not getattr(
            text, "new_decoder_architecture", False
        ):
            kv_heads = 1
        head_dim = value_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        if getattr(text, "kv_lora_rank", None):
            kv_heads, head_dim, value_dim = 1, text.kv_lora_rank, text.qk_rope_head_dim
        return cls(
            num_layers=text.num_hidden_layers,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            hidden_size=text.hidden_size,
            num_positions=getattr(text, "max_position_embeddings", None) or 1 << 20,
        )


class CacheView(Cache):
    """A `KVCache` as the attention layers of transformers use one."""

    def __init__(self, inner: KVCache) -> None:
        super().__init__(layers=[])
        self._inner = inner

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the candidates' keys and values; everything visible to them.

        Raises:
            InputError: a layer whose heads are not those of the cache.
        """
        keys, values = self._inner.keys, self._inner.values
        expected = (keys.shape[2], keys.shape[4], values.shape[4])
        given = (key_states.shape[1], key_states.shape[3], value_states.shape[3])
        if given != expected:
            raise InputError(
                f"layer {layer_idx} caches {given[0]} heads of width {given[1]} (values "
                f"{given[2]}): expected {expected[0]} of width {expected[1]} (values "
                f"{expected[2]}), the same in every layer"
            )
        return self._inner.update(layer_idx, key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Committed positions of the longest row."""
        return max(self._inner.host_lengths)
