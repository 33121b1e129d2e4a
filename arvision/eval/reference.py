"""What samples are held against: images, or the statistics that somebody else took of them."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError, as_integer
from ..files import user_path
from .arrays import NpzFile
from .extract import extract
from .features import Extractor, file_sha256
from .frechet import check_gaussian
from .moments import Moments, check_features, merge_all
from .scores import neighbour_radii
from .sources import ArraySource, Source, open_source


@dataclass
class Reference:
    """What samples are held against, ready for scoring.

    Attributes:
        name: path or description.
        mean: [D] of the features.
        covariance: [D, D] of the features.
        spatial: mean and covariance of the spatial features, or None.
        features: rows for precision, recall and KID, or None.
        sha256: of the file, or None for what is no file.
        from_statistics: whether mean and covariance were read rather than computed.
        count: images, where known.
        notes: what reading the pictures left out or changed.
    """

    name: str
    mean: Any
    covariance: Any
    spatial: tuple[Any, Any] | None
    features: np.ndarray | None
    sha256: str | None
    from_statistics: bool
    count: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Rows that precision, recall and KID would see."""
        return 0 if self.features is None else len(self.features)

    @cached_property
    def radii(self) -> torch.Tensor:
        """Squared distances of the rows to their third neighbours, computed once."""
        return neighbour_radii(torch.as_tensor(self.features).float())


@dataclass
class Statistics:
    """Moments of features that a file or the caller gives, and what else stands beside them.

    Attributes:
        name: path or description.
        mean: [D].
        covariance: [D, D].
        spatial: those of the spatial features (ADM's mu_s, sigma_s), or None.
        rows: features [N, D], or None.
        images: for features of their own (ADM's arr_0), or None.
        count: images behind the moments, where known.
        sha256: of the file, or None.
    """

    name: str
    mean: Any
    covariance: Any
    spatial: tuple[Any, Any] | None = None
    rows: np.ndarray | None = None
    images: ArraySource | None = None
    count: int | None = None
    sha256: str | None = None

    @property
    def num_rows(self) -> int:
        """Rows that precision, recall and KID would see."""
        return next((len(x) for x in (self.rows, self.images) if x is not None), 0)


class OpenedImages:
    """Images of a reference before any of them is read.

    Args:
        source: the images.
        sha256: of their file, or None.
    """

    def __init__(self, source: Source, sha256: str | None) -> None:
        self.source, self.name, self.sha256 = source, source.name, sha256

    @property
    def num_rows(self) -> int:
        """Rows that precision, recall and KID would see."""
        return len(self.source)


Opened = Reference | Statistics | OpenedImages


def prepare_reference(
    where: Any, extractor: Extractor, *, allow_jpeg: bool = False, crop: int | None = None
) -> Opened:
    """A reference whose kind is known and whose numbers are checked; no picture is read.

    Args:
        where: a path (`.npz` of statistics, or what `open_source` takes), `Moments` of ours, or what
            `open_source` takes; what is opened already comes back.
        extractor: whose features the statistics must fit.
        allow_jpeg: take pictures of lossy formats.
        crop: centre crop and Lanczos resize of pictures.

    Raises:
        InputError: statistics of another width or no covariance, or no images.
    """
    if isinstance(where, (Reference, Statistics, OpenedImages)):
        return where
    if isinstance(where, Moments):
        found = Statistics("moments", where.mean, where.covariance(), count=where.count)
        return _checked(found, extractor)
    path = user_path(where) if isinstance(where, (str, Path)) else None
    digest = None
    if path is not None and os.path.isfile(path):
        digest = file_sha256(path)
        is_npz = path.suffix == ".npz" or zipfile.is_zipfile(path)
        found = _read_statistics(NpzFile(path), str(path)) if is_npz else None
        if found is not None:
            found.sha256 = digest
            return _checked(found, extractor)
    source = open_source(where, allow_jpeg=allow_jpeg, crop=crop)
    return OpenedImages(source, digest)


