"""Does the memory of moments depend on N, and does precision and recall at 10k x 10k fit in 2 GB?

    python -m benchmarks.eval_memory

Each part runs in a process of its own, which reports its peak above the interpreter with torch.
Correctness first: the moments of the shorter run against numpy, precision against itself.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch

from arvision.eval import GroupedMoments, precision_recall

from .common import save

DIM = 2048


def peak_mb() -> float:
    """Largest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def moments(rows: int, num_groups: int) -> dict[str, float]:
    """Stream `rows` features of width 2048 through grouped moments."""
    draw = torch.Generator().manual_seed(0)
    grouped, kept, before = GroupedMoments(num_groups), [], peak_mb()
    started = time.perf_counter()
    for start in range(0, rows, 500):
        part = torch.randn(500, DIM, generator=draw)
        grouped.update(part, range(start, start + 500))
        if rows <= 2000:
            kept.append(part)
    total = grouped.total()
    seconds, found = time.perf_counter() - started, peak_mb() - before
    if kept:
        expected = np.cov(torch.cat(kept).double().numpy(), rowvar=False)
        assert np.abs(total.covariance().numpy() - expected).max() < 1e-12
    return {"rows": rows, "groups": num_groups, "seconds": seconds, "peak_mb": found}


def shares(rows: int, width: int = DIM) -> dict[str, float]:
    """Precision and recall of rows x rows."""
    a = torch.randn(200, 16)
    assert precision_recall(a, a)["precision"].value == 1
    draw = torch.Generator().manual_seed(0)
    first, second = (torch.randn(rows, width, generator=draw) for _ in range(2))
    before, started = peak_mb(), time.perf_counter()
    found = precision_recall(first, second)
    seconds = time.perf_counter() - started
    own = 2 * rows * width * 4 / 2**20
    return {
        "rows": rows,
        "seconds": seconds,
        "peak_mb": peak_mb() - before,
        "with_features_mb": peak_mb() - before + own,
        "precision": found["precision"].value,
    }


PARTS: dict[str, Any] = {
    "moments 2k": lambda: moments(2_000, 20),
    "moments 10k": lambda: moments(10_000, 20),
    "moments 50k": lambda: moments(50_000, 20),
    "moments 50k, one group": lambda: moments(50_000, 1),
    "precision 10k x 10k": lambda: shares(10_000),
}


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--part")
    options = parser.parse_args()
    torch.set_num_threads(2)
    if options.part:
        print(json.dumps(PARTS[options.part]()))
        return
    record = {}
    for name in PARTS:
        command = [sys.executable, "-m", "benchmarks.eval_memory", "--part", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        record[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, record[name], flush=True)
    save("eval_memory", record)


if __name__ == "__main__":
    main()
