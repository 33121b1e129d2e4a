"""CLIP score, in three conventions that are recorded, with the transformers 5 output unwrapped."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError, check_count, optional, unknown_name
from .extractors.clip import CLIP
from .score import Score
from .scores import bootstrap_mean
from .sources import Source

with optional("eval", "the CLIP score"):
    from torchmetrics import Metric

CONVENTIONS = ("cosine", "torchmetrics", "hessel")
COCO_PREFIX = "A photo depicts "


def apply_convention(cosines: Tensor, convention: str) -> Tensor:
    """Cosines to scores: as they are, 100 max(cos, 0) (torchmetrics), or 2.5 max(cos, 0) (Hessel).

    Raises:
        InputError: an unknown convention.
    """
    if convention not in CONVENTIONS:
        raise unknown_name("CLIP score convention", convention, CONVENTIONS)
    if convention == "cosine":
        return cosines
    return cosines.clamp_min(0) * (100.0 if convention == "torchmetrics" else 2.5)


def clip_score(
    source: Source,
    captions: Sequence[str],
    extractor: CLIP,
    *,
    convention: str = "cosine",
    prefix: str = COCO_PREFIX,
    batch_size: int = 50,
    progress: bool = True,
) -> Score:
    """Mean agreement of images with their captions.

    Args:
        source: images.
        captions: one per image, in the same order.
        extractor: a CLIP network with its tokenizer; long captions are cut so that the end token,
            at which CLIP reads the text, stays.
        convention: see `apply_convention`.
        prefix: put before every caption ("A photo depicts " in the COCO-30k protocol).
        batch_size: images per forward pass.
        progress: bar on stderr.

    Returns:
        The mean with a 95 % bootstrap interval; `details` record the convention, prefix, network.

    Raises:
        InputError: another number of captions than of images, an unknown convention.

    Paper: Hessel et al. 2021, "CLIPScore", section 3.
    """
    if len(captions) != len(source) or len(source) == 0:
        raise InputError(f"{len(captions)} captions for {len(source)} images: expected as many")
    apply_convention(torch.zeros(1), convention)
    check_count("batch_size", batch_size)
    cosines = []
    starts = range(0, len(source), batch_size)
    for start in tqdm(starts, desc="clip", file=sys.stderr, disable=not progress):
        stop = min(len(source), start + batch_size)
        texts = extractor.text_features([prefix + c for c in captions[start:stop]])
        cosines.append((extractor(source.read(start, stop)) * texts).sum(-1).cpu())
    values = apply_convention(torch.cat(cosines), convention)
    score = bootstrap_mean(values.numpy())
    details = {
        "convention": convention,
        "prefix": prefix,
        "network": extractor.facts.name,
        "truncation": "tokenizer, end token kept",
    }
    return Score(
        score.value, len(source), score.interval, score.standard_error, score.method, details
    )


class CLIPScore(Metric):
    """CLIP score as a torchmetrics class that works with transformers 4 and 5.

    Args:
        extractor: see `arvision.eval.extractors.clip.CLIP`.
        convention: see `apply_convention`.
        prefix: put before every caption.
        **options: of `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(
        self, extractor: CLIP, convention: str = "torchmetrics", prefix: str = "", **options: Any
    ) -> None:
        super().__init__(**options)
        apply_convention(torch.zeros(1), convention)
        self.extractor, self.convention, self.prefix = extractor, convention, prefix
        for name in ("total", "count"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Tensor, captions: Sequence[str]) -> None:
        """Add uint8 images [B, 3, H, W] and as many captions."""
        if len(captions) != len(images):
            raise InputError(f"{len(captions)} captions for {len(images)} images")
        texts = self.extractor.text_features([self.prefix + c for c in captions])
        values = apply_convention((self.extractor(images) * texts).sum(-1), self.convention)
        self.total = self.total + values.double().sum().to(self.total.device)
        self.count = self.count + len(images)

    def compute(self) -> Tensor:
        """The mean, float64."""
        if float(self.count) == 0:
            raise InputError("expected images before compute")
        return self.total / self.count
