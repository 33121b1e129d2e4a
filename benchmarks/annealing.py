"""What do shorter denoising chains late in the image cost on `mar-fashion`, and what do they save?

python -m benchmarks.annealing [--images 50] [--rounds 3]

`ar` with `final_head_steps`: the chains shrink evenly from the model's 50 steps to that number as the
image is drawn. Quality and time are measured as in `benchmarks.cspd`, batch 1.

Paper: Zhao et al., "DiSA: Diffusion Step Annealing in Autoregressive Image Generation", 2025.
"""

from __future__ import annotations

import argparse

import torch

from .common import load, save
from .cspd import Study

SAMPLERS = ("ar", "ar:final_head_steps=20", "ar:final_head_steps=5")


def main() -> None:
    """Measure and write `results/annealing.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    record, study = load("annealing"), Study(options.images, SAMPLERS)
    record |= {"images": options.images, "rounds": options.rounds}
    record["seconds"] = {"1": study.time(1, options.rounds)}
    record["quality"] = study.quality()
    save("annealing", record, ["quality", "time"])


if __name__ == "__main__":
    main()