def _read_statistics(members: Mapping[str, np.ndarray], name: str) -> Statistics | None:
    """The statistics among the members of a file, None where there are none.

    - mu, sigma: pytorch-fid, clean-fid, and ADM's, with mu_s, sigma_s and images arr_0 beside them
    - count, mean, scatter: `Moments` of ours
    - feats: rows of features, as clean-fid keeps them for KID
    """
    images = None
    if ("mu" in members) != ("sigma" in members):
        missing = "sigma" if "mu" in members else "mu"
        raise InputError(f"{name} holds {', '.join(members)}: expected {missing} too")
    if "mu" in members:
        if "arr_0" in members:
            images = ArraySource(members["arr_0"], None, f"{name}[arr_0]")
        spatial = None
        if "mu_s" in members and "sigma_s" in members:
            spatial = _flat(members["mu_s"]), members["sigma_s"]
        rows = np.array(members["feats"]) if "feats" in members else None
        mean, covariance = _flat(members["mu"]), members["sigma"]
        return Statistics(name, mean, covariance, spatial, rows, images)
    if all(key in members for key in ("count", "mean", "scatter")):
        num = as_integer(members["count"])
        if num is None or num < 2:
            raise InputError(f"{name} holds count {members['count']}: expected at least 2")
        return Statistics(name, _flat(members["mean"]), members["scatter"] / (num - 1), count=num)
    if "feats" in members:
        rows = np.array(members["feats"])
        moments = Moments.of(check_features(rows, f"{name}[feats]"))
        return Statistics(name, moments.mean, moments.covariance(), rows=rows, count=len(rows))
    return None


def _flat(vector: np.ndarray) -> np.ndarray:
    """[1, D] as [D]."""
    return vector.reshape(-1) if vector.ndim == 2 and 1 in vector.shape else vector


def _checked(found: Statistics, extractor: Extractor) -> Statistics:
    """Statistics that are of the extractor's width, finite, symmetric and positive."""
    width = extractor.facts.dim
    mean, covariance = list(np.shape(found.mean)), list(np.shape(found.covariance))
    if mean != [width] or covariance != [width, width]:
        shapes = f"mu {mean}, sigma {covariance}"
        wanted = f"[{width}] and [{width}, {width}] for {extractor.facts.name}"
        raise InputError(f"{found.name} holds {shapes}: expected {wanted}")
    check_gaussian(found.mean, found.covariance, found.name)
    if found.spatial is not None:
        check_gaussian(*found.spatial, f"{found.name} (mu_s, sigma_s)")
    if found.rows is not None:
        rows = check_features(found.rows, f"{found.name}[feats]")
        if rows.shape[1] != width:
            shape = list(found.rows.shape)
            raise InputError(f"{found.name} holds feats {shape}: expected [N, {width}]")
    return found


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
    """A reference from statistics or from images, ready for scoring.

    With ADM's file the distance uses mu and sigma, which cover the whole training set, and its
    10,000 images `arr_0` serve precision and recall only.

    Args:
        where: see `prepare_reference`.
        extractor: for images.
        need_rows: whether features of the images are wanted (precision and recall, KID).
        batch_size: images per forward pass.
        progress: bar on stderr.
        allow_jpeg: take pictures of lossy formats.
        crop: centre crop and Lanczos resize of a folder's pictures.

    Returns:
        The reference on rank 0, None elsewhere.

    Raises:
        InputError: see `prepare_reference`.
    """
    opened = prepare_reference(where, extractor, allow_jpeg=allow_jpeg, crop=crop)
    if isinstance(opened, Reference):
        return opened
    options = {"batch_size": batch_size, "progress": progress}
    if isinstance(opened, OpenedImages):
        return _of_images(opened, extractor, need_rows, options)
    features = opened.rows
    if features is None and need_rows and opened.images is not None:
        kept = extract(opened.images, extractor, **options)
        if kept is None:
            return None
        features = kept.features
    return Reference(
        opened.name,
        opened.mean,
        opened.covariance,
        opened.spatial,
        features,
        opened.sha256,
        True,
        opened.count,
    )


def _of_images(
    opened: OpenedImages, extractor: Extractor, need_rows: bool, options: dict[str, Any]
) -> Reference | None:
    found = extract(opened.source, extractor, keep_rows=need_rows, **options)
    if found is None:
        return None
    whole, spatial = found.moments, None
    if found.spatial is not None:
        merged = merge_all(found.spatial)
        spatial = merged.mean, merged.covariance()
    return Reference(
        opened.name,
        whole.mean,
        whole.covariance(),
        spatial,
        found.features,
        opened.sha256,
        False,
        found.count,
        getattr(opened.source, "notes", {}),
    )
