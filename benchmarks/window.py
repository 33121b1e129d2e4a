"""Does `window="auto"` keep up with the best fixed window, and with `ar` in a batch?

python -m benchmarks.window
python -m benchmarks.window --batch 1 --rounds 5
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

import arvision
from arvision import get_sampler

from .common import alternate, load, save, summary
from .samplers import PROMPTS

FIXED = (1, 4, 8, 16, 32, 64)


def measure(model_name: str, batch: int, images: int, rounds: int, costs: Path) -> dict[str, Any]:
    """Seconds per image of `ar`, every fixed window and "auto", alternating in one process.

    Args:
        model_name: embedded model.
        batch: images per call.
        images: images per round.
        rounds: measured rounds.
        costs: fresh file for the cost table, filled before the clock starts.
    """
    pipe = arvision.load(model_name, device="cpu")
    model, scale = pipe.model, pipe.config["guidance_scale"]
    prompts = PROMPTS[model_name]
    samplers = {"ar": get_sampler("ar")}
    samplers |= {f"window {w}": get_sampler("sjd", window=w) for w in FIXED}
    samplers["auto"] = get_sampler("sjd", window="auto", cost_file=str(costs))

    def draw(sampler: Any) -> Any:
        for first in range(0, images, batch):
            numbers = range(first, first + batch)
            out = sampler(
                model,
                [prompts[k % len(prompts)] for k in numbers],
                seeds=[(5, k) for k in numbers],
                guidance_scale=scale,
            )
        return out

    seconds = alternate({name: lambda s=s: draw(s) for name, s in samplers.items()}, rounds)
    medians = {name: summary(times)["median"] for name, times in seconds.items()}
    best = min((name for name in medians if name.startswith("window")), key=medians.__getitem__)
    rows = {
        name: {key: value / images for key, value in summary(times).items() if key != "rounds"}
        for name, times in seconds.items()
    }
    record = {
        "images": images,
        "rounds": rounds,
        "seconds_per_image": rows,
        "best_fixed": best,
        "auto_over_best_fixed": medians["auto"] / medians[best],
        "speed_up_over_ar": {name: medians["ar"] / median for name, median in medians.items()},
        "auto_windows": draw(samplers["auto"]).stats.windows,
    }
    for name in rows:
        print(
            f"  {model_name} batch {batch} {name:10} {1e3 * rows[name]['median']:7.1f} ms per "
            f"image, {record['speed_up_over_ar'][name]:.2f}x"
        )
    print(f"  auto takes {record['auto_over_best_fixed']:.3f} of the best, {best}")
    return record


def main() -> None:
    """Measure and write `results/window.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--models", nargs="*", default=["llamagen-fashion"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = load("window")
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            for batch in options.batch:
                images = 10 if batch == 1 else batch
                costs = Path(folder) / "costs.json"
                record.setdefault(model, {})[str(batch)] = measure(
                    model, batch, images, options.rounds, costs
                )
    save("window", record)


if __name__ == "__main__":
    main()
