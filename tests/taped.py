"""CUDA graphs for machines without CUDA: operators are written down once and replayed as they were.

Like a graph, a tape knows memory and not Python: what it replays are the very operators on the very
tensors of the pass that it saw, with results in the places where they stood; a look of the host at a
tensor is refused while it records.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LOOKS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select")


class Tape(TorchDispatchMode):
    """Records what runs within it; `replay` runs it again.

    Attributes:
        outside: tensors that were there before and are looked at, by the address of their memory.
        literals: tensors that were made of Python's numbers within the pass and looked at there: to an
            accelerator they would have to be copied, which no graph can hold.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._made: dict[int, Tensor] = {}
        self.outside: dict[int, Tensor] = {}
        self.written: dict[int, Tensor] = {}
        self.literals: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert str(func.overloadpacket) not in LOOKS, f"the host looks: {func}"
        out = func(*args, **kwargs)
        if func is torch.ops.aten.lift_fresh.default:
            self._made[out.untyped_storage().data_ptr()] = out
            return out
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in given:
            memory = tensor.untyped_storage().data_ptr()
            if memory in self.written:
                self.literals.append(self.written[memory])
            elif memory not in self._made:
                self.outside[memory] = tensor
        returned = func._schema.returns
        aliases = [part.alias_info for part in returned]
        if any(alias is not None and not alias.is_write for alias in aliases):
            return out  # a view of what will stand there
        fresh = []
        if not any(alias is not None for alias in aliases):
            fresh = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in fresh:
            self._made[tensor.untyped_storage().data_ptr()] = tensor
        self._calls.append((func, args, kwargs, fresh))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, kept in self._calls:
            out = func(*args, **kwargs)
            for old, new in zip(kept, tree_leaves(out) if kept else (), strict=True):
                old.copy_(new)


class _Written(TorchFunctionMode):
    """Sees tensors that are made of Python's numbers."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        data = args[1 if func is Tensor.new_tensor else 0] if args else None
        makes = func in (torch.tensor, torch.as_tensor, Tensor.new_tensor)
        if makes and not isinstance(data, Tensor):
            self._tape.written[out.untyped_storage().data_ptr()] = out
        return out


class Taped:
    """Makes tapes in the place of CUDA graphs, and keeps them to be looked at."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self.warm_ups: list[int] = []

    def __call__(self, step: Any, warm_up: int) -> Any:
        self.warm_ups.append(warm_up)
        for _ in range(warm_up):
            step()
        tape = Tape()
        # What would be done on a CPU alone, by NumPy or after a look, no graph can hold.
        with (
            mock.patch.object(torch.compiler, "is_compiling", return_value=True),
            tape,
            _Written(tape),
        ):
            step()
        self.tapes.append(tape)
        return tape.replay
