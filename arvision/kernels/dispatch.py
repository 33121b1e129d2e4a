"""Which implementation of an operation runs, and why.

`backend` is `"auto"` (Triton where the tensors lie on a device that it compiles for, else the plain
PyTorch reference), `"reference"` or `"triton"`. What cannot run is refused, not replaced: only
`"auto"` ever chooses, and `last_run` tells what it chose and why.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError, MissingDependencyError, unknown_name

BACKENDS = ("auto", "reference", "triton")

OPS = {
    "tree_attention": "few queries with an ancestor mask against a long key/value cache",
    "sampling": "guidance, temperature, top-k, top-p and a draw in one launch, without sorting",
    "verify": "what stays of a window or a tree of drafts, and what comes next",
    "compaction": "accepted keys and values to the front of their area",
    "philox": "Philox4x32-10, counter-based random bits",
    "nearest_code": "index of the nearest codebook row",
}
"""Every operation that has a reference and a Triton implementation."""

USED_BY = {
    "tree_attention": "windows, trees, ragged and padded rows of LlamaGen, and of the language and image "
    "models of transformers in layers that attend to everything or to a window through PyTorch's SDPA; one candidate "
    "behind rows of one length, prompts, VAR, Infinity, MAR and NextStep-1 keep to SDPA",
    "sampling": "every model with a vocabulary: LlamaGen, VAR, Infinity, transformers' models; from logits to tokens, "
    "with neither law nor noise in memory, in ar, in sjd, draft and text under Gumbel coupling, zipar and pjd",
    "verify": "chains of every model with a vocabulary; trees under Gumbel coupling and greedy, and those whose "
    "siblings are tried in turn (sjd with tree 'static', rules multi_round and without_replacement)",
    "compaction": "trees of LlamaGen and of transformers' models",
    "philox": "every model, for noise that stands in memory",
    "nearest_code": "the LlamaGen tokenizer's encoder",
}
"""Which models and passes call each operation."""

_logger = logging.getLogger(__name__)
LAST: dict[str, Choice] = {}
"""What the last call of each operation ran; see `last_run`."""


@dataclass(frozen=True)
class Choice:
    """What runs.

    Attributes:
        implementation: "reference" or "triton".
        reason: why, in a few words.
    """

    implementation: str
    reason: str

    @property
    def is_triton(self) -> bool:
        """Whether the Triton implementation runs."""
        return self.implementation == "triton"


ON_CPU = Choice("reference", "Triton does not compile for cpu tensors")
"""What runs on a CPU wherever nobody asks for something else."""


_taken: str | None = None


@contextmanager
def taking(backend: str) -> Iterator[None]:
    """Within this block `"auto"` means `backend` where that runs, in the whole process: for tests.

    With "triton" CPU tensors take the way of CUDA tensors, through Triton's interpreter: what models
    and samplers do on a GPU then runs without one. With "reference" a GPU runs what a CPU does.
    """
    global _taken
    before, _taken = _taken, backend
    try:
        yield
    finally:
        _taken = before


def stays(tensor: Tensor) -> bool:
    """Whether `tensor` lies where references run whatever its shape, so that nobody need ask."""
    return tensor.is_cpu and _taken != "triton"


def none_left(mask: Tensor) -> bool:
    """Whether no entry is true and the rest of some work may be left undone.

    Seen on a CPU alone: an accelerator would have to be waited for, and does the rest.
    """
    is_seen = mask.is_cpu and not torch.compiler.is_compiling()
    return is_seen and not mask.numpy().any()


@functools.cache
def triton_version() -> str | None:
    """The installed version of Triton; None where there is none."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.metadata.version("triton")


def is_interpreted() -> bool:
    """Whether Triton programs run in its interpreter (TRITON_INTERPRET=1 before its import)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _obstacle(device: torch.device) -> str | None:
    """Why Triton cannot run on a device; None where it can."""
    if triton_version() is None:
        return "Triton is not installed"
    if device.type == "cuda" or (device.type == "cpu" and is_interpreted()):
        return None
    return f"Triton does not compile for {device.type} tensors"


def explain(device: torch.device | str, backend: str = "auto", limit: str | None = None) -> Choice:
    """What would run on a device.

    Args:
        device: where the tensors are.
        backend: a name in `BACKENDS`.
        limit: why the Triton implementation does not take these arguments; None where it does.

    Raises:
        InputError: no such backend, or Triton was asked for and cannot run.
        MissingDependencyError: Triton was asked for and is not installed.
    """
    device = torch.device(device)
    if backend not in BACKENDS:
        raise unknown_name("backend", backend, BACKENDS)
    if backend == "reference":
        return Choice("reference", "asked for")
    if backend == "auto" and _taken == "reference":
        return Choice("reference", "asked for")
    if device.type == "cpu" and backend == "auto" and _taken != "triton":
        # The interpreter is for tests, and never chosen by itself.
        return ON_CPU
    if backend == "auto" and torch.compiler.is_compiling():
        return Choice("reference", "torch.compile makes kernels of its own")
    obstacle = _obstacle(device) or limit
    if backend == "triton":
        if triton_version() is None:
            raise MissingDependencyError(
                "backend 'triton': Triton is not installed (pip install triton)"
            )
        if obstacle is not None:
            raise InputError(f"backend 'triton': {obstacle}; 'reference' takes these arguments")
        return Choice("triton", "asked for")
    if obstacle is not None:
        return Choice("reference", obstacle)
    return Choice("triton", f"Triton {triton_version()} compiles for {device.type}")


def choose(name: str, tensor: Tensor, backend: str = "auto", limit: str | None = None) -> Choice:
    """What runs for an operation on `tensor`'s device; kept for `last_run`.

    A reference that stands in on an accelerator is logged as a warning, once per reason.

    Args:
        name: a key of `OPS`.
        tensor: any of the operation's tensors.
        backend: see `explain`.
        limit: see `explain`.
    """
    choice = explain(tensor.device, backend, limit)
    is_odd = backend == "auto" and tensor.device.type == "cuda" and not choice.is_triton
    if is_odd and _taken is None and not torch.compiler.is_compiling():
        _warn_once(f"{name} runs its reference on {tensor.device.type}: {choice.reason}")
    LAST[name] = choice
    return choice


@functools.cache
def _warn_once(message: str) -> None:
    _logger.warning(message)


def last_run(name: str) -> Choice | None:
    """What the last call of an operation ran in this process; None before the first.

    Raises:
        InputError: no such operation.
    """
    if name not in OPS:
        raise unknown_name("operation", name, OPS)
    return LAST.get(name)
