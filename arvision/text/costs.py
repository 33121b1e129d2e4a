"""What a pass of a language model costs on this machine, by the number of candidates."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .model import HFCausalLM

WINDOWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 65)
CONTEXT = 64

_MEASURED: dict[str, list[list[float]]] = {}


def pass_costs(model: HFCausalLM, most: int) -> list[list[float]]:
    """Rows [1, candidates, seconds] for `arvision.decoding.window.CostTable`.

    Measured once per model, dtype and number of threads in a process: the median of three passes
    each, behind a short context.

    Args:
        model: whose passes are timed.
        most: candidates at most, the last known token not counted.
    """
    key = f"{model.cost_key} {torch.get_num_threads()} threads {most}"
    if key not in _MEASURED:
        state, _ = model.start([torch.zeros(CONTEXT, dtype=torch.int64)])
        table = []
        for window in (w for w in WINDOWS if w <= most + 1):
            tokens = torch.zeros(1, window, dtype=torch.int64, device=model.device)
            seconds = []
            for _ in range(4):
                started = time.perf_counter()
                state.extend(tokens)[0, 0, 0].item()
                seconds.append(time.perf_counter() - started)
            table.append([1, window, sorted(seconds[1:])[1]])
        _MEASURED[key] = table
    return _MEASURED[key]
