"""A device that is not the CPU, for machines that have none.

Its tensors hold CPU tensors, say that they are on the meta device, and compute what the CPU would.
As on an accelerator, an operation of tensors from both sides is an error; only copies and numbers
(tensors without dimensions) cross over, and CPU indices into tensors there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

ELSEWHERE = torch.device("meta")

aten = torch.ops.aten
CROSSINGS = (aten._to_copy.default, aten.copy_.default, aten._local_scalar_dense.default)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


class There(Tensor):
    """A tensor elsewhere; `held` is what it stands for."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> There:
        out = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=ELSEWHERE,
            requires_grad=requires_grad,
        )
        out.held = held
        return out

    def __repr__(self) -> str:
        return f"There({self.held!r})"

    def tolist(self) -> Any:
        """Numbers, which every device hands over."""
        return self.held.tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _FromNumbers(TorchFunctionMode):
    """Numbers would become meta tensors, and be forgotten, before anyone could see them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device and torch.device(device) == ELSEWHERE:
            return func(*args, **{**kwargs, "device": "cpu"}).to(ELSEWHERE)
        if func is Tensor.new_tensor and isinstance(args[0], There):
            return args[0].held.new_tensor(*args[1:], **kwargs).to(ELSEWHERE)
        return func(*args, **kwargs)


class Elsewhere(TorchDispatchMode):
    """Inside, tensors can be made and moved elsewhere."""

    def __enter__(self) -> Any:
        self._numbers = _FromNumbers()
        self._numbers.__enter__()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._numbers.__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def outside(function: Any) -> Any:
    """The function with the meta device as everybody knows it: loading makes empty weights there."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return run


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, There)]
    here = [tensor for tensor in tensors if tensor.dim() and not isinstance(tensor, There)]
    is_indexing = func in INDEXING and isinstance(args[0], There)
    if there and here and func not in CROSSINGS and not is_indexing:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")
    device = kwargs.get("device")
    goes_there = bool(there) if device is None else torch.device(device) == ELSEWHERE
    if func is aten.copy_.default:
        goes_there = isinstance(args[0], There)
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": False}
    given = tree_map(lambda leaf: leaf.held if isinstance(leaf, There) else leaf, (args, kwargs))
    out = func(*given[0], **given[1])
    if func is aten._to_copy.default:
        out = out.clone() if any(out.data_ptr() == t.data_ptr() for t in given[0]) else out
    known = {id(tensor.held): tensor for tensor in there}

    def wrap(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return known[id(leaf)] if id(leaf) in known else There(leaf)

    return tree_map(wrap, out) if goes_there else out
