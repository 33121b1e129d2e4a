"""A target's own samples and the laws they were drawn from, to distil a draft on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..contracts import TokenModel
from ..decoding.drafter import NoDrafter
from ..decoding.logits import Shaping
from ..decoding.loop import FixedWindow, decode_tokens
from ..decoding.run import Run
from ..decoding.verify import gumbel_coupling
from ..models.llamagen import LlamaGen
from .saved import load_state, save_state

SMALLEST_LOGP = -40.0


@dataclass(frozen=True)
class Drawn:
    """Samples of the target and the laws they were drawn from.

    Attributes:
        tokens: [M, N] int64.
        logp: [M, N, V] float16, guided log-probabilities.
        labels: [M] int64, numbers of conditions: classes, or captions.
        scales: [M] float32, guidance scales.
    """

    tokens: Tensor
    logp: Tensor
    labels: Tensor
    scales: Tensor

    def rows(self, index: Any) -> Drawn:
        """Some of the samples."""
        return Drawn(*(part[index] for part in vars(self).values()))


@torch.no_grad()
def draw_from_target(
    target: LlamaGen,
    folder: Path,
    num: dict[float, int],
    *,
    batch_size: int,
    progress: bool,
    conditions: Sequence[Any] | None = None,
) -> Drawn:
    """Plain samples of the target, as many as `num` says at each guidance scale.

    Conditions take turns (None for the classes); image k has identity (k, scale in thousandths).
    Batches that lie in `folder` are not drawn again; those of captions lie in a folder named after
    these.
    """
    if conditions is None:
        conditions = range(target.transformer.config["num_classes"])
    else:
        text = "\n".join(map(str, conditions)).encode()
        folder = folder / hashlib.sha256(text).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        (scale, first, min(batch_size, total - first))
        for scale, total in num.items()
        for first in range(0, total, batch_size)
    ]
    parts = []
    for scale, first, size in tqdm(jobs, disable=not progress, desc="target samples"):
        path = folder / f"guidance{scale:g}-{first:06d}-{size}.pt"
        if not path.exists():
            save_state(path, _draw_batch(target, conditions, scale, first, size))
        parts.append(load_state(path, "delete it to draw its samples again", mmap=True))
    names = ("tokens", "logp", "labels", "scales")
    return Drawn(*(torch.cat([part[name] for part in parts]) for name in names))


def _draw_batch(
    target: LlamaGen, conditions: Sequence[Any], scale: float, first: int, size: int
) -> dict[str, Tensor]:
    labels = torch.arange(first, first + size) % len(conditions)
    laws = []

    def shape(logits: Tensor) -> Tensor:
        law = Shaping()(logits)
        laws.append(law.view(size, -1).clamp(min=SMALLEST_LOGP).half())
        return law

    seeds = [(first + k, round(1000 * scale)) for k in range(size)]
    asked = [conditions[label] for label in labels.tolist()]
    tokens = plain_tokens(target, asked, seeds, scale, shape)
    return {
        "tokens": tokens,
        "logp": torch.stack(laws, dim=1),
        "labels": labels,
        "scales": torch.full((size,), scale),
    }


def plain_tokens(
    model: LlamaGen,
    conditions: Sequence[Any],
    seeds: list[tuple[int, int]],
    guidance_scale: float,
    shape: Callable[[Tensor], Tensor] = Shaping(),
) -> Tensor:
    """Plain samples [B, N] of a model; `shape` sees the guided logits of each token."""
    return decode_tokens(
        cast(TokenModel, model),
        conditions,
        Run(len(conditions), model.num_tokens, seeds, guidance_scale=guidance_scale),
        drafter=NoDrafter(),
        rule=gumbel_coupling,
        shape=shape,
        policy=FixedWindow(1),
    ).tokens


def together(parts: list[Drawn]) -> Drawn:
    """Samples joined into one set."""
    fields = zip(*(vars(part).values() for part in parts), strict=True)
    return Drawn(*(torch.cat(field) for field in fields))
