"""What weights of fewer bits save, and how far the quantised model is from the original.

    python -m benchmarks.quantize [--images 64]

`llamagen-fashion` at guidance 3. Distances are between the laws of the original and of the quantised model
along images that the original drew: the mean Kullback-Leibler divergence per token, and how often
both have the same most likely token. Class consistency is of images that each model draws itself. Times
are CPU seconds of one thread, alternating. Needs the extra `quantize`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor

import arvision
from arvision import get_sampler
from arvision.decoding.teacher_forcing import teacher_forced
from arvision.eval.classifier import class_consistency
from arvision.quantization import QUANTIZATIONS

from .common import save

GUIDANCE = 3.0


def stored(network: torch.nn.Module) -> int:
    """Bytes of all parameters, of quantised ones those of their parts."""
    total = 0
    for parameter in network.parameters():
        is_plain = type(parameter) is torch.nn.Parameter
        flatten: Any = getattr(parameter, "__tensor_flatten__", None)
        parts = [parameter] if is_plain else [getattr(parameter, name) for name in flatten()[0]]
        total += sum(part.numel() * part.element_size() for part in parts)
    return total


def laws(pipe: Any, classes: list[int], tokens: Tensor) -> Tensor:
    """Laws [B, N, V] along images, in logarithms."""
    return teacher_forced(pipe.model, classes, tokens, GUIDANCE).log_softmax(-1)


def main() -> None:
    """Measure, print and write `results/quantize.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ways = [None, *QUANTIZATIONS]
    pipes = {how: arvision.load("llamagen-fashion", device="cpu", quantize=how) for how in ways}
    classes = [image % 10 for image in range(options.images)]
    seeds = [(0, image) for image in range(options.images)]
    plain = get_sampler("ar")

    def draw(how: str | None, num: int, output_type: str = "latent") -> Any:
        return pipes[how](
            classes[:num],
            seed=seeds[:num],
            sampler=plain,
            guidance_scale=GUIDANCE,
            output_type=output_type,
            progress=False,
        )

    tokens = draw(None, options.images).tokens
    whole = laws(pipes[None], classes, tokens)
    times: dict[str | None, list[float]] = {how: [] for how in ways}
    for _ in range(options.rounds):
        for how in ways:
            started = time.process_time()
            stats = draw(how, 1).stats
            times[how].append((time.process_time() - started) / stats.forward_passes)
    rows = []
    for how in ways:
        other = laws(pipes[how], classes, tokens)
        pixels = (draw(how, options.images, "pt").images * 255).round().to(torch.uint8)
        row = {
            "weights": how or "float32",
            "mebibytes": round(stored(pipes[how].transformer) / 2**20, 2),
            "divergence": float((whole.exp() * (whole - other)).sum(-1).mean()),
            "same_best": float((whole.argmax(-1) == other.argmax(-1)).double().mean()),
            "class_consistency": float(class_consistency(pixels, torch.tensor(classes))),
            "ms_per_pass": round(1e3 * statistics.median(times[how]), 2),
            "ms_spread": [round(1e3 * pick(times[how]), 2) for pick in (min, max)],
        }
        rows.append(row)
        print(row, flush=True)
    save("quantize", {"images": options.images, "rows": rows})


if __name__ == "__main__":
    main()
