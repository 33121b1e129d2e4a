"""Could a small model draft whole scales of a large one, without loss?

python -m benchmarks.scale_speculation [--images 100]

A scale's tokens are independent given the coarser scales, so drafts are judged one by one, best by
maximal coupling: a token stands with probability 1 - TV (the distance of the two laws). But the next
scale reads the whole map: it saves its pass only if every token stands. For each scale this prints
the mean TV of a token, and the probability that all tokens of the scale stand, with `var-fashion` as
the target and `var-fashion-small` as the draft, both given the target's own coarser scales.
"""

from __future__ import annotations

import argparse

import torch

import arvision
from arvision import get_sampler
from arvision.decoding.logits import Shaping

from .common import save


@torch.no_grad()
def distances(num: int) -> list[tuple[int, float, float]]:
    """Tokens, mean distance and chance of a whole scale, of each scale, over `num` images."""
    target = arvision.load("var-fashion", device="cpu")
    draft = arvision.load("var-fashion-small", device="cpu")
    scale, shape = target.config["guidance_scale"], Shaping(top_p=target.config["top_p"])
    classes = [k % 10 for k in range(num)]
    tokens = get_sampler("ar", top_p=target.config["top_p"])(
        target.model, classes, seeds=[(0, k) for k in range(num)], guidance_scale=scale
    ).tokens
    states = [pipe.model.start(classes, scale) for pipe in (target, draft)]
    rows = []
    for part in tokens.split([side * side for side in target.model.scales], dim=1):
        laws = [shape(state.next()).double().exp() for state in states]
        overlap = torch.minimum(*laws).sum(-1)  # 1 - TV, [B, n]
        rows.append((part.shape[1], float(1 - overlap.mean()), float(overlap.prod(1).mean())))
        for state in states:
            state.feed(part)
    return rows


def main() -> None:
    """Measure, print and write `results/scale_speculation.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = distances(options.images)
    for num, distance, whole in rows:
        print(f"{num:3d} tokens: TV {distance:.3f}, the whole scale stands {whole:.2e}")
    names = ("tokens", "tv", "whole_scale")
    scales = [dict(zip(names, row, strict=True)) for row in rows]
    save("scale_speculation", {"images": options.images, "scales": scales})


if __name__ == "__main__":
    main()
