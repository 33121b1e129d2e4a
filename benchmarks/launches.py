"""What a pass calls outside of the network where kernels run: operators, a kernel's launch being one.

    TRITON_INTERPRET=1 python -m benchmarks.launches

Kernels run by Triton's interpreter, so no GPU is needed: the numbers are those of a GPU. The model is a
tiny LlamaGen with guidance, as what is called around a network does not depend on its sizes.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from arvision import get_sampler
from arvision.decoding.fixed_step import Steps
from arvision.errors import InputError
from arvision.kernels import dispatch
from arvision.testing import tiny_llamagen

from .common import save
from .steps import counts

SAMPLERS = (
    "ar",
    "sjd:window=4",
    "sjd:window=4:coupling=maximal",
    "sjd:window=4:tree=static:coupling=maximal",
)
LAUNCHED = {
    "sampling": ("_cut", "_write", "_gumbel", "_draw", "_inverse"),
    "verify": ("_settle", "_count", "_walk", "_try"),
    "tree_attention": ("_attend", "_merge"),
    "compaction": ("_compact",),
    "philox": ("_philox",),
}


class Launch:
    """Stands for a kernel, and counts as one operator when it is launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def launch(*given: Any, **named: Any) -> None:
            torch.empty(0)
            with _disable_current_modes():
                self.kernel[grid](*given, **named)

        return launch


def count(backend: str) -> list[dict[str, Any]]:
    """Operators of a pass outside of the network for each sampler, in the loop and as a fixed step."""
    model, rows = tiny_llamagen(grid=(2, 3), num_layers=1), []
    for spec in SAMPLERS:
        row: dict[str, Any] = {"sampler": spec, "backend": backend}
        for mode in ("loop", "eager"):
            steps = None if mode == "loop" else Steps(mode)

            def draw(told: Any, spec: str = spec, steps: Any = steps) -> None:
                sampler = get_sampler(spec)
                with dispatch.taking(backend):
                    sampler(model, [1], seeds=[0], guidance_scale=3.0, steps=steps, on_step=told)

            row[mode] = counts(model.transformer, draw)["outside"]
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    """Count, print and write `results/launches.json`."""
    if not dispatch.is_interpreted():
        raise InputError("benchmarks.launches: expected TRITON_INTERPRET=1 in the environment")
    for operation, names in LAUNCHED.items():
        module = importlib.import_module(f"arvision.kernels.{operation}.triton")
        for name in names:
            setattr(module, name, Launch(getattr(module, name)))
    save("launches", {"rows": count("reference") + count("triton")})


if __name__ == "__main__":
    main()
