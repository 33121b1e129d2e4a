"""What do the lossy ways of drawing a scale model cost and change? Passes, time and four distances.

python -m benchmarks.scale [--images 256]

Every sampler draws the same classes on `var-fashion` at its recommended settings (`code` finishes with
`var-fashion-small`). Distances from `ar` are taken against an independent `ar` run (other seeds); the
row "ar, other seeds" shows what chance alone gives. The distances are those of `benchmarks.lossy`,
without the likelihood. Time per image is without the decoder, at batch 1 and 16, medians of
interleaved rounds on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

import arvision
from arvision import get_sampler

from .common import save
from .lossy import Study

SAMPLERS = (
    "ar",
    "ar:prune=0.25",
    "ar:prune=0.5",
    "ar:prune=0.75",
    "ar:prune=0.5:prune_scales=1",
    "code:draft_scales=2",
    "code:draft_scales=3",
    "code:draft_scales=4",
    "code:draft_scales=5",
)


class ScaleStudy(Study):
    """Draws with one scale model, at its recommended top-p; see `benchmarks.lossy.Study`."""

    def __init__(self, pipe: Any, num: int, top_p: float) -> None:
        self.top_p = top_p
        super().__init__(pipe, num)

    def draw(self, sampler: Any, seed: int, batch_size: int = 64) -> tuple[Any, float]:
        """Tokens of all classes, and passes per image."""
        return super().draw(sampler.with_options(top_p=self.top_p), seed, batch_size)

    def log_likelihood(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean nats per token of each image under the guided model, [B]."""
        parts = []
        for first in range(0, len(tokens), 64):
            part = tokens[first : first + 64]
            state = self.model.start(self.classes[first : first + 64], self.scale)
            rows = []
            for fed in part.split([side * side for side in self.model.scales], dim=1):
                rows.append(state.next().log_softmax(-1).gather(-1, fed[..., None])[..., 0])
                state.feed(fed)
            parts.append(torch.cat(rows, dim=1).mean(1))
        return torch.cat(parts)


def seconds_per_image(model: Any, sampler: Any, scale: float, batch: int, seed: int) -> float:
    """Wall time of one call, without the decoder."""
    started = time.perf_counter()
    seeds = [(seed, image) for image in range(batch)]
    sampler(model, [k % 10 for k in range(batch)], seeds=seeds, guidance_scale=scale)
    return (time.perf_counter() - started) / batch


def main() -> None:
    """Measure and write `results/scale.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    large = arvision.load("var-fashion", device="cpu")
    small = arvision.load("var-fashion-small", device="cpu")
    top_p = large.config["top_p"]
    studies = {
        "var-fashion": ScaleStudy(large, options.images, top_p),
        "var-fashion-small": ScaleStudy(small, options.images, top_p),
    }
    reference = studies["var-fashion"]
    rows, timed = [], []
    for spec in (*SAMPLERS, "ar (var-fashion-small)"):
        name = "var-fashion-small" if "small" in spec or spec.startswith("code") else "var-fashion"
        study = studies[name]
        sampler = get_sampler(spec.split(" ")[0])
        if "draft" in sampler.needs:
            sampler = sampler.bind(draft=large)
        tokens, passes = study.draw(sampler, seed=0)
        row = {"sampler": spec, "model": name, "lossless": sampler.is_exact, "passes": passes}
        # Distances are always from var-fashion itself.
        row |= reference.measure(tokens)
        if spec == "ar":
            reference.plain = tokens
        rows.append(row)
        timed.append((study.model, sampler.with_options(top_p=top_p)))
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    other, passes = reference.draw(get_sampler("ar"), seed=2)
    chance = {"sampler": "ar, other seeds", "lossless": True, "passes": passes}
    for batch in (1, 16):
        taken: list[list[float]] = [[] for _ in timed]
        for round_number in range(options.rounds + 1):
            for index, (model, sampler) in enumerate(timed):
                spent = seconds_per_image(model, sampler, reference.scale, batch, round_number)
                if round_number:  # the first round warms up
                    taken[index].append(spent)
        for row, times in zip(rows, taken, strict=True):
            row[f"milliseconds_batch_{batch}"] = 1000 * statistics.median(times)
            row[f"milliseconds_batch_{batch}_range"] = [1000 * min(times), 1000 * max(times)]
    for row in rows:
        print(row["sampler"], row["milliseconds_batch_1"], row["milliseconds_batch_16"], flush=True)
    rows.append(chance | reference.measure(other))
    facts = {"images": options.images, "guidance_scale": reference.scale, "top_p": top_p}
    save("scale", facts | {"samplers": rows})


if __name__ == "__main__":
    main()
