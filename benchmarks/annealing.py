"""What do shorter denoising chains late in the image cost on `mar-fashion`, and what do they save?

python -m benchmarks.annealing [--images 50] [--rounds 3] [--part all|quality|time]

`ar` with `final_head_steps`: the chains shrink evenly from the model's 50 steps to that number as the
image is drawn. Quality is measured as in `benchmarks.cspd`. Time: processor seconds of one thread for
an image, decoder excluded, medians of alternating rounds; others on the machine matter less to them
than to wall time.

Paper: Zhao et al., "DiSA: Diffusion Step Annealing in Autoregressive Image Generation", 2025.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from .common import load, save, summary
from .cspd import Study

SAMPLERS = ("ar", "ar:final_head_steps=20", "ar:final_head_steps=5")


def processor_seconds(study: Study, rounds: int) -> dict[str, Any]:
    """Of an image by each sampler, batch 1, after one image that does not count."""
    samplers = {spec: study.sampler(spec) for spec in SAMPLERS}
    study.run(samplers["ar"], 0, 1, 0)
    seconds: dict[str, list[float]] = {spec: [] for spec in SAMPLERS}
    for number in range(rounds):
        for spec in SAMPLERS if number % 2 == 0 else SAMPLERS[::-1]:
            started = time.process_time()
            study.run(samplers[spec], number, 1, 0)
            seconds[spec].append(time.process_time() - started)
    return {spec: summary(values) for spec, values in seconds.items()}


def main() -> None:
    """Measure and write `results/annealing.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=("all", "quality", "time"), default="all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record, study = load("annealing"), Study(options.images, SAMPLERS)
    parts = ["quality", "time"] if options.part == "all" else [options.part]
    if "time" in parts:
        record |= {"rounds": options.rounds}
        record["processor_seconds"] = processor_seconds(study, options.rounds)
        print(record["processor_seconds"])
    if "quality" in parts:
        record |= {"images": options.images, "quality": study.quality()}
    save("annealing", record, parts)


if __name__ == "__main__":
    main()
