"""Scores of samples against a reference: the work behind `arvision eval fid`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from ..errors import InputError, check_count, unknown_name
from .distributed import rank_and_size
from .extract import FeatureSet, extract
from .features import Extractor
from .frechet import frechet_jackknife
from .moments import Moments
from .reference import Opened, OpenedImages, Reference, load_reference, prepare_reference
from .score import Score
from .scores import (
    NUM_SPLITS,
    check_label_order,
    check_score_order,
    inception_score,
    kernel_distance,
    precision_recall,
    refuse_sorted,
)
from .sources import Source, open_source

BALLS = ("precision", "recall", "density", "coverage")
METRICS = ("frechet", "sfid", "is", *BALLS, "kid")
SMALLEST = {**dict.fromkeys(BALLS, 4), "kid": 2, "is": NUM_SPLITS, "frechet": 2, "sfid": 2}
"""Images that a metric takes at least, of either side that it looks at."""


def default_metrics(extractor: Extractor) -> tuple[str, ...]:
    """What can be scored with an extractor: all of ADM's with Inception, else no IS and sFID."""
    if "spatial" in extractor.facts.outputs:
        return ("frechet", "sfid", "is", "precision", "recall")
    return ("frechet", "precision", "recall", "density", "coverage", "kid")


def frechet_name(extractor: Extractor) -> str:
    """How the distance may be called: only the ADM network's is FID."""
    if extractor.facts.is_fid:
        return "fid" if extractor.facts.preprocess_id.startswith("tf1") else "fid_clean"
    if extractor.facts.name == "dinov2-vitl14":
        return "fd_dinov2"
    return f"frechet_{extractor.facts.name}"


def evaluate(
    samples: Source | Any,
    reference: Any,
    extractor: Extractor,
    *,
    metrics: Sequence[str] | str | None = None,
    batch_size: int = 50,
    allow_jpeg: bool = False,
    allow_sorted: bool = False,
    crop: int | None = None,
    progress: bool = True,
) -> dict[str, Score] | None:
    """Score samples against a reference.

    Args:
        samples: what `open_source` takes.
        reference: likewise, a statistics file or `Moments`, or a loaded `Reference`.
        extractor: see `get_extractor`.
        metrics: from `METRICS`; None takes what the extractor can give and the reference allows,
            and names the rest.
        batch_size: images per forward pass.
        allow_jpeg: take JPEG samples.
        allow_sorted: give an inception score of class-sorted samples, with a warning.
        crop: centre crop and Lanczos resize of a reference folder's pictures.
        progress: bars on stderr.

    Returns:
        Scores by name on rank 0, None elsewhere.

    Raises:
        InputError: see the parts; nothing is scored halfway.
    """
    found = score_against(
        samples,
        reference,
        extractor,
        metrics=metrics,
        batch_size=batch_size,
        allow_jpeg=allow_jpeg,
        allow_sorted=allow_sorted,
        crop=crop,
        progress=progress,
    )
    return None if found is None else found[0]


def score_against(
    samples: Source | Any,
    reference: Any,
    extractor: Extractor,
    *,
    metrics: Sequence[str] | str | None = None,
    batch_size: int = 50,
    allow_jpeg: bool = False,
    allow_sorted: bool = False,
    crop: int | None = None,
    progress: bool = True,
) -> tuple[dict[str, Score], Reference] | None:
    """The scores of `evaluate`, and the reference they were computed against."""
    check_count("batch_size", batch_size)
    source = open_source(samples, allow_jpeg=allow_jpeg)
    opened = prepare_reference(reference, extractor, allow_jpeg=True, crop=crop)
    wanted = choose_metrics(metrics, extractor, opened, len(source))
    if "is" in wanted:
        refuse_sorted(check_label_order(source.labels), allow_sorted)
    need_rows = any(name not in ("frechet", "sfid", "is") for name in wanted)
    options = {"batch_size": batch_size, "progress": progress}
    goal = load_reference(opened, extractor, need_rows=need_rows, **options)
    found = extract(source, extractor, keep_rows=need_rows, **options)
    if found is None or goal is None:
        return None
    if "is" in wanted and found.labels is None:
        refuse_sorted(check_score_order(found.logits), allow_sorted)
    return score_features(found, goal, extractor, wanted), goal


