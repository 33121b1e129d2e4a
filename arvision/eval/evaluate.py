"""Scores of samples against a reference: the work behind `arvision eval fid`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from ..files import user_path
from .extract import FeatureSet, extract
from .features import Extractor, file_sha256
from .frechet import frechet_jackknife
from .moments import Moments, merge_all
from .score import Score
from .scores import (
    check_label_order,
    check_score_order,
    inception_score,
    kernel_distance,
    neighbour_radii,
    precision_recall,
    refuse_sorted,
)
from .sources import ArraySource, Source, open_npz, open_source

METRICS = ("frechet", "sfid", "is", "precision", "recall", "density", "coverage", "kid")
ADM_KEYS = ("mu", "sigma")


@dataclass
class Reference:
    """What samples are held against.

    Attributes:
        name: path or description.
        mean: [D] of the features.
        covariance: [D, D].
        spatial: mean and covariance of the spatial features, or None.
        features: rows for precision, recall and KID, or None.
        sha256: of the file, or None for a folder.
        from_statistics: whether mean and covariance were read rather than computed.
    """

    name: str
    mean: Any
    covariance: Any
    spatial: tuple[Any, Any] | None
    features: np.ndarray | None
    sha256: str | None
    from_statistics: bool
    count: int | None = None

    @cached_property
    def radii(self) -> torch.Tensor:
        """Squared distances of the rows to their third neighbours, computed once."""
        return neighbour_radii(torch.as_tensor(self.features).float())


def load_reference(
    where: Any,
    extractor: Extractor,
    *,
    need_rows: bool,
    batch_size: int = 50,
    progress: bool = True,
    allow_jpeg: bool = False,
    crop: int | None = None,
) -> Reference | None:
    """A reference from statistics (npz with mu and sigma) or from images.

    With ADM's file the distance uses mu and sigma, which cover the whole training set, and its
    10,000 images `arr_0` serve precision and recall only.

    Args:
        where: a path (npz of statistics or images, folder, shards) or a source.
        extractor: for images.
        need_rows: whether features of the images are wanted (precision and recall, KID).
        batch_size: images per forward pass.
        progress: bar on stderr.
        allow_jpeg: take JPEG files in a folder.
        crop: centre crop and Lanczos resize of a folder's pictures.

    Returns:
        The reference on rank 0, None elsewhere.

    Raises:
        InputError: statistics of another width, or other keys.
    """
    options = {"batch_size": batch_size, "progress": progress}
    path = user_path(where) if isinstance(where, (str, Path)) else None
    if path is not None and path.is_file():
        members = open_npz(path)
        if any(key in members for key in ADM_KEYS):
            return _from_statistics(path, members, extractor, need_rows, options)
    source: Any = (
        where
        if path is None and not isinstance(where, torch.Tensor)
        else open_source(where, allow_jpeg=allow_jpeg, crop=crop)
    )
    found = extract(source, extractor, keep_rows=need_rows, **options)
    if found is None:
        return None
    whole = found.moments
    spatial = None
    if found.spatial is not None:
        merged = merge_all(found.spatial)
        spatial = merged.mean, merged.covariance()
    digest = file_sha256(path) if path is not None and path.is_file() else None
    return Reference(
        source.name,
        whole.mean,
        whole.covariance(),
        spatial,
        found.features,
        digest,
        False,
        found.count,
    )


def _from_statistics(
    path: Path,
    members: dict[str, np.ndarray],
    extractor: Extractor,
    need_rows: bool,
    options: dict[str, Any],
) -> Reference | None:
    """mu, sigma, mu_s, sigma_s of a file, and features of its images."""
    missing = [key for key in ADM_KEYS if key not in members]
    if missing:
        raise InputError(f"{path} holds {', '.join(members)}: expected {missing[0]} too")
    width, mean = extractor.facts.dim, members["mu"].reshape(-1)
    if len(mean) != width or members["sigma"].shape != (width, width):
        shapes = f"mu {list(members['mu'].shape)}, sigma {list(members['sigma'].shape)}"
        wanted = f"[{width}] and [{width}, {width}] for {extractor.facts.name}"
        raise InputError(f"{path} holds {shapes}: expected {wanted}")
    features = None
    if need_rows and "arr_0" in members:
        images = ArraySource(members["arr_0"], None, f"{path}[arr_0]")
        kept = extract(images, extractor, **options)
        if kept is None:
            return None
        features = kept.features
    spatial = None
    if "mu_s" in members and "sigma_s" in members:
        spatial = members["mu_s"].reshape(-1), members["sigma_s"]
    return Reference(str(path), mean, members["sigma"], spatial, features, file_sha256(path), True)


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
    metrics: Sequence[str] | None = None,
    batch_size: int = 50,
    allow_jpeg: bool = False,
    allow_sorted: bool = False,
    crop: int | None = None,
    progress: bool = True,
) -> dict[str, Score] | None:
    """Score samples against a reference.

    Args:
        samples: a source, a path or a uint8 tensor.
        reference: likewise, a statistics file, or a loaded `Reference`.
        extractor: see `get_extractor`.
        metrics: from `METRICS`; None takes what the extractor can give.
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
    wanted = tuple(metrics) if metrics is not None else default_metrics(extractor)
    for name in wanted:
        if name not in METRICS:
            raise InputError(f"unknown metric {name!r}: expected one of {', '.join(METRICS)}")
    source = samples if hasattr(samples, "read") else open_source(samples, allow_jpeg=allow_jpeg)
    if "is" in wanted:
        _need(extractor, "logits", "is")
        refuse_sorted(check_label_order(source.labels), allow_sorted)
    if "sfid" in wanted:
        _need(extractor, "spatial", "sfid")
    need_rows = any(name not in ("frechet", "sfid", "is") for name in wanted)
    options = {"batch_size": batch_size, "progress": progress}
    goal = reference
    if not isinstance(reference, Reference):
        goal = load_reference(
            reference, extractor, need_rows=need_rows, allow_jpeg=True, crop=crop, **options
        )
    found = extract(source, extractor, keep_rows=need_rows, **options)
    if found is None or goal is None:
        return None
    if "is" in wanted and found.labels is None:
        refuse_sorted(check_score_order(found.logits), allow_sorted)
    return score_features(found, goal, extractor, wanted)


def _need(extractor: Extractor, output: str, metric: str) -> None:
    if output not in extractor.facts.outputs:
        raise InputError(f"metric {metric} needs {output}, which {extractor.facts.name} lacks")


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
    rows = [name for name in ("precision", "recall", "density", "coverage") if name in wanted]
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
