"""The layers of a network from outside: one user at a time, what goes into them, what is changed there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..contracts import Edit
from ..decoding.transformers_cache import TextSizes
from ..errors import InputError

_BUSY: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_MAKING = threading.Lock()


def alone(network: Any) -> AbstractContextManager[Any]:
    """A lock of a network, held during a pass: what a pass hangs into it or takes out of it would
    also be in the passes of other threads.
    """
    with _MAKING:
        return _BUSY.setdefault(network, threading.RLock())


def find_layers(network: Any) -> tuple[nn.Module, str]:
    """The module that owns the list of a network's layers, and the list's name.

    Raises:
        InputError: no such list.
    """
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == TextSizes.of(network).num_layers:
                return module, name
    raise InputError(
        f"{type(network).__name__} has no list of its layers: expected one torch.nn.ModuleList of "
        "all of them, to skip some or to edit what they see"
    )


@contextmanager
def watching(network: Any, layers: Sequence[int], seen: dict[int, Tensor]) -> Iterator[None]:
    """Within this block, what goes into each of `layers` [B, T, C] is put into `seen`.

    Args:
        network: a language model of transformers.
        layers: numbers of layers; that of all layers together is the output layer.
        seen: filled by passes.

    Raises:
        InputError: a network without a list of layers.
    """

    def keep(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            seen[layer] = arguments[0] if arguments else options["hidden_states"]

        return hook

    def last(_: nn.Module, __: Any, out: Any) -> None:
        # Not the output layer's own input, which passes may cut down to the places that are asked.
        seen[len(stack)] = out[0]

    owner, name = find_layers(network)
    stack = getattr(owner, name)
    handles = [
        network.get_decoder().register_forward_hook(last)
        if layer == len(stack)
        else stack[layer].register_forward_pre_hook(keep(layer), with_kwargs=True)
        for layer in set(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def edited(network: Any, edit: Edit) -> Iterator[None]:
    """Within this block, layers see what the functions of `edit` make of their inputs [B, T, C].

    Raises:
        InputError: a network without a list of layers.
    """

    def changing(function: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
            if arguments:
                return (function(arguments[0]), *arguments[1:]), options
            return arguments, {**options, "hidden_states": function(options["hidden_states"])}

        return hook

    with alone(network):
        owner, name = find_layers(network)
        stack = getattr(owner, name)
        handles = [
            stack[layer].register_forward_pre_hook(changing(function), with_kwargs=True)
            for layer, function in edit.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
