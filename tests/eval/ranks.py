"""Started under torchrun: extract on all ranks, save rank 0's moments; and sync a metric.

python ranks.py SAMPLES OUT
"""

from __future__ import annotations

import sys

import torch

from arvision.eval import FrechetDistance, get_extractor, open_source
from arvision.eval.distributed import processes, rank_and_size
from arvision.eval.extract import extract


def moments(samples: str) -> dict | None:
    """Moments of a source, on rank 0."""
    found = extract(open_source(samples), get_extractor("random-conv"), progress=False)
    if found is None:
        return None
    whole = found.moments
    return {"count": whole.count, "mean": whole.mean, "scatter": whole.scatter}


def metric_value(samples: str, rank: int, size: int) -> float:
    """A distance between two halves, each rank with its share."""
    source = open_source(samples)
    metric = FrechetDistance("random-conv")
    for number, start in enumerate(range(0, 1000, 50)):
        if number % size == rank:
            metric.update(source.read(start, start + 50), real=number < 10)
    return float(metric.compute())


if __name__ == "__main__":
    torch.set_num_threads(1)
    with processes():
        rank, size = rank_and_size()
        result = {"moments": moments(sys.argv[1]), "metric": metric_value(sys.argv[1], rank, size)}
        if rank == 0:
            torch.save(result, sys.argv[2])
