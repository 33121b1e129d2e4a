"""Does a decoding step of plain sampling cost the same at the end of an image as at its start?

python -m benchmarks.kv_cache

LlamaGen-B (111M, random weights), 256 tokens, guidance 4. The cache is preallocated; no step copies
it. `ar` and `sjd` draw whole images on the same model, alternating. The laws of random weights hardly
depend on the tokens before, so guesses are right far more often than with trained ones: that part
shows the cost of a pass, and not a speed-up to expect.
"""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

import torch

from arvision import get_sampler
from arvision.models import LlamaGen, LlamaGenTransformer

from .common import alternate, save, summary

ROUNDS = 5
NEIGHBOURS = 8
"""Steps around a token whose median is taken, because single steps are noisy."""


def drawing(model: LlamaGen, steps: list[list[float]], name: str, **options: Any) -> Any:
    """A task that draws one image and adds the seconds of each of its passes to `steps`."""
    sampler = get_sampler(name, **options)

    def draw() -> None:
        marks: list[float] = []
        sampler(
            model,
            [0],
            seeds=[0],
            guidance_scale=4.0,
            on_step=lambda step, figures: marks.append(time.perf_counter()),
        )
        steps.append([b - a for a, b in itertools.pairwise(marks)])

    return draw


def around(steps: list[float], token: int) -> float:
    """Median seconds of the steps near a token."""
    return statistics.median(steps[max(0, token - NEIGHBOURS) : token + NEIGHBOURS])


def main() -> None:
    """Measure and write `results/kv_cache.json`."""
    torch.manual_seed(0)
    model = LlamaGen(LlamaGenTransformer().eval())
    record: dict[str, Any] = {"model": "LlamaGen-B, random weights", "guidance_scale": 4.0}
    steps: dict[str, list[list[float]]] = {"ar": [], "sjd 16": []}
    tasks = {
        "ar": drawing(model, steps["ar"], "ar"),
        "sjd 16": drawing(model, steps["sjd 16"], "sjd", window=16),
    }
    seconds = alternate(tasks, ROUNDS)
    early = statistics.median(around(run, 10) for run in steps["ar"][1:])
    late = statistics.median(around(run, 244) for run in steps["ar"][1:])
    record["tokens_per_second_at_10"] = 1 / early
    record["tokens_per_second_at_250"] = 1 / late
    record["late_over_early"] = early / late
    print(
        f"tokens per second: {1 / early:.1f} near token 10, {1 / late:.1f} near token 250 "
        f"(ratio {early / late:.3f})"
    )
    record["image_seconds"] = {}
    for name, times in seconds.items():
        passes = len(steps[name][-1]) + 1
        median = statistics.median(times)
        record["image_seconds"][name] = summary(times) | {
            "passes": passes,
            "ms_per_pass": 1e3 * median / passes,
        }
        print(f"{name}: {median:.2f} s, {passes} passes, {1e3 * median / passes:.1f} ms per pass")
    save("kv_cache", record)


if __name__ == "__main__":
    main()
