"""Does an edited picture keep what was given? Errors of the kept part, and a picture to look at.

python -m benchmarks.editing --out docs/images/editing.png
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

import arvision
from arvision.files import replacing
from arvision.sheet import labelled_rows

MODELS = {"llamagen-fashion": 3.0, "var-fashion": None, "mar-fashion": None}
"""Models, and the guidance scale of the edits (None: the recommended one)."""

CLASSES = ["sneaker", "bag", "pullover", "ankle boot", "dress", "coat", "sandal", "shirt"]


def masks(size: tuple[int, int]) -> dict[str, Image.Image]:
    """What is redrawn: the lower half, the right half, a hole, and all around a core."""
    width, height = size
    boxes = {
        "lower half": (0, height // 2, width, height),
        "right half": (width // 2, 0, width, height),
        "hole": (width // 4, height // 4, 3 * width // 4, 3 * height // 4),
    }
    found = {}
    for name, (left, top, right, bottom) in boxes.items():
        found[name] = Image.new("L", size)
        ImageDraw.Draw(found[name]).rectangle((left, top, right - 1, bottom - 1), fill=255)
    found["outside"] = Image.eval(found["hole"], lambda value: 255 - value)
    return found


def as_array(image: Any) -> np.ndarray:
    """Levels 0..255 [H, W, 3]."""
    return np.asarray(image.convert("RGB"), dtype=np.float64)


def errors(name: str, num: int, **options: Any) -> list[dict[str, Any]]:
    """Mean distance (levels of 255) of kept pixels to the source: edited, and only encoded and decoded."""
    pipe = arvision.load(name, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    prompts = [CLASSES[image % len(CLASSES)] for image in range(num)]
    sources = pipe(prompts, seed=1).images
    pixels = torch.from_numpy(np.stack([as_array(one) for one in sources])).permute(0, 3, 1, 2)
    again = pipe.model.decode(pipe.model.tokens_of((pixels / 127.5 - 1).float()))
    again = (again.permute(0, 2, 3, 1).numpy() + 1) * 127.5
    rows = []
    for title, mask in masks(sources[0].size).items():
        out = pipe(prompts, image=sources, mask_image=mask, seed=2, **options)
        kept = np.asarray(mask) == 0
        source = pixels.permute(0, 2, 3, 1).numpy()
        edited = np.stack([as_array(one) for one in out.images])
        rows.append(
            {
                "model": name,
                "mask": title,
                **options,
                "given": out.stats.given[0],
                "tokens": out.stats.tokens,
                "passes": out.stats.forward_passes,
                "tokenizer": round(float(np.abs(again - source)[:, kept].mean()), 2),
                "edited": round(float(np.abs(edited - source)[:, kept].mean()), 2),
            }
        )
    return rows


def picture(name: str, options: dict[str, Any]) -> list[tuple[str, list[Image.Image]]]:
    """Rows of a source, the mask over it, and six edits."""
    pipe = arvision.load(name, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for source_class, title, wanted in (
        ("sneaker", "lower half", ["sneaker", "ankle boot", "bag"]),
        ("pullover", "right half", ["pullover", "coat", "dress"]),
        ("bag", "hole", ["bag", "bag", "bag"]),
    ):
        source = pipe(source_class, seed=4).images[0]
        mask = masks(source.size)[title]
        shown = Image.composite(Image.new("RGB", source.size, (230, 120, 40)), source, mask)
        prompts = [each for each in wanted for _ in range(2)]
        out = pipe(prompts, image=source, mask_image=mask, seed=6, **options)
        label = f"{name}: {', '.join(dict.fromkeys(wanted))}"
        rows.append((label, [source, shown, *out.images]))
    return rows


def main() -> None:
    """Print a line of JSON for each model and mask, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=32)
    parser.add_argument("--out", default=None)
    parser.add_argument("--known-scales", type=int, default=None)
    arguments = parser.parse_args()
    rows: list[Any] = []
    for name, scale in MODELS.items():
        options: dict[str, Any] = {"guidance_scale": scale}
        if name.startswith("var") and arguments.known_scales:
            options["known_scales"] = arguments.known_scales
        for row in errors(name, arguments.num, **options):
            print(json.dumps(row), flush=True)
        rows += picture(name, options)
    if arguments.out:
        labels = ["source", "redrawn", *(f"{number}" for number in range(1, 7))]
        with replacing(arguments.out) as path:
            sheet = labelled_rows(rows, labels).convert("RGB")
            sheet.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
