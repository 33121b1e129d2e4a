"""Networks as people hand them over: compiled by `torch.compile`, or offloaded to another device.

Both act when a module is called, that is on its `forward` and on nothing else. So all work of a
network goes through a call of it: `entry` and `hot_entry` mark the methods that do work, and `enter`
runs one of them, of a compiled wrapper too. Questions of identity are asked of `bare(network)`.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def bare(network: Any) -> Any:
    """The network that `torch.compile` wrapped; anything else as it is."""
    while hasattr(network, "_orig_mod"):
        network = network._orig_mod
    return network


def is_compiled(network: Any) -> bool:
    """Whether a call of the network runs compiled: a wrapper, or a network compiled in place."""
    return bare(network) is not network or _compiled_in_place(network) is not None


def compiled_like(network: Any, part: Any) -> Any:
    """A part of a network, compiled as the network around it is; the part itself where none is.

    That is by a wrapper, or in place: the network itself or anything in it that holds the part, the
    innermost first. A part that is compiled in place runs compiled by itself.
    """
    if _compiled_in_place(part) is not None:
        return part
    plain = bare(network)
    around = [one for one in plain.modules() if _compiled_in_place(one) is not None]
    around = [one for one in around if any(inner is part for inner in one.modules())]
    if not around:
        return part if plain is network else network.dynamo_ctx(part)
    # What was handed to `compile` is known to nobody but the function that it made.
    made = _compiled_in_place(around[-1])
    context = inspect.getclosurevars(made).nonlocals.get("self")
    if context is None:
        name = type(part).__name__
        warnings.warn(
            f"{type(around[-1]).__name__} is compiled in place, which does not reach the {name} that "
            f"draws: use torch.compile(network), compile the {name}, or pipe.compile(mode=...)",
            stacklevel=2,
        )
        return part
    return context(part)


def _compiled_in_place(module: Any) -> Any:
    """What `module.compile` made; None where it was not called."""
    return getattr(module, "_compiled_call_impl", None)


class CallsNetwork:
    """The part of a model that holds a network, which may be replaced by a compiled one.

    Attributes:
        called: what passes call: the network, or `torch.compile`'s wrapper of it.
    """

    called: Any

    @property
    def network(self) -> Any:
        """The network itself."""
        return bare(self.called)

    @network.setter
    def network(self, network: Any) -> None:
        self.called = network


def place_of(network: nn.Module) -> torch.device:
    """Where a network runs; what is offloaded waits elsewhere between calls.

    Hooks of accelerate tell it (model and sequential offloading, `device_map`), or the group
    offloading of diffusers; else it is where the weights lie.
    """
    network = bare(network)
    for module in network.modules():
        for hook in hooks_of(module):
            place = getattr(hook, "execution_device", None)
            if place is not None:
                return torch.device(place)
        if (registry := getattr(module, "_diffusers_hook", None)) is not None:
            hook = registry.get_hook("group_offloading")
            if hook is not None:
                return torch.device(hook.group.onload_device)
    return next(network.parameters()).device


def hooks_of(module: nn.Module) -> list[Any]:
    """The hooks of accelerate on a module."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def weight_of(layer: Any) -> torch.Tensor:
    """The weight of a layer, to keep: brought where it runs, if it waits elsewhere between calls."""
    if not hooks_of(layer):
        return layer.weight.detach()
    from accelerate.utils.modeling import align_module_device

    with align_module_device(layer):
        return layer.weight.detach()


class Entered(nn.Module):
    """A module whose call can mean more than one thing; to be listed before other bases.

    `module(*arguments)` is its `forward`, `module(*arguments, entry="decode")` the method `decode`.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = vars(cls).get("forward") or getattr(cls.forward, "__wrapped__", cls.forward)
        cls.forward = _with_entries(own, cls.__qualname__)

    def forward(self, *arguments: Any) -> Any:
        """Nothing by default: there are entries alone."""
        raise NotImplementedError(f"{type(self).__name__} is called with entry=<name> alone")


def _with_entries(own: Callable[..., Any], owner: str) -> Callable[..., Any]:
    @functools.wraps(own)
    def forward(self: Any, *arguments: Any, entry: str | None = None, **options: Any) -> Any:
        if entry is None:
            return own(self, *arguments, **options)
        return getattr(type(self), entry).inner(self, *arguments, **options)

    # torch.compile keeps graphs, and limits their number, by the code that they begin with: each
    # class has its own.
    named: Any = forward
    named.__code__ = named.__code__.replace(co_name=f"{owner}.forward")
    return forward


def entry(method: Callable[..., Any]) -> Any:
    """Mark a method of an `Entered` module: it runs as a call of the module, with all its hooks.

    It does not run compiled, which suits what is done once per draw; see `hot_entry`. An entry may
    call entries of its submodules, but none of its own module: hooks that take weights away behind
    a call would do so behind the inner one.
    """
    name = method.__name__

    @functools.wraps(method)
    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        return enter(self, name, *arguments, **options)

    marked: Any = call
    marked.inner, marked.is_hot = method, False
    return marked


def hot_entry(method: Callable[..., Any]) -> Any:
    """As `entry`, and compiled where the module is."""
    marked = entry(method)
    marked.is_hot = True
    return marked


def enter(network: Any, name: str, *arguments: Any, **options: Any) -> Any:
    """Run the entry `name` of a network, which may be a compiled one."""
    plain = bare(network)
    if torch.compiler.is_compiling() or getattr(type(plain), name).is_hot:
        return network(*arguments, entry=name, **options)
    # What `plain(...)` does, without the graph of a network that was compiled in place.
    return plain._call_impl(*arguments, entry=name, **options)


class Table(Entered, nn.Embedding):
    """An embedding whose rows are also wanted all at once."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Rows [..., D] of indices [...]."""
        return nn.Embedding.forward(self, input)

    @entry
    def whole(self) -> torch.Tensor:
        """All rows [V, D]: a view, that stays good when the weight is moved away."""
        return self.weight.view_as(self.weight)
