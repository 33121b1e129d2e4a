"""Is the Frechet distance exact at D = 2048, and no slower or larger than torchmetrics' FID?

    python -m benchmarks.eval_frechet

First the error against a closed form, full rank and rank 100. Then 2 x 10,000 features of width
2048, the same for both packages, each in a process of its own, in turn: seconds, and peak memory
above that of the process with the features in hand.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from arvision.eval import Moments, frechet_distance

from .common import save, summary

DIM, ROWS, BATCH, ROUNDS = 2048, 10_000, 500, 3


def spd(rank: int, seed: int) -> torch.Tensor:
    """A covariance of that rank."""
    draw = torch.Generator().manual_seed(seed)
    factor = torch.randn(DIM, rank, generator=draw, dtype=torch.float64)
    return factor @ factor.T / rank


def closed_form(rank: int) -> dict[str, float]:
    """Error against tr A + tr B - 2 tr(T A) with B = T A T, and seconds of the distance."""
    a, t, zero = spd(rank, 1), spd(DIM, 2), torch.zeros(DIM)
    b = t @ a @ t
    b = (b + b.T) / 2
    expected = float(a.trace() + b.trace() - 2 * (t @ a).trace())
    seconds, value, busy = [], 0.0, time.process_time()
    for _ in range(ROUNDS):
        started = time.perf_counter()
        value = frechet_distance(zero, a, zero, b)
        seconds.append(time.perf_counter() - started)
    busy = (time.process_time() - busy) / ROUNDS
    error = abs(value - expected) / expected
    return {"relative_error": error, "cpu_seconds": busy, **summary(seconds)}


def features(seed: int) -> torch.Tensor:
    """Rows [ROWS, DIM] float32 with a decaying spectrum, like a network's."""
    draw = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, DIM + 1) ** -0.5
    mix = torch.randn(DIM, DIM, generator=draw) / DIM**0.5
    return (torch.randn(ROWS, DIM, generator=draw) * scale) @ mix + 0.4 * seed * scale


def ours(real: torch.Tensor, fake: torch.Tensor) -> float:
    """Streaming moments and the distance."""
    sides = []
    for rows in (real, fake):
        moments = Moments.zero(DIM)
        for part in rows.split(BATCH):
            moments.add(part)
        sides += [moments.mean, moments.covariance()]
    return frechet_distance(*sides)


def theirs(real: torch.Tensor, fake: torch.Tensor) -> float:
    """torchmetrics' FID, fed with the features as they are."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    network: Any = torch.nn.Identity()
    network.num_features = DIM
    metric = FrechetInceptionDistance(feature=network, antialias=False)
    for is_real, rows in ((True, real), (False, fake)):
        for part in rows.split(BATCH):
            metric.update(part, real=is_real)
    return float(metric.compute())


def contest(name: str) -> None:
    """One contestant: prints JSON."""
    from torchmetrics.image.fid import FrechetInceptionDistance  # noqa: F401 (both pay for it)

    sides = features(0), features(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, busy = time.perf_counter(), time.process_time()
    value = {"arvision": ours, "torchmetrics": theirs}[name](*sides)
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mb = (after - before) / 1024
    print(json.dumps({"value": value, "seconds": seconds, "cpu_seconds": busy, "mb": mb}))


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--contest")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.contest:
        contest(options.contest)
        return
    record: dict[str, Any] = {
        "full rank": closed_form(DIM),
        "rank 100": closed_form(100),
    }
    print(json.dumps(record), flush=True)
    runs: dict[str, list[dict[str, float]]] = {"arvision": [], "torchmetrics": []}
    for _ in range(ROUNDS):
        for name, found in runs.items():
            command = [sys.executable, "-m", "benchmarks.eval_frechet", "--contest", name]
            command += ["--threads", str(options.threads)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(name, found[-1], flush=True)
    record["contest"] = {
        name: {
            "seconds": summary([run["seconds"] for run in found]),
            "cpu_seconds": statistics.median(run["cpu_seconds"] for run in found),
            "peak_mb": statistics.median(run["mb"] for run in found),
            "value": found[0]["value"],
        }
        for name, found in runs.items()
    }
    save("eval_frechet", record)


if __name__ == "__main__":
    main()