def choose_metrics(
    metrics: Sequence[str] | str | None,
    extractor: Extractor,
    reference: Opened,
    num_samples: int | None = None,
) -> tuple[str, ...]:
    """What will be scored, known before any picture is read.

    Args:
        metrics: asked for by name; None for all that the extractor gives, of which those that the
            reference or the number of images does not allow are left out with a warning.
        extractor: see `get_extractor`.
        reference: see `arvision.eval.reference.prepare_reference`.
        num_samples: images that will be scored, where known.

    Raises:
        InputError: an unknown metric; one that was asked for and is not possible; none is possible.
    """
    names: Any = metrics.split(",") if isinstance(metrics, str) else metrics
    if names is not None and not isinstance(names, (list, tuple, set, dict)):
        raise InputError(f"metrics {metrics!r}: expected names, some of {', '.join(METRICS)}")
    wanted = default_metrics(extractor) if names is None else tuple(str(n).strip() for n in names)
    for name in wanted:
        if name not in METRICS:
            raise unknown_name("metric", name, METRICS)
    if not wanted:
        raise InputError(f"no metric: expected some of {', '.join(METRICS)}")
    obstacles = {name: _obstacle(name, extractor, reference, num_samples) for name in wanted}
    lacking = {name: why for name, why in obstacles.items() if why is not None}
    if lacking and (metrics is not None or len(lacking) == len(wanted)):
        name, why = next(iter(lacking.items()))
        raise InputError(f"metric {name}: {why}")
    for why in dict.fromkeys(lacking.values()):
        named = ", ".join(name for name in lacking if lacking[name] == why)
        if rank_and_size()[0] == 0:
            warnings.warn(f"not scored: {named} ({why})", stacklevel=2)
    return tuple(name for name in wanted if name not in lacking)


def _obstacle(
    name: str, extractor: Extractor, reference: Opened, num_samples: int | None
) -> str | None:
    """Why a metric is not possible, None where it is."""
    output = {"is": "logits", "sfid": "spatial"}.get(name)
    if output is not None and output not in extractor.facts.outputs:
        return f"needs {output}, which {extractor.facts.name} lacks"
    least = SMALLEST[name]
    if num_samples is not None and num_samples < least:
        return f"{num_samples} samples: expected at least {least} images"
    if name == "sfid" and not isinstance(reference, OpenedImages) and reference.spatial is None:
        return f"{reference.name} has no mu_s and sigma_s: expected them for sfid"
    if name in (*BALLS, "kid") and reference.num_rows < least:
        if reference.num_rows == 0:
            return f"{reference.name} has no images: expected arr_0, or a folder of pictures"
        return f"{reference.name} holds {reference.num_rows} images: expected at least {least}"
    return None


def score_features(
    found: FeatureSet, goal: Reference, extractor: Extractor, wanted: Sequence[str]
) -> dict[str, Score]:
    """All `wanted` scores of extracted samples."""
    if found.count < 50 * max(1, extractor.facts.dim // 50) and "frechet" in wanted:
        few = f"{found.count} samples for {extractor.facts.dim} feature dimensions"
        warnings.warn(
            f"{few}: the distance is biased upwards (about as 1/N); compare equal N only",
            stacklevel=2,
        )
    scores = {}
    if "frechet" in wanted:
        scores[frechet_name(extractor)] = frechet_jackknife(found.parts, goal.mean, goal.covariance)
    if "sfid" in wanted:
        if goal.spatial is None or found.spatial is None:
            raise InputError(f"{goal.name} has no mu_s and sigma_s: expected them for sfid")
        scores["sfid"] = frechet_jackknife(found.spatial, *goal.spatial)
    if "is" in wanted:
        name = "is" if extractor.facts.name == "inception-adm" else f"is_{extractor.facts.name}"
        scores[name] = inception_score(found.logits)
    rows = [name for name in BALLS if name in wanted]
    if rows or "kid" in wanted:
        if goal.features is None or found.features is None:
            raise InputError(f"{goal.name} has no images: expected arr_0 for {(*rows, 'kid')[0]}")
        if rows:
            shares = precision_recall(found.features, goal.features, reference_radii=goal.radii)
            scores |= {name: shares[name] for name in rows}
        if "kid" in wanted:
            scores["kid"] = kernel_distance(found.features, goal.features)
    return scores


def moments_of(source: Source, extractor: Extractor, **options: Any) -> Moments | None:
    """Moments alone, with memory that does not grow with N; None on ranks but 0."""
    found = extract(source, extractor, keep_rows=False, **options)
    return None if found is None else found.moments
