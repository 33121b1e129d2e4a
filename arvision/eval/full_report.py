"""Scores a run and gathers what its report must say."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from .classifier import class_consistency
from .evaluate import score_against
from .features import Extractor
from .generate import run_facts
from .protocols import PROTOCOLS
from .report import build_report
from .score import Score
from .sources import ShardSource, Source, open_source


def full_report(
    samples: Source | Any,
    reference: Any,
    extractor: Extractor,
    *,
    metrics: Sequence[str] | str | None = None,
    batch_size: int = 50,
    allow_jpeg: bool = False,
    allow_sorted: bool = False,
    crop: int | None = None,
    extra: dict[str, Score] | None = None,
    progress: bool = True,
) -> dict[str, Any] | None:
    """Evaluate and report; None on ranks but 0.

    A run of the fashion protocol is scored for class consistency too.

    Args:
        samples: what `open_source` takes.
        reference: see `evaluate`.
        extractor: see `get_extractor`.
        metrics: see `evaluate`.
        batch_size: images per forward pass.
        allow_jpeg: take JPEG samples.
        allow_sorted: score sorted samples.
        crop: centre crop and Lanczos resize of a reference folder's pictures.
        extra: scores computed elsewhere, added to the report.
        progress: bars on stderr.
    """
    started = time.perf_counter()
    source = open_source(samples, allow_jpeg=allow_jpeg)
    found = score_against(
        source,
        reference,
        extractor,
        metrics=metrics,
        batch_size=batch_size,
        allow_jpeg=allow_jpeg,
        allow_sorted=allow_sorted,
        crop=crop,
        progress=progress,
    )
    if found is None:
        return None
    scores, goal = found
    run, measured = None, None
    if isinstance(source, ShardSource):
        run, measured = source.shards.config, run_facts(source.shards)
        if str(run.get("protocol")) == PROTOCOLS["fashion"].id and source.labels is not None:
            images = source.read(0, len(source))
            scores["class_consistency"] = class_consistency(images, source.labels)
    return build_report(
        {**scores, **(extra or {})},
        samples=source.name,
        num=len(source),
        extractor=extractor,
        reference={
            "name": goal.name,
            "sha256": goal.sha256,
            "from_statistics": goal.from_statistics,
            "count": goal.count,
        },
        notes={"samples": getattr(source, "notes", {}), "reference": goal.notes},
        run=run,
        measured=measured,
        seconds=time.perf_counter() - started,
    )
