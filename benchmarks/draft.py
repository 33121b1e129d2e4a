"""What does a draft model save over `ar`, and over `sjd`, which needs none?

python -m benchmarks.draft               lengths and thresholds, then wall time at batch 1 and 16
python -m benchmarks.draft --quick       fewer images
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import arvision
from arvision import get_sampler

from .common import alternate, save, summary

MODEL, DRAFT = "llamagen-fashion", "llamagen-fashion-draft"
LENGTHS = (1, 2, 3, 4, 6, 8)
THRESHOLDS = (0.3, 0.5, 0.7, 0.9, 1.0)


def identities(num: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Classes in turn, and seeds of their own."""
    return [k % 10 for k in range(num)], [(3, k) for k in range(num)]


def acceptance(model: Any, draft: Any, scale: float, num: int) -> list[dict[str, Any]]:
    """Tokens per pass of every coupling, length and threshold, each image in a batch of its own."""
    classes, seeds = identities(num)
    plain = get_sampler("ar")(model, classes, seeds=seeds, guidance_scale=scale).tokens
    grid = [(length, 1.0) for length in LENGTHS] + [(8, t) for t in THRESHOLDS[:-1]]
    rows = []
    for coupling in ("gumbel", "independent"):
        for length, threshold in grid:
            sampler = get_sampler(
                "draft",
                draft=draft,
                coupling=coupling,
                max_draft=length,
                stop_threshold=threshold,
            )
            counts = {"drafted": 0, "accepted": 0, "draft_passes": 0, "passes": 0, "equal": 0}
            for k in range(num):
                out = sampler(model, [classes[k]], seeds=[seeds[k]], guidance_scale=scale)
                for name in ("drafted", "accepted", "draft_passes"):
                    counts[name] += out.stats[name]
                counts["passes"] += out.stats.forward_passes
                counts["equal"] += int(torch.equal(out.tokens[0], plain[k]))
            row = {
                "coupling": coupling,
                "max_draft": length,
                "stop_threshold": threshold,
                "tokens_per_pass": model.num_tokens * num / counts["passes"],
                "drafts_per_pass": counts["drafted"] / counts["passes"],
                "acceptance_rate": counts["accepted"] / counts["drafted"],
                "draft_passes_per_pass": counts["draft_passes"] / counts["passes"],
                "equal_to_ar": counts["equal"],
                "images": num,
            }
            rows.append(row)
            print(
                f"  {coupling:12} max_draft {length} stop_threshold {threshold:g}: "
                f"{row['tokens_per_pass']:.2f} tokens per pass of {row['drafts_per_pass']:.2f} "
                f"drafts, {row['acceptance_rate']:.3f} of them accepted, {counts['equal']} of {num} "
                "images equal to ar"
            )
    return rows


def wall_time(pipe: Any, draft: Any, batch: int, num: int) -> dict[str, Any]:
    """Seconds per image of `num` images in batches, all samplers in turn; one thread."""
    model, scale = pipe.model, pipe.config["guidance_scale"]
    samplers = {"ar": get_sampler("ar")}
    samplers |= {f"sjd window {window}": get_sampler("sjd", window=window) for window in (8, 16)}
    for coupling in ("gumbel", "independent"):
        for length, threshold in ((2, 1.0), (3, 1.0), (4, 1.0), (8, 0.5), (8, 0.7)):
            samplers[f"draft {coupling} max_draft {length} stop_threshold {threshold:g}"] = (
                get_sampler(
                    "draft",
                    draft=draft,
                    coupling=coupling,
                    max_draft=length,
                    stop_threshold=threshold,
                )
            )
    classes, seeds = identities(num)

    def sample(sampler: Any) -> float:
        passes = []
        for first in range(0, num, batch):
            part = slice(first, first + batch)
            out = sampler(model, classes[part], seeds=seeds[part], guidance_scale=scale)
            passes += out.stats.passes_per_image
        return model.num_tokens * num / sum(passes)

    tokens_per_pass = {name: sample(sampler) for name, sampler in samplers.items()}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = alternate({name: lambda s=s: sample(s) for name, s in samplers.items()})
    finally:
        torch.set_num_threads(before)
    base = summary(seconds["ar"])["median"]
    out = {}
    for name, times in seconds.items():
        one = {key: value / num for key, value in summary(times).items() if key != "rounds"}
        out[name] = one | {
            "rounds": len(times),
            "speed_up": base / summary(times)["median"],
            "tokens_per_pass": tokens_per_pass[name],
        }
        print(
            f"  batch {batch:2} {name:46} {1e3 * one['median']:6.1f} ms per image "
            f"({1e3 * one['min']:.1f} to {1e3 * one['max']:.1f}), {out[name]['speed_up']:.2f}x, "
            f"{tokens_per_pass[name]:.2f} tokens per pass"
        )
    return out


def main() -> None:
    """Measure and write `results/draft.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--draft", default=DRAFT)
    options = parser.parse_args()
    pipe = arvision.load(MODEL, device="cpu")
    draft = arvision.load(options.draft, device="cpu")
    num = 10 if options.quick else 50
    torch.set_num_threads(1)
    print(f"{MODEL} with {options.draft}")
    record = {
        "model": MODEL,
        "draft": DRAFT,
        "parameters": {
            "target": pipe.transformer.num_parameters(),
            "draft": draft.transformer.num_parameters(),
        },
        "acceptance": acceptance(pipe.model, draft, pipe.config["guidance_scale"], num),
        "wall_time": {
            "batch 1": wall_time(pipe, draft, 1, 4 if options.quick else 8),
            "batch 16": wall_time(pipe, draft, 16, 16),
        },
    }
    save("draft", record)


if __name__ == "__main__":
    main()
