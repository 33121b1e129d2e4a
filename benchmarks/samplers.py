"""How many passes, and how much time, does `sjd` save over `ar` on the embedded models?

python -m benchmarks.samplers            tokens per pass over coupling x window, wall time at batch 1
python -m benchmarks.samplers --images 20 --part passes      fewer images, one of the two parts
python -m benchmarks.samplers --dtype bfloat16 --part time
python -m benchmarks.samplers --part grid     coupling x init x window
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import arvision
from arvision import get_sampler
from arvision.decoding.jacobi import INITS

from .common import alternate, load, save, summary

WINDOWS = (2, 4, 8, 16, 32, 64)
GRID_WINDOWS = (4, 8, 16, 32, 64)
COUPLINGS = ("independent", "maximal", "gumbel")
PROMPTS: dict[str, list[Any]] = {
    "llamagen-fashion": list(range(10)),
    "llamagen-fashion-t2i": [
        f"a {tone} {garment}"
        for tone, garment in zip(
            ("dark", "grey", "light") * 4,
            ("ankle boot", "sneaker", "shirt", "bag", "dress", "coat", "sandal", "pullover",
             "trousers", "t-shirt"),
            strict=False,
        )
    ],
}  # fmt: skip


def passes(pipe: Any, prompts: list, num: int) -> list[dict[str, Any]]:
    """Tokens per pass of every coupling and window, and how many images equal `ar`'s."""
    conditions = [prompts[k % len(prompts)] for k in range(num)]
    seeds = [(1, k) for k in range(num)]
    scale = pipe.config["guidance_scale"]
    model = pipe.model
    plain = get_sampler("ar")(model, conditions, seeds=seeds, guidance_scale=scale).tokens
    rows = []
    for coupling in COUPLINGS:
        for window in WINDOWS:
            sampler = get_sampler("sjd", coupling=coupling, window=window)
            out = sampler(model, conditions, seeds=seeds, guidance_scale=scale)
            rows.append(
                {
                    "coupling": coupling,
                    "window": window,
                    "tokens_per_pass": out.stats.tokens_per_pass,
                    "passes": sum(out.stats.passes_per_image) / num,
                    "equal_to_ar": int((out.tokens == plain).all(1).sum()),
                    "tokens_equal": float((out.tokens == plain).double().mean()),
                    "images": num,
                }
            )
            print(
                f"  {coupling:12} window {window:3}: {out.stats.tokens_per_pass:.2f} tokens per "
                f"pass, {rows[-1]['equal_to_ar']} of {num} images equal to ar"
            )
    return rows


def grid(pipe: Any, prompts: list, num: int) -> list[dict[str, Any]]:
    """Tokens per pass of every coupling, way to start a position and window."""
    conditions = [prompts[k % len(prompts)] for k in range(num)]
    seeds = [(1, k) for k in range(num)]
    scale = pipe.config["guidance_scale"]
    rows = []
    for coupling in COUPLINGS:
        for init in [name for name in INITS if coupling == "gumbel" or name != "memory"]:
            for window in GRID_WINDOWS:
                sampler = get_sampler("sjd", coupling=coupling, init=init, window=window)
                out = sampler(pipe.model, conditions, seeds=seeds, guidance_scale=scale)
                row = {"coupling": coupling, "init": init, "window": window, "images": num}
                rows.append(row | {"tokens_per_pass": out.stats.tokens_per_pass})
            cells = " ".join(f"{row['tokens_per_pass']:.2f}" for row in rows[-len(GRID_WINDOWS) :])
            print(f"  {coupling:12} {init:14} windows {GRID_WINDOWS}: {cells}")
    return rows


def wall_time(pipe: Any, prompts: list, threads: int, num: int) -> dict[str, Any]:
    """Seconds for `num` images one by one, `ar` and `sjd` alternating."""
    model, scale = pipe.model, pipe.config["guidance_scale"]
    samplers = {"ar": get_sampler("ar")}
    for window in (8, 16, 32):
        for coupling in ("gumbel", "maximal"):
            samplers[f"sjd {coupling} {window}"] = get_sampler(
                "sjd", window=window, coupling=coupling
            )

    def draw(sampler: Any) -> None:
        for k in range(num):
            condition = prompts[k % len(prompts)]
            out = sampler(model, [condition], seeds=[(2, k)], guidance_scale=scale)
            model.decode(out.tokens)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seconds = alternate({name: lambda s=s: draw(s) for name, s in samplers.items()})
    finally:
        torch.set_num_threads(before)
    base = summary(seconds["ar"])["median"]
    out = {}
    for name, times in seconds.items():
        one = {key: value / num for key, value in summary(times).items() if key != "rounds"}
        out[name] = one | {"speed_up": base / summary(times)["median"]}
        print(
            f"  {threads} thread(s) {name:16} {1e3 * one['median']:7.1f} ms per image "
            f"({1e3 * one['min']:.1f} to {1e3 * one['max']:.1f}), {out[name]['speed_up']:.2f}x"
        )
    return out


def main() -> None:
    """Measure and write `results/samplers.json` (float32) or `results/samplers_DTYPE.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--part", choices=["passes", "time", "grid"], default=None)
    options = parser.parse_args()
    name = "samplers" if options.dtype == "float32" else f"samplers_{options.dtype}"
    record: dict[str, Any] = load(name) if options.part else {}
    record["dtype"] = options.dtype
    parts = [options.part] if options.part else ["passes", "time", "grid"]
    for model, prompts in PROMPTS.items():
        pipe = arvision.load(model, device="cpu", dtype=options.dtype)
        print(model)
        mine = record.setdefault(model, {})
        if "grid" in parts:
            mine["grid"] = grid(pipe, prompts, options.images)
        if "passes" in parts:
            mine["passes"] = passes(pipe, prompts, options.images)
        if "time" in parts:
            mine["wall_time"] = {
                str(threads): wall_time(pipe, prompts, threads, 6) for threads in (1, 2)
            }
    save(name, record, parts)


if __name__ == "__main__":
    main()
