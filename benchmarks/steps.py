"""What a pass asks of its device: operator calls, reads that the host waits for, CPU time.

    python -m benchmarks.steps [--modes loop,eager] [--images 1] [--rounds 7]

Counts do not depend on the machine's load. Times are CPU seconds of one thread, alternating in one
process; the mode "default" compiles first, which takes minutes. The model is `llamagen-fashion` at
guidance 3, without the decoder.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import arvision
from arvision import get_sampler
from arvision.counting import count_calls
from arvision.decoding.fixed_step import Steps

from .common import save

SAMPLERS = (
    "ar",
    "sjd",
    "sjd:coupling=maximal",
    "sjd:coupling=independent",
    "sjd:tree=drift",
    "sjd:tree=static:coupling=maximal",
    "gsd",
    "lantern",
    "draft",
)
SAMPLERS_OF_THE_LOOP = ("zipar", "pjd")
"""Samplers whose passes have no fixed shapes."""


def counts(network: Any, draw: Callable[[Any], Any]) -> dict[str, float]:
    """Reads and operator calls of a pass after the first one, and those outside of the network."""
    inner, inside, seen = network.forward, [0], []

    def forward(*given: Any, **named: Any) -> Any:
        before = calls.num_operators
        out = inner(*given, **named)
        inside[0] += calls.num_operators - before
        return out

    network.forward = forward
    try:
        with count_calls() as calls:
            draw(lambda *_: seen.append((calls.num_reads, calls.num_operators, inside[0])))
    finally:
        network.forward = inner
    first, last, passes = seen[0], seen[-1], max(1, len(seen) - 1)
    reads, operators, own = ((b - a) / passes for a, b in zip(first, last, strict=True))
    return {
        "reads": round(reads, 2),
        "operators": round(operators),
        "outside": round(operators - own),
    }


def share_around(network: Any, draw: Callable[[], Any]) -> float:
    """CPU seconds of a draw outside of the network, over those inside it."""
    inner, inside = network.forward, [0.0]

    def forward(*given: Any, **named: Any) -> Any:
        started = time.process_time()
        out = inner(*given, **named)
        inside[0] += time.process_time() - started
        return out

    network.forward = forward
    try:
        started = time.process_time()
        draw()
        return (time.process_time() - started) / inside[0] - 1
    finally:
        network.forward = inner


def main() -> None:
    """Measure, print a table and write `results/steps.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modes", default="loop,eager")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipe = arvision.load("llamagen-fashion", device="cpu")
    model, num = pipe.model, options.images
    modes = options.modes.split(",")
    steps = {mode: None if mode == "loop" else Steps(mode) for mode in modes}

    def draw(sampler: Any, mode: str, on_step: Any = None) -> Any:
        classes = [image % 10 for image in range(num)]
        seeds = [(0, image) for image in range(num)]
        return sampler(
            model, classes, seeds=seeds, guidance_scale=3.0, steps=steps[mode], on_step=on_step
        )

    rows = []
    for name in (*SAMPLERS, *SAMPLERS_OF_THE_LOOP):
        sampler = pipe.bind(get_sampler(name), model)
        known = [mode for mode in modes if mode == "loop" or name in SAMPLERS]
        times: dict[str, list[float]] = {mode: [] for mode in known}
        for mode in known:
            draw(sampler, mode)
        for _ in range(options.rounds):
            for mode in known:
                started = time.process_time()
                out = draw(sampler, mode)
                times[mode].append((time.process_time() - started) / out.stats.forward_passes)
        for mode in known:
            row = {"sampler": name, "mode": mode, "images": num}
            if mode in ("loop", "eager"):
                row |= counts(pipe.transformer, lambda told, s=sampler, m=mode: draw(s, m, told))
            around = [
                share_around(pipe.transformer, lambda s=sampler, m=mode: draw(s, m))
                for _ in range(options.rounds)
            ]
            row["around"] = round(statistics.median(around), 3)
            row["ms"] = round(1e3 * statistics.median(times[mode]), 2)
            row["ms_spread"] = [round(1e3 * pick(times[mode]), 2) for pick in (min, max)]
            rows.append(row)
            print(row, flush=True)
    save("steps", {"rows": rows})


if __name__ == "__main__":
    main()
