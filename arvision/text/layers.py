"""The layers of a network from outside: one user at a time, what goes into them, what is changed there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
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


@dataclass(frozen=True)
class Parts:
    """Which parts of the layers run, by the numbers of layers, ascending."""

    attention: Sequence[int]
    mlp: Sequence[int]


KINDS_OF_PARTS = {"attention": ("Attention",), "mlp": ("MLP", "Mlp", "Moe", "MoE", "FeedForward")}
"""What the class of a layer's attention or MLP has in its name."""


def part_of(layer: nn.Module, kind: str) -> nn.Module:
    """The attention or the MLP of a layer.

    Raises:
        InputError: none, or several.
    """
    found = [
        child
        for child in layer.children()
        if any(word in type(child).__name__ for word in KINDS_OF_PARTS[kind])
    ]
    if len(found) != 1:
        raise InputError(
            f"{type(layer).__name__} has {len(found)} parts that look like its {kind}: expected one, "
            "to skip it apart from the rest (LayerSkip(whole=True) skips whole layers)"
        )
    return found[0]


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within this block, calls of a module run `forward` instead."""
    own = vars(module).get("forward")  # libraries that offload weights put one there
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _nothing(*arguments: Any, **options: Any) -> Tensor:
    return torch.zeros_like(arguments[0] if arguments else options["hidden_states"])


@contextmanager
def running_only(
    network: Any,
    layers: Sequence[int] | Parts,
    exits: Mapping[int, Callable[[Tensor], bool]] | None = None,
) -> Iterator[None]:
    """Within this block, the network has these layers, or these parts of its layers, alone.

    Args:
        network: a language model of transformers.
        layers: numbers of layers, ascending, or parts.
        exits: where a pass may end, by the order of the layers that run; see `leaving`.

    Raises:
        InputError: a network without a list of layers, or whose parts cannot be told.
    """
    parts = layers if isinstance(layers, Parts) else Parts(layers, layers)
    with alone(network), ExitStack() as undone:
        owner, name = find_layers(network)
        whole = getattr(owner, name)
        some = sorted({*parts.attention, *parts.mlp})
        for index in some:
            if index not in parts.attention:
                # What attends to nothing says nothing, and tells no weights of its attention.
                attention = part_of(whole[index], "attention")
                undone.enter_context(replaced(attention, lambda *a, **o: (_nothing(*a, **o), None)))
            if index not in parts.mlp:
                undone.enter_context(replaced(part_of(whole[index], "mlp"), _nothing))
        kept = [whole[index] for index in some]
        undone.enter_context(leaving(kept, exits or {}))
        setattr(owner, name, nn.ModuleList(kept))
        try:
            yield
        finally:
            setattr(owner, name, whole)


@contextmanager
def leaving(
    layers: Sequence[nn.Module], exits: Mapping[int, Callable[[Tensor], bool]]
) -> Iterator[None]:
    """Within this block, a pass goes through no further layer once the function of one said so.

    Args:
        layers: that run, in order.
        exits: numbers in `layers` from 1 on, and what is asked about the input [B, T, C] of each: true
            to leave here.
    """
    has_left, is_tuple = False, False

    def gate(layer: nn.Module, number: int) -> Callable[..., Any]:
        inner = layer.forward

        def forward(*arguments: Any, **options: Any) -> Any:
            nonlocal has_left, is_tuple
            hidden = arguments[0] if arguments else options["hidden_states"]
            if number == 0:
                has_left = False
            elif number in exits and not has_left:
                has_left = exits[number](hidden)
            if has_left:
                return (hidden,) if is_tuple else hidden
            out = inner(*arguments, **options)
            is_tuple = isinstance(out, tuple)
            return out

        return forward

    with ExitStack() as undone:
        for number, layer in enumerate(layers if exits else ()):
            undone.enter_context(replaced(layer, gate(layer, number)))
        yield


def final_norm(network: Any) -> nn.Module:
    """What a network does to its last layer's output before the output layer.

    Raises:
        InputError: it does not have one such module beside its layers.
    """
    with alone(network):  # another thread may have taken layers out
        owner, _ = find_layers(network)
    found = [child for child in owner.children() if "Norm" in type(child).__name__]
    if len(found) != 1:
        raise InputError(
            f"{type(network).__name__} has {len(found)} norms beside its layers: expected one, to "
            "read its laws behind earlier ones"
        )
    return found[0]
