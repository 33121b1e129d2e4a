"""Networks of transformers: what they are, where they lie, and how their image logits are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InputError
from ...networks import bare, hooks_of, place_of

MASKED_ATTENTION = ("sdpa", "eager")
"""Kinds of attention that take a mask of ours."""


def base_of(network: Any) -> Any:
    """The network itself, without wrappers of `torch.compile` and peft around it.

    Raises:
        InputError: an adapter that works on prompts and not inside the layers.
    """
    network = bare(network)
    if not hasattr(network, "get_base_model"):
        return network
    for name, config in network.peft_config.items():
        if getattr(config, "is_prompt_learning", False):
            raise InputError(
                f"adapter {name!r} ({type(config).__name__}) changes prompts: expected one that "
                "changes layers, such as LoRA"
            )
    return network.get_base_model()


def check_class(network: Any, expected: str, family: str) -> None:
    """Refuse a network of another class.

    Raises:
        InputError: see above.
    """
    if expected not in {cls.__name__ for cls in type(network).__mro__}:
        raise InputError(f"{type(network).__name__}: {family} drives a {expected} of transformers")


def device_of(network: Any) -> torch.device:
    """Where a network runs; offloaded weights lie elsewhere between calls.

    Raises:
        InputError: a network that is spread over several devices.
    """
    spread = getattr(network, "hf_device_map", None) or {}
    used = sorted({str(place) for place in spread.values()} - {"cpu", "disk"})
    if len(used) > 1:
        raise InputError(
            f"{type(network).__name__} is spread over {', '.join(used)}: expected one device"
        )
    if any(hooks_of(module) for module in network.modules()):
        return place_of(network)
    weights = {str(p.device) for p in network.parameters() if p.device.type != "meta"}
    if len(weights) > 1:
        raise InputError(
            f"{type(network).__name__} has weights on {', '.join(sorted(weights))}: expected one "
            "device"
        )
    return place_of(network)


def wake(network: Any) -> None:
    """Let a hook of accelerate bring an offloaded network to its device, as a call would."""
    hook = getattr(network, "_hf_hook", None)
    if hook is not None and not hasattr(hook, "execution_device_map"):
        hook.pre_forward(network)


def take_masks(network: Any) -> None:
    """Switch attention that takes no masks (flash, flex) to one that does."""
    if network.config.get_text_config()._attn_implementation not in MASKED_ATTENTION:
        network.set_attn_implementation("sdpa")


class CodeColumns:
    """The columns of an output layer that belong to image codes.

    Args:
        ids: [V] the id of each code.

    Raises:
        InputError: no codes.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        if not ids:
            raise InputError("the network's vocabulary holds no image codes")
        self.ids = torch.tensor(ids)
        self._first, num = int(self.ids[0]), len(ids)
        self._is_run = self.ids.tolist() == list(range(self._first, self._first + num))

    def ids_of(self, codes: Tensor) -> Tensor:
        """Ids of codes, any shape."""
        if self._is_run:
            return codes + self._first if self._first else codes
        if self.ids.device != codes.device:
            self.ids = self.ids.to(codes.device)
        return self.ids[codes]

    def logits(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., C]."""
        if self._is_run and self._is_plain(layer):
            # A view of the rows: the rest of a large vocabulary costs nothing.
            rows = slice(self._first, self._first + len(self.ids))
            bias = None if layer.bias is None else layer.bias[rows]  # pyright: ignore
            return F.linear(hidden, layer.weight[rows], bias)  # pyright: ignore
        every = layer(hidden)
        if self._is_run:
            return every[..., self._first : self._first + len(self.ids)]
        return every.index_select(-1, self.ids.to(every.device))

    @staticmethod
    def _is_plain(layer: nn.Module) -> bool:
        """Whether a call is the product with the weight and nothing else (a LoRA, a hook)."""
        return (
            type(layer) is nn.Linear
            and type(layer.weight) is nn.Parameter
            and not hasattr(layer, "_hf_hook")
            and not layer._forward_hooks
            and not layer._forward_pre_hooks
        )


class SpecialIds:
    """Ids with a meaning, by our names.

    Args:
        family: for messages.
        known: names that the family uses, to where each was found (None for nowhere).
        given: the caller's own.

    Raises:
        InputError: a name that the family does not use, or an id that is no id.
    """

    def __init__(
        self, family: str, known: Mapping[str, int | None], given: Mapping[str, int] | None
    ) -> None:
        from ...errors import unknown_name

        for name, value in (given or {}).items():
            if name not in known:
                raise unknown_name(f"special id of {family}:", name, known)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InputError(f"ids[{name!r}] {value!r}: expected an id >= 0")
        self._family, self._ids = family, {**known, **(given or {})}

    def find(self, name: str) -> int | None:
        """The id, None where nobody knows it."""
        return self._ids[name]

    def __getitem__(self, name: str) -> int:
        """The id.

        Raises:
            InputError: nobody knows it.
        """
        found = self._ids[name]
        if found is None:
            raise InputError(
                f"{self._family}: neither the configuration nor a processor tells the id of "
                f"{name!r}, expected ids={{{name!r}: ...}}"
            )
        return found
