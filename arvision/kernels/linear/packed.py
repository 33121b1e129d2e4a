"""oneDNN's packed matrix product behind the interface of `torch.nn.Linear`."""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_ROWS = 4
"""Below, a float32 product is bound by reading the weight and packing it wins nothing."""

MAX_WEIGHT = 1 << 22
"""Elements of the largest weight that is packed: a packed copy doubles its memory."""

_PACKED: WeakKeyDictionary[nn.Module, tuple[tuple[int, int], Tensor]] = WeakKeyDictionary()


@cache
def packed_operators() -> tuple[Callable[..., Tensor], Callable[..., Tensor]] | None:
    """oneDNN's private operators, one that packs a weight and one that multiplies with it.

    None where this build of PyTorch lacks either (some have no oneDNN at all) or they compute
    something else than `torch.nn.functional.linear` for a small product.
    """
    try:
        pack: Any = torch.ops.mkldnn._reorder_linear_weight.default
        product: Any = torch.ops.mkldnn._linear_pointwise.default
        line = torch.linspace(-1, 1, 32, dtype=torch.float32, device="cpu")
        x, weight, bias = line.view(4, 8), line[:24].view(3, 8).clone(), line[:3].clone()
        found = product(x, pack(weight, None), bias, "none", [], "")
        is_right = torch.allclose(found, F.linear(x, weight, bias), atol=1e-5)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return None
    return (pack, product) if is_right else None


@cache
def packs_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself, and the `packed_operators` do it rightly.

    PyTorch's own `linear` packs the weight anew in every call there.
    """
    operators = packed_operators()
    try:
        if operators is None or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        line = torch.linspace(-1, 1, 96, device="cpu").to(torch.bfloat16)
        x, weight = line[:32].view(1, 32), line[:96].view(3, 32).clone()
        found = operators[1](x, operators[0](weight, None), None, "none", [], "")
        return found.dtype == x.dtype and torch.allclose(found, F.linear(x, weight), atol=0.1)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False


@cache
def packing_pays() -> bool:
    """Whether oneDNN's packed products beat MKL's here: not on Intel's CPUs with AVX-512.

    MKL uses AVX-512 on these alone; there both are equal from 16 rows on and MKL is faster below.
    """
    facts = Path("/proc/cpuinfo")
    vendor = facts.read_text() if facts.exists() else platform.processor()
    is_intel = "GenuineIntel" in vendor
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.backends.mkldnn.is_available() and not (is_intel and wide)


def runs_packed(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of `x` [..., C] with `weight` [D, C] takes the packed path.

    It does at inference on a CPU, where this build has the `packed_operators`: in float32 with at
    least `MIN_ROWS` rows where `packing_pays`, in bfloat16 always where the CPU `packs_bfloat16`.
    """
    is_half = x.dtype == torch.bfloat16
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and x.dtype == weight.dtype
        and (is_half or (x.dtype == torch.float32 and x.numel() >= MIN_ROWS * weight.shape[1]))
        and type(weight) in (nn.Parameter, Tensor)  # quantised weights bring products of their own
        and weight.is_cpu
        and weight.numel() <= MAX_WEIGHT
        and not weight.is_inference()
        and not torch.is_autocast_enabled("cpu")
        and (packs_bfloat16() if is_half else packing_pays() and packed_operators() is not None)
    )


def packed_linear(x: Tensor, owner: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x` [..., C] times `weight` [D, C] transposed, plus `bias` [D], with the weight packed once.

    For builds that have the `packed_operators`, see `runs_packed`.

    Args:
        x: float32 or bfloat16 on a CPU.
        owner: the module that the weight belongs to; its packed copy lives as long as it does and
            is renewed when the weight changes.
        weight: of the same type.
        bias: or None.
    """
    operators = packed_operators()
    assert operators is not None
    pack, product = operators
    version = (weight.data_ptr(), weight._version)
    kept = _PACKED.get(owner)
    if kept is None or kept[0] != version:
        kept = (version, pack(weight.detach(), None))
        _PACKED[owner] = kept
    return product(x, kept[1], bias, "none", [], "")


class Linear(nn.Linear):
    """`torch.nn.Linear` that takes the packed path where `runs_packed` says so."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., C] to [..., D]."""
        if runs_packed(input, self.weight):
            return packed_linear(input, self, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias)
