"""Do trees save as much on a larger grid? A model of 16 x 16 tokens, trained for minutes.

python -m benchmarks.grid [--runs runs/grid] [--steps 800] [--images 12]

Fashion-MNIST at 32 x 32 pixels, two pixels a token and side, so that a picture has 256 tokens and a row
of the grid 16. `arvision train --data` makes the model (kept in --runs: a second call only measures);
then tokens per pass are counted as `benchmarks.trees` counts them. The model is small and hardly trained, so
the figures tell how the methods compare, not what a good model would give.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import arvision
from arvision.training.data import CLASS_NAMES, load_fashion
from arvision.training.own import train
from arvision.training.own_recipes import OwnSettings

from .common import save
from .trees import SIZES, methods, passes

METHODS = ("chain, maximal", "chain, gumbel", "chain, memory", "drift, above", "drift, memory")
PICTURES = 6000


def trained(runs: Path, steps: int) -> tuple[Any, dict[str, Any]]:
    """The pipeline, and the figures of its training."""
    folder = runs / "pictures"
    if not folder.exists():
        images, labels = load_fashion("train")
        for index in range(PICTURES):
            place = folder / CLASS_NAMES[int(labels[index])]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[index].numpy()).save(place / f"{index}.png")
    settings = OwnSettings(size=32, factor=2, steps=steps, batch_size=16, mixed_precision="bf16")
    figures = train(folder, runs / "model", settings)
    return arvision.load(runs / "model", device="cpu"), figures


def larger_grid_table(record: dict[str, Any]) -> str:
    """Tokens per pass by method and candidates."""
    head = [f"{size} candidates" for size in SIZES]
    lines = [
        "| method | " + " | ".join(head) + " | same as `ar` |",
        "|" + " --- |" * (len(SIZES) + 2),
    ]
    for name in METHODS:
        rows = [row for row in record["passes"] if row["method"] == name]
        cells = [f"{row['tokens_per_pass']:.2f}" for row in rows]
        same, num = (sum(row[key] for row in rows) for key in ("equal_to_ar", "images"))
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {same} of {num} |")
    found, row = record["training"], record["passes"][0]
    loss = found["held_out_loss"]
    return "\n".join(lines) + (
        f"\n\n16 x 16 tokens of 512 codes, {row['images']} images in batches of {row['batch']}, float32, "
        f"guidance 2. The model: {found['steps']['transformer']} steps on {found['pictures']:,} "
        f"pictures, held-out loss {loss['first']:.2f} to {loss['best']:.2f} nats."
    )


def main() -> None:
    """Train, measure and write `results/trees_grid.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/grid"))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipe, figures = trained(options.runs, options.steps)
    made = {name: make for name, make in methods(None).items() if name in METHODS}
    found = passes(pipe, list(range(10)), options.images, 1, options.batch, made)
    save("trees_grid", {"training": figures, "passes": found}, ["passes"])


if __name__ == "__main__":
    main()
