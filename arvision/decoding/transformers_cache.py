"""What networks of transformers see of our cache and of its kernel, and the sizes that it takes from them.

The kernel of tree attention comes into their layers through their own registry of attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..errors import InputError
from ..kernels.tree_attention import attend, carry, look, sight_of, spread
from ..networks import is_compiled
from .cache import KVCache

__all__ = [
    "CacheView",
    "TextSizes",
    "all_open",
    "kernels_in",
    "layer_attention",
    "spread",
    "within",
]

NAME = "arvision"
"""Of our function in transformers' registry."""

ALTERING = ("softcap", "s_aux", "sinks", "position_bias", "head_mask")
"""Arguments that change an attention beyond its mask; PyTorch's path then decides what to do."""


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


def all_open(cache: KVCache) -> Tensor:
    """The mask [1, 1, 1, S] of one candidate of rows of one length, which looks at everything.

    Without a mask some networks would make one of their own.
    """
    mask = cache.keys.new_zeros(1, 1, 1, cache.host_lengths[0] + 1)
    return carry(mask, look(cache.keys, cache.lengths, None, 1))


def within(near: Tensor, mask: Tensor, window: int, positions: Tensor) -> Tensor:
    """`near`, the mask of layers with a window, which then leads to the kernel where `mask` does.

    Args:
        near: made of `mask`.
        mask: of layers that look at everything.
        window: how many positions they look at, their own included.
        positions: [R or 1, T], of the candidates.
    """
    sight = sight_of(mask)
    return carry(near, None if sight is None else sight.within(window, positions))


@contextmanager
def kernels_in(network: Any, called: Any, mask: Any) -> Iterator[None]:
    """Within this block layers of a network that call PyTorch's attention go through `attend`.

    Nothing is changed where the mask tells of no kernel (on a CPU), in compiled networks, and in
    networks with another kind of attention. Passes of one network must not overlap, see
    `arvision.text.layers.alone`.

    Args:
        network: of transformers.
        called: what passes call: the network or a part of it, or `torch.compile`'s wrapper.
        mask: that the pass is given.
    """
    if sight_of(mask) is None or is_compiled(called):
        yield
        return
    config = network.config.get_text_config()
    if config._attn_implementation != "sdpa":
        yield
        return
    register()
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


@cache
def register() -> None:
    """Make our function known to transformers, once."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, layer_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


def layer_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """One layer's attention, as transformers calls it: [B, T, Hq, D]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    is_plain = not dropout and all(more.get(name) is None for name in ALTERING)
    sight = sight_of(attention_mask)
    if is_plain and sight is not None and sight.fits(query, key, value):
        out = attend(query, key, value, attention_mask, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
    )
