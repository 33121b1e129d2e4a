"""Captured passes that are kept from call to call.

A graph knows addresses. So the first call of a kind leaves its buffers to the pool, and the tensors
of a later call move into them: its cache, its books, its noise. From then on that call works with
the pool's memory, replays what was captured, and takes its results out at the end.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .reach import Place, Reach

MOST_KEPT = 16
"""Graphs that are kept; those that were not used for longest go first."""

SHARE = 0.25
"""Of a device's memory, what the buffers of kept graphs may take; the newest one always may."""

WARM_UP = 3
"""Passes before a graph is captured, as CUDA's libraries choose their kernels in the first ones."""


def capture(step: Callable[[], Any], warm_up: int) -> Callable[[], Any]:
    """A CUDA graph of `step`: what it replays changes the same buffers.

    Args:
        step: a pass of a run that goes on.
        warm_up: passes before, in which libraries choose their kernels.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(warm_up):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@dataclass
class Graph:
    """A captured pass and the memory that it works in.

    Attributes:
        replay: makes the pass.
        size: of the pass: what tells apart which kernels libraries choose.
        tensors: that it works with, in the order of the walk.
        renewed: what a pass left in the attributes that passes make anew.
        held: what must live as long as the graph.
        known: objects of others without which it means nothing.
    """

    replay: Callable[[], Any]
    size: tuple[Any, ...]
    tensors: list[Tensor]
    renewed: list[Any]
    held: list[Any]
    known: list[weakref.ref[Any]]

    def storages(self) -> dict[int, int]:
        """Bytes of the memory of its tensors, by address."""
        memories = (tensor.untyped_storage() for tensor in self.tensors)
        return {memory.data_ptr(): memory.nbytes() for memory in memories}


class GraphPool:
    """Graphs by everything that the course of their pass depends on.

    One call at a time works with the pool. Another that begins meanwhile (in another thread, or in a
    callback) captures graphs of its own, which nobody keeps.

    Args:
        capture: makes a replayable pass of a step, after so many passes to warm up.
        device_type: of devices on which it can.
        most: graphs that are kept.
        most_bytes: of their buffers; None for `SHARE` of the device's memory.

    Attributes:
        num_captured: graphs made so far.
    """

    def __init__(
        self,
        capture: Callable[[Callable[[], Any], int], Callable[[], Any]] = capture,
        device_type: str = "cuda",
        most: int = MOST_KEPT,
        most_bytes: int | None = None,
    ) -> None:
        self._capture, self.device_type = capture, device_type
        self._most, self._most_bytes = most, most_bytes
        self._graphs: OrderedDict[tuple[Any, ...], Graph] = OrderedDict()
        self._weights: list[Any] = []
        self._lock = threading.Lock()
        self._user: Any = None
        self.num_captured = 0

    def __len__(self) -> int:
        return len(self._graphs)

    def __reduce__(self) -> Any:
        """A copied or saved pool begins without graphs."""
        return GraphPool, (self._capture, self.device_type, self._most, self._most_bytes)

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffers of all graphs; memory that they share counts once."""
        found: dict[int, int] = {}
        for graph in self._graphs.values():
            found |= graph.storages()
        return sum(found.values())

    def clear(self) -> None:
        """Drop all graphs and their buffers."""
        self._graphs.clear()

    def ready(self, step: Any) -> Callable[[], Any]:
        """What makes a pass of a step, whose tensors lie in the pool's memory afterwards.

        Args:
            step: a `FixedStep` or a `FixedPart`: it has a `run`, a `size`, a `device`, and `buffers`
                that it changes.
        """
        with self._lock:
            self._user = step.run if self._user is None else self._user
        if self._user is not step.run:
            return self._captured(step, WARM_UP)
        reach = Reach.of(step)
        if reach.weights != self._weights:
            self.clear()
            self._weights = reach.weights
        graph = self._graphs.get(reach.key)
        if graph is not None and all(known() is not None for known in graph.known):
            self._graphs.move_to_end(reach.key)
            move(reach.places, graph.tensors)
            for (_, obj, name), value in zip(reach.renewed, graph.renewed, strict=True):
                setattr(obj, name, value)
            return graph.replay
        # Libraries know their kernels from another graph of that size.
        is_warm = any(kept.size == step.size for kept in self._graphs.values())
        replay = self._captured(step, 0 if is_warm else WARM_UP)
        renewed = [getattr(obj, name, None) for _, obj, name in reach.renewed]
        # What the pass made by itself and keeps (tables of masks) lives as long as the graph.
        held = [*reach.held, *(place.tensor for place in Reach.of(step).places)]
        tensors = [place.tensor for place in reach.places]
        self._graphs[reach.key] = Graph(replay, step.size, tensors, renewed, held, reach.known)
        self._graphs.move_to_end(reach.key)
        self._bound(step.device)
        return replay

    def leave(self, run: Any) -> None:
        """A call is over: its books move to memory of its own, and the pool is free for others."""
        if self._user is run:
            run.move_out()
            self._user = None

    def _captured(self, step: Any, warm_up: int) -> Callable[[], Any]:
        self.num_captured += 1
        return prepared(step, lambda: self._capture(step, warm_up))

    def _bound(self, device: torch.device) -> None:
        most = self._most_bytes
        if most is None and device.type == "cuda":
            most = int(SHARE * torch.cuda.get_device_properties(device).total_memory)
        while len(self._graphs) > 1 and (
            len(self._graphs) > self._most or (most is not None and self.num_bytes > most)
        ):
            self._graphs.popitem(last=False)


def move(places: Sequence[Place], kept: Sequence[Tensor]) -> None:
    """Copy tensors to where those of a graph lie, and put these in their places.

    A tensor that is all of its memory is copied for all of its views.
    """
    whole: set[int] = set()
    pairs = sorted(zip(places, kept, strict=True), key=lambda pair: -pair[1].numel())
    for place, there in pairs:
        here, memory = place.tensor, place.tensor.untyped_storage()
        if here.data_ptr() != there.data_ptr() and memory.data_ptr() not in whole:
            _once(there).copy_(_once(here))
            if here.numel() * here.element_size() == memory.nbytes():
                whole.add(memory.data_ptr())
    for place, there in pairs:
        if place.tensor is not there:
            place.put(there)


def _once(tensor: Tensor) -> Tensor:
    """The elements of a tensor that may be expanded, each once."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def prepared(step: Any, work: Callable[[], Any]) -> Any:
    """Do what makes a step ready, write down its seconds, and undo the passes that it made."""
    kept: list[Tensor] = [buffer.clone() for buffer in step.buffers()]
    started = time.perf_counter()
    made = work()
    step.run.warm_up += time.perf_counter() - started
    for buffer, old in zip(step.buffers(), kept, strict=True):
        buffer.copy_(old)
    return made
