"""What a run asks of its device: operator calls, and reads that the host waits for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_WAITS = {
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.masked_select",
    "aten._unique2",
    "aten.unique_consecutive",
    "aten.repeat_interleave",
}
"""Operators whose result the host needs before it can go on; `item`, `int` and `bool` are the first."""


@dataclass
class Calls:
    """Counts of a block of code.

    Attributes:
        operators: calls of operators, by name.
        num_reads: reads that the host waits for. On a CPU a tensor that would live on the host
            beside an accelerator counts, too: there the number is an upper bound.
    """

    operators: Counter[str] = field(default_factory=Counter)
    num_reads: int = 0

    @property
    def num_operators(self) -> int:
        """Calls of all operators."""
        return self.operators.total()


@contextmanager
def count_calls() -> Iterator[Calls]:
    """Count what is called in a `with` block."""
    calls = Calls()
    with _Lists(calls), _Operators(calls):
        yield calls


class _Operators(TorchDispatchMode):
    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        self._calls.operators[name] += 1
        by_mask = name in ("aten.index", "aten.index_put", "aten.index_put_") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        self._calls.num_reads += name in _WAITS or by_mask
        return func(*args, **(kwargs or {}))


class _Lists(TorchFunctionMode):
    """Sees `tolist` and `cpu`, which read without an operator; views of numpy are a CPU's own."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self._calls = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._calls.num_reads += func in (Tensor.tolist, Tensor.cpu)
        return func(*args, **(kwargs or {}))
