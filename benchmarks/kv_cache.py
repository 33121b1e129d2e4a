"""Does a decoding step of plain sampling cost the same at the end of an image as at its start?

python -m benchmarks.kv_cache

LlamaGen-B (111M, random weights), 256 tokens, guidance 4. The cache is preallocated; no step copies
it. Then `ar` against `sjd` on the same model, whole images, alternating. With random weights drafts
are hardly ever right, so that part shows the cost of a pass and not a speed-up.
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


def step_seconds(model: LlamaGen) -> list[float]:
    """Seconds of each of the 255 steps of one image."""
    marks = []
    get_sampler("ar")(
        model,
        [0],
        seeds=[0],
        guidance_scale=4.0,
        on_step=lambda step, figures: marks.append(time.perf_counter()),
    )
    return [b - a for a, b in itertools.pairwise(marks)]


def around(steps: list[float], token: int) -> float:
    """Median seconds of the steps near a token."""
    return statistics.median(steps[max(0, token - NEIGHBOURS) : token + NEIGHBOURS])


def main() -> None:
    """Measure and write `results/kv_cache.json`."""
    torch.manual_seed(0)
    model = LlamaGen(LlamaGenTransformer().eval())
    record: dict[str, Any] = {"model": "LlamaGen-B, random weights", "guidance_scale": 4.0}
    step_seconds(model)
    runs = [step_seconds(model) for _ in range(ROUNDS)]
    early = statistics.median(around(run, 10) for run in runs)
    late = statistics.median(around(run, 244) for run in runs)
    record["tokens_per_second_at_10"] = 1 / early
    record["tokens_per_second_at_250"] = 1 / late
    record["late_over_early"] = early / late
    print(
        f"tokens per second: {1 / early:.1f} near token 10, {1 / late:.1f} near token 250 "
        f"(ratio {early / late:.3f})"
    )

    def whole(name: str, **options: Any) -> Any:
        sampler = get_sampler(name, **options)
        return lambda: sampler(model, [0], seeds=[0], guidance_scale=4.0)

    tasks = {"ar": whole("ar"), "sjd 16": whole("sjd", window=16)}
    record["image_seconds"] = {n: summary(s) for n, s in alternate(tasks, ROUNDS).items()}
    for name, task in tasks.items():
        passes = task().stats.forward_passes
        median = record["image_seconds"][name]["median"]
        record["image_seconds"][name] |= {"passes": passes, "ms_per_pass": 1e3 * median / passes}
        print(f"{name}: {median:.2f} s, {passes} passes, {1e3 * median / passes:.1f} ms per pass")
    save("kv_cache", record)


if __name__ == "__main__":
    main()
