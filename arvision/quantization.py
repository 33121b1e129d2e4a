"""Weights of fewer bits: what a pass reads shrinks, its arithmetic stays in the network's dtype.

A sampler that is exact stays exact with respect to the quantised model, whose law is another than that of
the original; `benchmarks.quantize` measures how far.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from .errors import InputError, optional, unknown_name

LARGEST_GROUP = 128
"""Weights that share a scale in int4, at most; a divisor of the layer's width."""


def _int8(config: Any, width: int) -> Any:
    return config.Int8WeightOnlyConfig()


def _int4(config: Any, width: int) -> Any:
    from torchao.quantization import PerGroup  # pyright: ignore[reportMissingImports]

    group = max(size for size in range(1, LARGEST_GROUP + 1) if width % size == 0)
    return config.IntxWeightOnlyConfig(
        weight_dtype=cast(Any, torch).int4, granularity=PerGroup(group)
    )


def _fp8(config: Any, width: int) -> Any:
    return config.Float8WeightOnlyConfig()


QUANTIZATIONS: dict[str, Callable[[Any, int], Any]] = {"int8": _int8, "int4": _int4, "fp8": _fp8}
"""Names to what torchao makes of a linear layer of some width."""


def quantize_weights(network: nn.Module, how: str) -> None:
    """Store the weights of all linear layers of a network in fewer bits, in place, with torchao.

    Args:
        network: in its final dtype and place.
        how: "int8" (a scale for each row), "int4" (a scale for each group of at most 128), "fp8".

    Raises:
        InputError: an unknown way, or a network that is quantised already.
        MissingDependencyError: torchao is not installed.
    """
    if how not in QUANTIZATIONS:
        raise unknown_name("quantize", how, QUANTIZATIONS)
    if is_quantized(network):
        raise InputError(f"quantize {how!r}: the weights are quantised already, load them anew")
    with optional("quantize", f"quantize={how!r}"):
        from torchao import quantization  # pyright: ignore[reportMissingImports]

    for width in sorted({layer.in_features for layer in _linear_layers(network)}):

        def is_wide(layer: nn.Module, _: str, width: int = width) -> bool:
            return isinstance(layer, nn.Linear) and layer.in_features == width

        made = QUANTIZATIONS[how](quantization, width)
        quantization.quantize_(network, made, filter_fn=is_wide)


def is_quantized(network: nn.Module) -> bool:
    """Whether a linear layer's weight is no plain tensor."""
    return any(
        type(layer.weight) not in (nn.Parameter, torch.Tensor) for layer in _linear_layers(network)
    )


def _linear_layers(network: nn.Module) -> list[nn.Linear]:
    return [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
