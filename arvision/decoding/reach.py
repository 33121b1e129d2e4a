"""What a pass can reach: every tensor behind an object, and what else its course depends on.

A graph that was captured reads and writes the memory that its pass did. To replay it for another
call, that call's tensors have to move there, and all else must be as it was: the walk of this file
finds both. Classes tell it what need not be looked at:

    renewed = ("_drafts",)  # attributes that every pass makes before it looks at them, or once,
    # out of what is looked at anyway
    unread = ("_prefill",)  # attributes that no pass of fixed shapes looks at
    is_constant = True  # objects that never change once they are made
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, complex, str, bytes, type(None), Enum)
PLAIN += (torch.dtype, torch.device, torch.Size, slice)
"""Values that are what they say."""

OWN = "arvision"
"""Objects of this package are looked into; others count as the very objects that they are."""

HOOKS = "_hooks"
"""Names of a module's attributes with its hooks; nearly all are empty."""


@dataclass
class Place:
    """A tensor that a pass may look at, and how another takes its place.

    Attributes:
        path: of names, from the object that the walk began with.
        tensor: what stands there.
        put: puts another tensor there.
    """

    path: str
    tensor: Tensor
    put: Callable[[Tensor], None]


@dataclass
class Reach:
    """What a walk finds.

    Attributes:
        places: of all tensors but weights.
        signature: of all else that the course of a pass depends on: shapes, which tensors share
            memory, numbers, code, objects.
        weights: the same of networks, with the addresses of their weights.
        renewed: (path, object, name) of attributes that every pass makes anew.
        held: what the signature knows by its identity and must live as long as it.
        known: weak references to objects of the same kind that others own.
    """

    places: list[Place] = field(default_factory=list)
    signature: list[Any] = field(default_factory=list)
    weights: list[Any] = field(default_factory=list)
    renewed: list[tuple[str, Any, str]] = field(default_factory=list)
    held: list[Any] = field(default_factory=list)
    known: list[weakref.ref[Any]] = field(default_factory=list)

    @classmethod
    def of(cls, obj: Any) -> Reach:
        """All that an object leads to."""
        reach = cls()
        _Walk(reach).visit(obj, "", None, is_weight=False)
        return reach

    @property
    def key(self) -> tuple[Any, ...]:
        """The signature, to look it up."""
        return tuple(self.signature)


class _Walk:
    def __init__(self, reach: Reach) -> None:
        self._reach = reach
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []
        """What has a number: another object could get the address of one that is gone."""
        self._storages: dict[int, int] = {}

    def visit(
        self, value: Any, path: str, put: Callable[[Any], None] | None, *, is_weight: bool
    ) -> None:
        notes = self._reach.weights if is_weight else self._reach.signature
        if isinstance(value, PLAIN):
            notes.append((path, type(value).__name__, str(value)))
        elif isinstance(value, Tensor):
            self._tensor(value, path, put, is_weight)
        elif id(value) in self._seen:
            notes.append((path, "as", self._seen[id(value)]))
        elif _is_opaque(value):
            notes.append((path, "very", id(value)))
            self._keep(value)
        else:
            self._seen[id(value)] = len(self._seen)
            self._alive.append(value)
            notes.append((path, type(value).__name__))
            is_weight = is_weight or isinstance(value, nn.Module)
            for name, part, changed in _parts(value, put):
                self.visit(part, f"{path}.{name}", changed, is_weight=is_weight)
            for name in getattr(type(value), "renewed", ()) if _is_own(value) else ():
                self._reach.renewed.append((f"{path}.{name}", value, name))

    def _keep(self, value: Any) -> None:
        if _is_constant(value):
            self._reach.held.append(value)
            return
        try:
            self._reach.known.append(weakref.ref(value))
        except TypeError:  # numbers of other packages, builtin functions
            self._reach.held.append(value)

    def _tensor(self, tensor: Tensor, path: str, put: Any, is_weight: bool) -> None:
        notes = self._reach.weights if is_weight else self._reach.signature
        inner = getattr(tensor, "__tensor_flatten__", None)
        if inner is not None:
            for name in inner()[0]:
                self._tensor(getattr(tensor, name), f"{path}.{name}", None, is_weight)
            return
        shape = (tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device)
        if is_weight or put is None:
            notes.append((path, tensor.data_ptr(), *shape))
            if not is_weight:
                self._reach.held.append(tensor)
            return
        storage = tensor.untyped_storage().data_ptr()
        shared = self._storages.setdefault(storage, len(self._storages))
        notes.append((path, shared, tensor.storage_offset(), *shape))
        self._reach.places.append(Place(path, tensor, put))


def _is_own(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == OWN


def _is_opaque(value: Any) -> bool:
    """Whether a value counts as the very object that it is."""
    known = (tuple, list, dict, set, frozenset, nn.Module, functools.partial)
    known += (types.FunctionType, types.MethodType)
    return _is_constant(value) or not (isinstance(value, known) or _is_own(value))


def _is_constant(value: Any) -> bool:
    """Whether a class says that its objects never change once they are made."""
    return getattr(type(value), "is_constant", False)


def _parts(value: Any, put: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Name, value and setter of everything right behind a value."""
    if isinstance(value, tuple):
        yield from _of_tuple(value, put)
    elif isinstance(value, list):
        for place, part in enumerate(value):
            yield place, part, functools.partial(value.__setitem__, place)
    elif isinstance(value, dict):
        for name in list(value):
            yield repr(name), value[name], functools.partial(value.__setitem__, name)
    elif isinstance(value, set | frozenset):
        yield "", repr(sorted(map(repr, value))), None
    elif isinstance(value, functools.partial):
        yield "func", value.func, None
        yield "args", value.args, None
        yield "keywords", value.keywords, None
    elif isinstance(value, types.MethodType):
        yield "func", value.__func__, None
        yield "self", value.__self__, None
    elif isinstance(value, types.FunctionType):
        yield "code", str(id(value.__code__)), None
        yield "defaults", value.__defaults__, None
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            if cell != types.CellType():  # one that is empty yet
                yield name, cell.cell_contents, functools.partial(setattr, cell, "cell_contents")
    elif not _is_opaque(value):
        yield from _of_object(value)


def _of_tuple(value: tuple[Any, ...], put: Any) -> Iterator[tuple[Any, Any, Any]]:
    parts = list(value)

    def change(place: int, part: Any) -> None:
        parts[place] = part
        put(type(value)(*parts) if hasattr(value, "_fields") else tuple(parts))

    for place, part in enumerate(value):
        yield place, part, None if put is None else functools.partial(change, place)


def _of_object(value: Any) -> Iterator[tuple[Any, Any, Any]]:
    known = vars(value) if hasattr(value, "__dict__") else {}
    left = {*getattr(type(value), "renewed", ()), *getattr(type(value), "unread", ())}
    for name in list(known):
        part = known[name]
        if name in left or (name.endswith(HOOKS) and not part):
            continue
        yield name, part, functools.partial(object.__setattr__, value, name)
