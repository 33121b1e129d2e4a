"""LlamaGen-B against the authors' code: the same random weights, one thread, alternating in one process.

    PYTHONPATH=../LlamaGen python -m benchmarks.official     # a checkout of the authors' repository

A draw is cut after some tokens, as both take as long for each (`benchmarks/kv_cache.py`). The authors' code
has no int8: ours is held against their float32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from arvision import ARPipeline, get_sampler
from arvision.models import LlamaGenTransformer
from arvision.official import official_draw

from .common import alternate, save, summary

CASES = (("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "float32"))
"""Our weights, and theirs."""


def pipeline(dtype: torch.dtype) -> ARPipeline:
    """LlamaGen-B at 256 pixels, with random weights."""
    torch.manual_seed(0)
    return ARPipeline(LlamaGenTransformer().eval(), None, guidance_scale=4.0).to(dtype)


def measure(ours: str, theirs: str, num: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of CPU for each token of both."""
    pipe = pipeline(getattr(torch, theirs))
    draw = official_draw(pipe)
    if ours == "int8":
        pipe.quantize("int8")
    sampler = get_sampler("ar")

    def our_draw() -> None:
        # `num` tokens: the prefill gives the first.
        sampler(
            pipe.model,
            [1],
            seeds=[0],
            guidance_scale=4.0,
            on_step=lambda number, _: number >= num - 1,
        )

    tasks = {"arvision": our_draw, "authors": lambda: draw([1], num)}
    seconds = alternate(tasks, rounds, clock=time.process_time)
    told = {name: summary([1e3 * each / num for each in times]) for name, times in seconds.items()}
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {"ms_per_token": told, "times_as_fast": medians["authors"] / medians["arvision"]}


def main() -> None:
    """Measure and write `results/official.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {"tokens": given.tokens}
    with torch.no_grad():
        for ours, theirs in CASES:
            name = f"{ours} against {theirs}"
            record[name] = measure(ours, theirs, given.tokens, given.rounds)
            print(name, f"{record[name]['times_as_fast']:.2f}x", record[name]["ms_per_token"])
    save("official", record)


if __name__ == "__main__":
    main()
