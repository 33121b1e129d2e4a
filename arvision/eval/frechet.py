"""The Frechet distance between Gaussians, and how sure an estimate of it is.

d^2 = |mean_a - mean_b|^2 + tr A + tr B - 2 ||A^1/2 B^1/2||_*, with the nuclear norm (the sum of
singular values) in place of the trace of a matrix square root. Singular values of a product of
roots keep full precision where covariances are singular; eigenvalues of the product A B, or the
square root of an eigenvalue of A^1/2 B A^1/2, turn rounding noise eps into sqrt(eps).

Paper: Dowson and Landau 1982, "The Frechet distance between multivariate normal distributions",
eq. 16; Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", eq. 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .moments import Moments, check_features
from .score import Score, normal_score

SAFE_PIVOT = 1e-10
SLACK = 4 * 2.0**-23
"""How far below zero, in units of sqrt(D) times the largest, an eigenvalue may lie: a covariance that
was computed or stored in float32 has such ones where it is singular (few images)."""


def check_gaussian(mean: Any, covariance: Any, name: str) -> None:
    """Refuse what is no mean [D] and covariance [D, D].

    Raises:
        InputError: other shapes or types, values that are not finite, an asymmetric matrix, or one
            with an eigenvalue below what float32 rounds zero to.
    """
    vector, matrix = _vector(mean, f"{name}: mean"), _symmetric(covariance, f"{name}: covariance")
    if len(vector) != len(matrix):
        sizes = f"{len(vector)} and {len(matrix)}"
        raise InputError(f"{name}: mean and covariance have {sizes} dimensions, expected equal")
    try:
        _factor(matrix)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _numbers(values: Any, name: str) -> Tensor:
    """Real numbers as a float64 tensor."""
    if isinstance(values, Tensor):
        found = values
    else:
        array = np.array(values)
        if array.dtype.kind not in "fiu":
            raise InputError(f"{name} has the dtype {array.dtype}: expected real numbers")
        found = torch.from_numpy(array.astype(np.float64))
    if found.is_complex() or found.dtype == torch.bool:
        raise InputError(f"{name} has the dtype {found.dtype}: expected real numbers")
    return found.double()


def _symmetric(matrix: Any, name: str) -> Tensor:
    """`matrix` as a finite, symmetric float64 tensor [D, D]."""
    tensor = _numbers(matrix, name)
    if tensor.ndim != 2 or tensor.shape[0] != tensor.shape[1]:
        raise InputError(f"{name} has shape {list(tensor.shape)}: expected [D, D]")
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{name} holds NaN or infinite values: expected finite numbers")
    scale = float(tensor.abs().max())
    if float((tensor - tensor.T).abs().max()) > 1e-6 * scale:
        raise InputError(f"{name} is not symmetric: expected a covariance")
    return (tensor + tensor.T) / 2


def _vector(vector: Any, name: str) -> Tensor:
    tensor = _numbers(vector, name)
    if tensor.ndim != 1 or not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{name} has shape {list(tensor.shape)}: expected a finite vector [D]")
    return tensor


def _root_factor(covariance: Tensor) -> Tensor:
    """R [D, D] with R^T R = covariance (rows: root of eigenvalue times eigenvector).

    Eigenvalues below the rounding noise of `eigh` (4 sqrt(D) eps times the largest) are zero: the
    root of noise 1e-16 would count as 1e-8. So are those that float32 made negative: R^T R is then
    the nearest covariance, whose trace the distance takes.

    Raises:
        InputError: an eigenvalue below what rounding makes of zero.
    """
    values, vectors = torch.linalg.eigh(covariance)
    noise = 4 * len(values) ** 0.5 * torch.finfo(values.dtype).eps * float(values.abs().max())
    kept = torch.where(values > noise, values, torch.zeros_like(values))
    lowest, largest = float(values.min()), float(values.abs().max())
    if lowest < -SLACK * len(values) ** 0.5 * largest:
        raise InputError(
            f"smallest eigenvalue {lowest:g} beside {largest:g}: expected a covariance"
        )
    return kept.sqrt()[:, None] * vectors.T


def _factor(covariance: Tensor) -> Tensor:
    """Some F [D, D] with F^T F = covariance; the nuclear norm is the same for all of them.

    Cholesky's is ten times cheaper than the eigenvectors'. It serves where every pivot stands well
    above rounding noise; a covariance that is singular, or nearly, takes the other way.
    """
    lower, failed = torch.linalg.cholesky_ex(covariance)
    pivots = lower.diagonal().square()
    if int(failed) == 0 and float(pivots.min()) > SAFE_PIVOT * float(pivots.max()):
        return lower.T
    return _root_factor(covariance)


def frechet_distance(mean_a: Any, cov_a: Any, mean_b: Any, cov_b: Any) -> float:
    """Squared Frechet distance between two Gaussians, in float64.

    Args:
        mean_a: [D] array or tensor.
        cov_a: [D, D] covariance; may be singular.
        mean_b: [D].
        cov_b: [D, D].

    Returns:
        The distance, at least 0: a negative rounding residue becomes 0, and one too large to be
        rounding is an error of the input. Nothing is added to a covariance.

    Raises:
        InputError: shapes that do not agree, values that are not finite, an asymmetric covariance.

    Example:
        >>> round(frechet_distance([0.0, 0.0], [[2, 1], [1, 2]], [0.0, 0.0], [[1, 0], [0, 3]]), 10)
        0.5166852265
    """
    mean_a, mean_b = _vector(mean_a, "mean_a"), _vector(mean_b, "mean_b")
    cov_a, cov_b = _symmetric(cov_a, "cov_a"), _symmetric(cov_b, "cov_b")
    sizes = (len(mean_a), len(cov_a), len(mean_b), len(cov_b))
    if len(set(sizes)) != 1:
        raise InputError(f"mean_a, cov_a, mean_b, cov_b have {sizes} dimensions: expected equal")
    factor_a, factor_b = _factor(cov_a), _factor(cov_b)
    nuclear = torch.linalg.svdvals(factor_a @ factor_b.T).sum()
    traces = factor_a.square().sum() + factor_b.square().sum()
    return _assemble(mean_a - mean_b, traces, nuclear)


def _assemble(difference: Tensor, traces: Tensor, nuclear: Tensor) -> float:
    """The distance from its three terms, with rounding below 0 removed."""
    scale = float(traces + difference.square().sum())
    distance = float(difference.square().sum() + traces - 2 * nuclear)
    if distance < -1e-9 * max(scale, 1e-300):
        raise InputError(f"distance {distance:g} is negative: expected positive covariances")
    return max(distance, 0.0)


def frechet_from_features(features_a: Any, features_b: Any) -> float:
    """Squared Frechet distance between two sets of rows [N, D] and [M, D].

    Where both sets are smaller than D, the nuclear norm comes from the N x M matrix of centred
    inner products, which is faster and rank-exact: ||Xc Yc^T||_* / sqrt((N - 1) (M - 1)).

    Raises:
        InputError: fewer than 2 rows, different widths, values that are not finite.
    """
    rows_a, rows_b = check_features(features_a), check_features(features_b)
    if rows_a.shape[1] != rows_b.shape[1]:
        raise InputError(f"features have {rows_a.shape[1]} and {rows_b.shape[1]} dimensions")
    if min(len(rows_a), len(rows_b)) < 2:
        raise InputError(f"{len(rows_a)} and {len(rows_b)} images: expected at least 2 of each")
    if max(len(rows_a), len(rows_b)) >= rows_a.shape[1]:
        return frechet_between(Moments.of(rows_a), Moments.of(rows_b))
    mean_a, mean_b = rows_a.mean(0), rows_b.mean(0)
    scaled_a = (rows_a - mean_a) / (len(rows_a) - 1) ** 0.5
    scaled_b = (rows_b - mean_b) / (len(rows_b) - 1) ** 0.5
    nuclear = torch.linalg.svdvals(scaled_a @ scaled_b.T).sum()
    return _assemble(mean_a - mean_b, scaled_a.square().sum() + scaled_b.square().sum(), nuclear)


def frechet_between(moments_a: Moments, moments_b: Moments) -> float:
    """Squared Frechet distance between two `Moments`."""
    return frechet_distance(
        moments_a.mean, moments_a.covariance(), moments_b.mean, moments_b.covariance()
    )


def frechet_jackknife(
    parts: Sequence[Moments], mean: Any, covariance: Any, total: Moments | None = None
) -> Score:
    """Frechet distance of grouped samples to a reference, with a 95 % interval.

    The interval is a delete-one-group jackknife: the distance is recomputed without each group in
    turn. A bootstrap would put duplicates into every replicate and so push the distance up. The
    interval says how much the figure varies with the sample drawn; the small-sample bias, which
    falls as 1/N, is not in it.

    Args:
        parts: moments of the groups, as `GroupedMoments.parts` gives.
        mean: [D] of the reference.
        covariance: [D, D] of the reference.
        total: their merged moments, if known already.

    Paper: Wolter 2007, "Introduction to Variance Estimation", section 4.2 (jackknife with groups).
    """
    whole = total if total is not None else _merged(parts)
    value = frechet_distance(whole.mean, whole.covariance(), mean, covariance)
    usable = [part for part in parts if part.count and whole.count - part.count >= 2]
    if len(usable) < 2:
        return Score(value, whole.count)
    device = whole.mean.device
    goal = _vector(mean, "mean").to(device)
    root = _root_factor(_symmetric(covariance, "covariance").to(device))
    replicas = np.array([_replica(whole.without(part), goal, root) for part in usable])
    # Replicas use the symmetric product: its error (1e-7 relative) is far below their spread.
    count = len(replicas)
    variance = (count - 1) / count * float(np.square(replicas - replicas.mean()).sum())
    score = normal_score(value, variance**0.5, whole.count, f"jackknife-{count}")
    assert score.interval is not None
    return replace(score, interval=(max(0.0, score.interval[0]), score.interval[1]))


def _merged(parts: Sequence[Moments]) -> Moments:
    from .moments import merge_all

    return merge_all(parts)


def _replica(rest: Moments, mean: Tensor, root: Tensor) -> float:
    """The distance of `rest`, by one eigenvalue problem (about 1e-7 relative)."""
    sample = rest.covariance()
    values = torch.linalg.eigvalsh(root @ sample @ root.T)
    trace = sample.trace() + root.square().sum()
    fidelity = values.clamp_min(0).sqrt().sum()
    return float((rest.mean - mean).square().sum() + trace - 2 * fidelity)


def frechet_infinity(
    features: Any,
    mean: Any,
    covariance: Any,
    *,
    smallest: int = 5000,
    num_sizes: int = 15,
    seed: int = 0,
) -> Score:
    """Frechet distance extrapolated to infinitely many samples, linear in 1/N.

    Args:
        features: [N, D].
        mean: [D] of the reference.
        covariance: [D, D] of the reference.
        smallest: smallest subset; the sizes are spread evenly from it to N.
        num_sizes: points of the line.
        seed: of the subsets.

    Raises:
        InputError: N not above `smallest`.

    Paper: Chong and Forsyth 2020, "Effectively Unbiased FID and Inception Score", section 3.
    """
    rows = check_features(features)
    if not 2 <= smallest < len(rows):
        raise InputError(f"smallest is {smallest}: expected between 2 and N = {len(rows)}")
    draw = np.random.default_rng(seed)
    sizes = np.linspace(smallest, len(rows), num_sizes).astype(int)
    goal_mean = _vector(mean, "mean")
    root = _root_factor(_symmetric(covariance, "covariance"))
    values = []
    for size in sizes:
        chosen = torch.from_numpy(draw.choice(len(rows), size, replace=False))
        values.append(_replica(Moments.of(rows[chosen]), goal_mean, root))
    (slope, intercept), spread = np.polyfit(1 / sizes, values, 1, cov=True)
    error = float(spread[1, 1]) ** 0.5
    return normal_score(float(intercept), error, len(rows), "linear-1/N", slope=float(slope))
