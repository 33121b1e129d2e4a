"""A maker of pictures from seeds alone, and the process that kill and rank tests start.

python maker.py OUT NUM BATCH [DELAY]
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch

from arvision.eval import GenerateConfig, Made, generate
from arvision.eval.distributed import processes


def make(indices, labels, seeds, delay: float = 0.0) -> Made:
    """Noise pictures 8x8 that depend on label and seed only; two tokens that name them."""
    images = []
    for label, (seed, index) in zip(labels, seeds, strict=True):
        draw = np.random.default_rng([seed, index])
        shift = sum(map(ord, label)) if isinstance(label, str) else label
        images.append((draw.integers(0, 200, (3, 8, 8)) + shift % 50).astype(np.uint8))
    time.sleep(delay)
    tokens = torch.tensor([[index % 97, len(images)] for index in indices]) * 0
    tokens[:, 0] = torch.tensor([index % 97 for index in indices])
    return Made(torch.from_numpy(np.stack(images)), tokens, {"forward_passes": len(indices)})


def config(num: int, **changes) -> GenerateConfig:
    """Settings of the test runs."""
    return GenerateConfig(
        **{"model": "noise", "sampler": "ar", "num": num, "num_classes": 10, **changes}
    )


if __name__ == "__main__":
    out, num, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    delay = float(sys.argv[4]) if len(sys.argv) > 4 else 0.0
    with processes():
        generate(
            lambda i, x, s: make(i, x, s, delay), config(num), out, batch_size=batch, progress=False
        )
