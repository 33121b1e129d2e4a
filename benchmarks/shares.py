"""Where the time of an image goes, and how much of it speculation saves with the decoder included.

One image of `llamagen-fashion` at guidance 3, one thread, float32. Writes `results/shares.json` and, from that,
the plot of the README, `docs/images/speed.svg` (`--plot` draws it anew without measuring).

    python -m benchmarks.shares
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from arvision import get_sampler, load
from arvision.decoding.cache import KVCache
from arvision.decoding.drift import DriftDrafter
from arvision.decoding.jacobi import JacobiDrafter
from arvision.kernels.linear import Linear
from arvision.kernels.sampling import Shaping
from arvision.models.llamagen import transformer

from . import common

SPECS = ("ar", "sjd", "sjd:window=32:tree=drift")
PLOT = Path(__file__).parents[1] / "docs" / "images" / "speed.svg"
PARTS: dict[str, list[tuple[Any, str]]] = {
    "matrices": [(Linear, "forward")],
    "attention": [(transformer, "attend")],
    "cache": [(KVCache, name) for name in ("begin", "update", "commit", "advance")],
    "rest of the network": [(transformer.LlamaGenTransformer, "forward")],
    "laws": [(Shaping, "__call__")],
    "drafts": [(kind, n) for kind in (JacobiDrafter, DriftDrafter) for n in ("propose", "observe")],
}
"""Parts of a pass, and what is timed for each; what runs inside another part counts for itself alone."""


class Clock:
    """Seconds of the parts, without those of parts inside them."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._inner = [0.0]

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose own seconds go to `part`."""

        def run(*given: Any, **named: Any) -> Any:
            self._inner.append(0.0)
            started = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                took = time.perf_counter() - started
                self.seconds[part] += took - self._inner.pop()
                self._inner[-1] += took

        return run


def profile(pipe: Any, spec: str) -> dict[str, float]:
    """Share of the time of drawing (without the decoder) by part."""
    sampler, clock = pipe.bind(get_sampler(spec), pipe.model), Clock()

    def draw() -> None:
        sampler(pipe.model, [8], seeds=[0], guidance_scale=3.0)

    draw()
    with ExitStack() as stack:
        for part, places in PARTS.items():
            for owner, name in places:
                timed = clock.timed(part, getattr(owner, name))
                stack.enter_context(patch.object(owner, name, timed))
        started = time.perf_counter()
        for _ in range(5):
            draw()
        whole = time.perf_counter() - started
    known = {part: seconds / whole for part, seconds in clock.seconds.items()}
    return known | {"rule, books and loop": 1 - sum(known.values())}


def speeds(pipe: Any) -> dict[str, Any]:
    """Milliseconds of CPU of an image, decoder included, and its passes."""
    passes: dict[str, list[int]] = {spec: [] for spec in SPECS}

    def task(spec: str) -> Callable[[], Any]:
        def draw() -> None:
            for seed in range(4):
                out = pipe("bag", sampler=get_sampler(spec), seed=seed, progress=False)
                passes[spec].append(out.stats.forward_passes)

        return draw

    times = common.alternate({spec: task(spec) for spec in SPECS}, 5, clock=time.process_time)
    return {
        spec: common.summary([1e3 * each / 4 for each in seconds])
        | {"passes": statistics.mean(passes[spec])}
        for spec, seconds in times.items()
    }


def plot() -> None:
    """`docs/images/speed.svg`: passes and milliseconds of an image."""
    from matplotlib.figure import Figure

    found = common.load("shares")["speeds"]
    names = {"ar": "ar", "sjd": "sjd, window 16", "sjd:window=32:tree=drift": "sjd, tree of 32"}
    figure = Figure(figsize=(7, 1.9), layout="constrained")
    for axis, key, label in zip(
        figure.subplots(1, 2),
        ("passes", "median"),
        ("passes of an image", "ms of an image"),
        strict=True,
    ):
        values = [found[spec][key] for spec in SPECS]
        bars = axis.barh(
            [names[spec] for spec in SPECS], values, color=["#999", "#3572b0", "#3572b0"]
        )
        axis.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
        axis.set_title(label, fontsize=9)
        axis.set_xlim(0, 1.15 * max(values))
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(PLOT, format="svg", metadata={"Date": None})
    print(f"wrote {PLOT}")


def main() -> None:
    """Measure and write, or only draw."""
    if "--plot" not in sys.argv:
        torch.set_num_threads(1)
        pipe = load("llamagen-fashion")
        record = {"profile": {spec: profile(pipe, spec) for spec in SPECS}}
        common.save("shares", record | {"speeds": speeds(pipe)})
    plot()


if __name__ == "__main__":
    main()
