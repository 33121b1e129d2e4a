"""The processes that share a training: joined once, and what passes between them."""

from __future__ import annotations

import warnings
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather
from torch import Tensor

PATIENCE = timedelta(days=1)
"""How long processes wait for the first, which alone reads pictures, measures and draws sheets."""


def joined() -> PartialState:
    """The processes that `torchrun` or `accelerate launch` has started; this one alone without either.

    accelerate takes processes on CPUs for strangers unless it is told that there is nothing else, and
    every one of them would train the whole.
    """
    # Of convolutions of one pixel, whose strides say nothing.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)


def of_all(part: Tensor) -> Tensor:
    """The rows of every process, [processes * M, ...], out of [M, ...] of each."""
    return gather(part.contiguous())  # pyright: ignore[reportReturnType]


def take_first(*tensors: Tensor) -> None:
    """Put what the first process has into the tensors of all."""
    for tensor in tensors:
        tensor.copy_(broadcast(tensor.clone()))  # pyright: ignore[reportArgumentType]
