"""What the benchmarks share: alternating timing, the machine, results as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch

import arvision

RESULTS = Path(__file__).parent / "results"


def alternate(
    tasks: Mapping[str, Callable[[], Any]],
    rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each task in each round: one unmeasured round, then all tasks in turn.

    Args:
        tasks: what is measured, by name.
        rounds: measured ones.
        clock: `time.process_time` counts CPU seconds, which other work on the machine leaves alone.
    """
    for task in tasks.values():
        task()
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds):
        order = list(tasks.items())
        for name, task in order if number % 2 == 0 else reversed(order):
            started = clock()
            task()
            seconds[name].append(clock() - started)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and spread of some measurements."""
    return {
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "rounds": len(seconds),
    }


def environment() -> dict[str, Any]:
    """The machine, versions and commit that a result belongs to."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "date": date.today().isoformat(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "arvision": arvision.__version__,
        "commit": commit.stdout.strip() or None,
        "load_average": os.getloadavg()[0],
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def load(name: str) -> dict[str, Any]:
    """A result written by `save`; empty where there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def save(name: str, record: dict[str, Any], parts: Iterable[str] = ()) -> Path:
    """Write a result beside the machine it was measured on.

    Args:
        name: of the file.
        record: figures.
        parts: those measured now, where others may be older; each keeps its own environment.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    here = environment()
    if parts := list(parts):
        record = record | {
            "environments": record.get("environments", {}) | dict.fromkeys(parts, here)
        }
    path.write_text(json.dumps({**record, "environment": here}, indent=1) + "\n")
    print(f"wrote {path}")
    return path
