"""Parts of a loop as functions of fixed shapes: a scale, a chain of a head, a student's pass.

What `arvision.decoding.fixed_step` is for a pass of the token loop, for loops that know on the host
what each pass will be: such a part can be captured as one graph, and kept for later calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .run import Run


class FixedPart:
    """Work on tensors that always takes the same course; `out` is what it gave.

    Args:
        run: the ledger.
        work: from `inputs` to tensors. It may also change tensors of its own in place.
        inputs: what it is given.
        changes: the tensors that it changes.
    """

    renewed = ("out",)
    unread = ("run",)  # work that looks at the books has them

    def __init__(
        self,
        run: Run,
        work: Callable[..., Any],
        inputs: tuple[Tensor, ...],
        changes: Sequence[Tensor],
    ) -> None:
        self.run, self.work = run, work
        # Where they stand in others' memory would tell them apart.
        self.inputs = tuple(part.contiguous().clone() for part in inputs)
        self._changes = list(changes)
        self.out: Any = None

    @property
    def device(self) -> torch.device:
        """Where it works."""
        return self.run.tokens.device

    @property
    def size(self) -> tuple[Any, ...]:
        """What tells the libraries' kernels apart that it calls."""
        return (type(self.work).__name__, *(tuple(part.shape) for part in self.inputs))

    def buffers(self) -> list[Tensor]:
        """Everything that it changes."""
        return [*self._changes, *self.run.buffers()]

    @torch.no_grad()
    def __call__(self) -> None:
        """Do the work."""
        self.out = self.work(*self.inputs)


def fixed_part(
    run: Run, work: Callable[..., Any], *inputs: Tensor, changes: Sequence[Tensor] = ()
) -> Any:
    """What `work` makes of `inputs`, by way of a captured graph where the run's steps capture.

    It is to be used before the same part runs again. Arguments as in `FixedPart`.
    """
    if run.steps is None or not run.steps.captures(run.tokens.device):
        return work(*inputs)
    part = FixedPart(run, work, inputs, changes)
    run.steps.graphs.ready(part)()
    return part.out
