"""Whether a network answers our passes as it answers its own: tried once, on a few tokens.

What a configuration does not tell (masks of its own making, positions counted from the cache, biases
that depend on the distance in the cache) shows in the logits: a ragged batch with a tree is compared
with plain passes of the same network over the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor

from ..errors import InputError
from .state import SLIDING, HFState

if TYPE_CHECKING:
    from .model import HFCausalLM

LENGTH, SHORT, LONG = 10, 3, 6
"""Tokens of the trial, and of the two rows' prompts."""

WINDOW = 4
"""Tokens that windowed layers see in the trial."""

_TRIED: WeakSet[Any] = WeakSet()


def check_driven(model: HFCausalLM) -> None:
    """Refuse a network whose logits in a tree of candidates are not those of a plain pass.

    Raises:
        InputError: they differ, or the network cannot take our passes at all.
    """
    network = model.network
    if network in _TRIED or network.training or model.sizes.num_positions < LENGTH:
        return
    name = type(network).__name__
    ids = (7 * torch.arange(LENGTH, device=model.device) + 3) % min(model.vocab_size, 1000)
    try:
        with _narrow(model):
            found, wanted = _ours(model, ids), _plain(network, ids)
    except InputError:
        raise
    except (
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        NotImplementedError,
    ) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{name} cannot be driven here: a pass over candidates fails: {first}"
        ) from (error)
    # Half precision rounds differently in batches; experts may then be chosen differently.
    # In double precision some networks still take softmax and rotations in single precision.
    eps = max(torch.finfo(found.dtype).eps, torch.finfo(torch.float32).eps)
    difference = (found - wanted).abs().amax(-1)
    agrees = difference <= 4 * eps**0.5 * wanted.abs().max()
    if float(agrees.double().mean()) < (0.7 if eps > 1e-4 else 1.0):
        raise InputError(
            f"{name} cannot be driven here: its logits in a tree of candidates are not those of a "
            f"plain pass (they differ by {float(difference.max()):.2g})"
        )
    _TRIED.add(network)


@contextmanager
def _narrow(model: HFCausalLM) -> Iterator[None]:
    """Within this block windows are shorter than the trial: else it could not tell whether layers
    keep to them, or whether a configuration names a window that its network never looks at."""
    whole = model.attention_window
    if SLIDING not in model.layer_kinds or whole is None:
        yield
        return
    config = model.network.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    text.sliding_window = model.attention_window = min(WINDOW, whole)
    try:
        yield
    finally:
        text.sliding_window = model.attention_window = whole


@torch.no_grad()
def _plain(network: Any, ids: Tensor) -> Tensor:
    """Logits [2 x 4, V] behind prompts and candidates of `_ours`, without a cache."""
    branch = [torch.cat([ids[: start + 1], ids[-1:]]) for start in (SHORT, LONG)]
    whole = network(input_ids=ids[None], use_cache=False).logits[0]
    rows = []
    for start, other in zip((SHORT, LONG), branch, strict=True):
        aside = network(input_ids=other[None], use_cache=False).logits[0, -1]
        rows += [whole[start - 1], whole[start], aside, whole[start + 1]]
    return torch.stack(rows)


@torch.no_grad()
def _ours(model: HFCausalLM, ids: Tensor) -> Tensor:
    """Logits behind two prompts of different lengths, and behind a root and its two children."""
    state = HFState(model, 2, LENGTH + 8)
    first = state.prefill([ids[:SHORT], ids[:LONG]])
    fed = torch.stack(
        [torch.stack([ids[start], ids[-1], ids[start + 1]]) for start in (SHORT, LONG)]
    )
    laws = state.extend(fed, torch.tensor([-1, 0, 0], device=ids.device))
    return torch.cat([first[:, None], laws], dim=1).flatten(0, 1)
