"""Tree attention inside networks of transformers, through their own registry of attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor, nn

from ..kernels.tree_attention import attend, carry, look, sight_of, spread
from ..networks import is_compiled
from .cache import KVCache

__all__ = ["all_open", "kernels_in", "layer_attention", "spread", "within"]

NAME = "arvision"
"""Of our function in transformers' registry."""

ALTERING = ("softcap", "s_aux", "sinks", "position_bias", "head_mask")
"""Arguments that change an attention beyond its mask; PyTorch's path then decides what to do."""


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
