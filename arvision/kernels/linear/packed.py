"""oneDNN's packed matrix product behind the interface of `torch.nn.Linear`."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_ROWS = 4
"""Below, a product is bound by reading the weight and packing it wins nothing."""

MAX_WEIGHT = 1 << 22
"""Elements of the largest weight that is packed: a packed copy doubles its memory."""

_product: Any = torch.ops.mkldnn._linear_pointwise.default
_PACKED: WeakKeyDictionary[nn.Module, tuple[tuple[int, int], Tensor]] = WeakKeyDictionary()


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

    It does at inference, in float32 on a CPU, with at least `MIN_ROWS` rows, where `packing_pays`.
    """
    return (
        not torch.is_grad_enabled()
        and x.numel() >= MIN_ROWS * weight.shape[1]
        and x.dtype == weight.dtype == torch.float32
        and weight.is_cpu
        and weight.numel() <= MAX_WEIGHT
        and not weight.is_inference()
        and not torch.is_autocast_enabled("cpu")
        and packing_pays()
    )


def packed_linear(x: Tensor, owner: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x` [..., C] times `weight` [D, C] transposed, plus `bias` [D], with the weight packed once.

    Args:
        x: float32 on a CPU.
        owner: the module that the weight belongs to; its packed copy lives as long as it does and
            is renewed when the weight changes.
        weight: float32.
        bias: or None.
    """
    version = (weight.data_ptr(), weight._version)
    kept = _PACKED.get(owner)
    if kept is None or kept[0] != version:
        kept = (version, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None))
        _PACKED[owner] = kept
    return _product(x, kept[1], bias, "none", [], "")


class Linear(nn.Linear):
    """`torch.nn.Linear` that takes the packed path where `runs_packed` says so."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., C] to [..., D]."""
        if runs_packed(input, self.weight):
            return packed_linear(input, self, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias)
