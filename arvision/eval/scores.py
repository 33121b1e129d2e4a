"""Inception score, kernel distances, precision and recall, density and coverage, from features."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .moments import check_features
from .score import Score, normal_score

TILE = 2048
NUM_SPLITS = 10
SCORE_LOSS = 0.9
NUM_SHUFFLES = 20
NUM_LABEL_SHUFFLES = 200  # cheap, and needed where a class has two images
SIGMAS = 5.0


def inception_score(logits: Any, num_splits: int = NUM_SPLITS) -> Score:
    """exp of the mean divergence of class predictions from their average.

    ADM's definition: consecutive, unshuffled chunks, the mean over chunks. A class-sorted file
    therefore shows each chunk few classes and scores far too low: see `check_label_order`.

    Args:
        logits: [N, classes] without bias, as the `inception-adm` extractor gives.
        num_splits: chunks; a remainder of N / num_splits is left out, as ADM does.

    Returns:
        The mean over chunks; `standard_error` is that of the mean.

    Raises:
        InputError: fewer images than chunks.

    Paper: Salimans et al. 2016, "Improved Techniques for Training GANs", section 4.
    """
    rows = check_features(logits, "logits")
    if num_splits < 1 or len(rows) < num_splits:
        raise InputError(f"{len(rows)} images in {num_splits} splits: expected at least one each")
    size = len(rows) // num_splits
    values = []
    for chunk in rows[: size * num_splits].split(size):
        logp = chunk.log_softmax(-1)
        marginal = logp.exp().mean(0)
        log_marginal = torch.where(marginal > 0, marginal.log(), torch.zeros_like(marginal))
        divergence = (logp.exp() * (logp.clamp_min(-1e300) - log_marginal)).sum(-1).mean()
        values.append(float(divergence.exp()))
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0
    spread = float(np.std(values))
    return normal_score(
        float(np.mean(values)), error, len(rows), f"{num_splits}-splits", std=spread
    )


def check_label_order(
    labels: Sequence[int] | None, num_splits: int = NUM_SPLITS, seed: int = 2020
) -> bool:
    """Whether the order of the labels leaves the inception score as high as a shuffled order would.

    For a perfect classifier the log of the score is the entropy of the classes within a chunk, on
    average: that of the whole file less the mutual information between chunk and class. Shuffled
    files have some of it by chance, the more the rarer the classes are. The file counts as sorted
    where it has so much more that the score falls below 90 %, and more than chance explains: more
    than any of 200 shuffles, by 5 standard deviations.

    Args:
        labels: [N] class ids in file order; None (unknown) passes.
        num_splits: chunks of the score.
        seed: of the shuffles.
    """
    if labels is None or len(labels) < 2 * num_splits:
        return True
    ids = np.unique(np.asarray(labels), return_inverse=True)[1].reshape(-1)
    ids = ids[: len(ids) // num_splits * num_splits]
    draw = np.random.default_rng(seed)
    own = _chunk_information(ids, num_splits)
    excess: list[float] = []
    for count in (NUM_SHUFFLES, NUM_LABEL_SHUFFLES):  # a few are enough for most files
        while len(excess) < count:
            excess.append(own - _chunk_information(draw.permutation(ids), num_splits))
        if not _is_beyond_chance(excess, -np.log(SCORE_LOSS)):
            return True
    return False


def _is_beyond_chance(excess: Sequence[float], least: float) -> bool:
    """Whether a file has more than each of its shuffles, by much, and much beside their spread."""
    spread = SIGMAS * float(np.std(excess, ddof=1))
    return min(excess) > 0 and float(np.mean(excess)) > max(least, spread)


def _chunk_information(ids: np.ndarray, num_splits: int) -> float:
    """Mutual information, in nats, between consecutive chunks and the class ids [N] in them."""
    num_classes = int(ids.max()) + 1
    chunk = np.repeat(np.arange(num_splits), len(ids) // num_splits)
    joint = np.bincount(chunk * num_classes + ids, minlength=num_splits * num_classes)
    whole = np.tile(np.bincount(ids), num_splits)[joint > 0]
    joint = joint[joint > 0]
    return float((joint / len(ids) * np.log(joint * num_splits / whole)).sum())


def check_score_order(logits: Any, num_splits: int = NUM_SPLITS, seed: int = 2020) -> bool:
    """Whether a file without labels scores about the same when its images are shuffled.

    Chunks of a class-sorted file see few classes, so its inception score rises when it is
    shuffled; below 90 % of the shuffled scores, and further below them than they are spread, the
    file counts as sorted.

    Args:
        logits: [N, classes] in file order.
        num_splits: chunks of the score.
        seed: of the shuffles.
    """
    rows = check_features(logits, "logits")
    draw, own = np.random.default_rng(seed), inception_score(rows, num_splits).value

    def excess(count: int) -> list[float]:
        orders = (torch.from_numpy(draw.permutation(len(rows))) for _ in range(count))
        return [np.log(inception_score(rows[order], num_splits).value / own) for order in orders]

    first = excess(1)
    if first[0] <= -np.log(SCORE_LOSS):  # one look is enough for most files
        return True
    return not _is_beyond_chance(first + excess(NUM_SHUFFLES - 1), -np.log(SCORE_LOSS))


def refuse_sorted(is_fine: bool, allow: bool = False) -> None:
    """Stop an inception score of a class-sorted file, or warn where the caller allows it.

    Args:
        is_fine: what `check_label_order` or `check_score_order` said.
        allow: warn instead.

    Raises:
        InputError: the file is sorted and `allow` is false.
    """
    if is_fine:
        return
    message = (
        "samples are sorted by class, which breaks the inception score (chunks are unshuffled): "
        "expected label(i) = i mod the number of classes"
    )
    if not allow:
        raise InputError(message + "; allow sorted samples to score them anyway")
    warnings.warn(message, stacklevel=3)


def _square_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """Squared L2 distances [n, m], from inner products around the columns' mean."""
    centre = columns.mean(0)
    rows, columns = rows - centre, columns - centre
    product = rows @ columns.T
    norms = rows.square().sum(1)[:, None] + columns.square().sum(1)[None]
    return (norms - 2 * product).clamp_min_(0)


def neighbour_radii(rows: Tensor, k: int = 3) -> Tensor:
    """Squared distance [N] of each row [N, D] to its k-th neighbour, not counting itself."""
    parts = []
    for start in range(0, len(rows), TILE):
        tile = _square_distances(rows[start : start + TILE], rows)
        own = torch.arange(start, start + len(tile))
        tile[torch.arange(len(tile)), own] = 0.0
        parts.append(tile.kthvalue(k + 1, dim=1).values)
    return torch.cat(parts)


def precision_recall(
    samples: Any,
    reference: Any,
    k: int = 3,
    *,
    dtype: torch.dtype = torch.float32,
    reference_radii: Tensor | None = None,
) -> dict[str, Score]:
    """Precision, recall, density and coverage of samples against reference features.

    ADM's precision and recall: squared L2 distances; the radius of a point is its (k+1)-th
    smallest distance, itself included; a point is inside where distance <= radius. Precision is the
    share of samples inside some reference ball, recall the converse. Distances come in
    tiles of 2,048 rows, so memory is 2,048 x N and not N x N.

    Args:
        samples: [N, D].
        reference: [M, D].
        k: neighbours.
        dtype: of the distances.
        reference_radii: `neighbour_radii(reference, k)` where they are known.

    Returns:
        `precision`, `recall` (k neighbours), `density`, `coverage`.

    Raises:
        InputError: not more than k rows on a side, different widths.

    Paper: Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric", eq. 1-2; Naeem et al.
    2020, "Reliable Fidelity and Diversity Metrics", eq. 4-5.
    """
    rows, goal = _finite(samples, "samples", dtype), _finite(reference, "reference", dtype)
    if rows.shape[1] != goal.shape[1]:
        raise InputError(f"features have {rows.shape[1]} and {goal.shape[1]} dimensions")
    if k < 1 or min(len(rows), len(goal)) <= k:
        raise InputError(f"k is {k} with {len(rows)} and {len(goal)} rows: expected 1 <= k < rows")
    sample_radii = neighbour_radii(rows, k)
    goal_radii = neighbour_radii(goal, k) if reference_radii is None else reference_radii
    inside_goal = torch.zeros(len(rows))
    reached, covered = torch.zeros(len(goal), dtype=torch.bool), torch.zeros(len(goal)).bool()
    for start in range(0, len(rows), TILE):
        tile = _square_distances(rows[start : start + TILE], goal)
        within = tile <= goal_radii
        inside_goal[start : start + TILE] = within.sum(1).float()
        covered |= within.any(0)
        reached |= (tile <= sample_radii[start : start + TILE, None]).any(0)
    shares = {
        "precision": (inside_goal > 0).double().mean(),
        "recall": reached.double().mean(),
        "density": inside_goal.double().mean() / k,
        "coverage": covered.double().mean(),
    }
    return {
        name: Score(float(share), len(rows), details={"k": k}) for name, share in shares.items()
    }


def _finite(features: Any, name: str, dtype: torch.dtype) -> Tensor:
    matrix = torch.as_tensor(features)
    if matrix.ndim != 2 or not bool(torch.isfinite(matrix).all()):
        raise InputError(f"{name} features: expected a finite matrix [N, D], {list(matrix.shape)}")
    return matrix.to("cpu", dtype)


def polynomial_kernel(dim: int) -> Callable[[Tensor, Tensor], Tensor]:
    """(x . y / D + 1)^3."""
    return lambda a, b: (a @ b.T / dim + 1).pow(3)


def mmd_unbiased(rows: Tensor, goal: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy under the cubic kernel.

    Paper: Gretton et al. 2012, "A Kernel Two-Sample Test", eq. 3.
    """
    kernel = polynomial_kernel(rows.shape[1])
    count_a, count_b = len(rows), len(goal)
    own_a, own_b, across = kernel(rows, rows), kernel(goal, goal), kernel(rows, goal)
    within = (own_a.sum() - own_a.trace()) / (count_a * (count_a - 1))
    within = within + (own_b.sum() - own_b.trace()) / (count_b * (count_b - 1))
    return float(within - 2 * across.mean())


def kernel_distance(
    samples: Any, reference: Any, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Score:
    """KID: the mean unbiased MMD over random subsets.

    Args:
        samples: [N, D].
        reference: [M, D].
        num_subsets: subsets drawn.
        subset_size: rows of each, cut to what there is.
        seed: of the subsets.

    Raises:
        InputError: fewer than 2 rows, different widths.

    Paper: Binkowski et al. 2018, "Demystifying MMD GANs", section 4.
    """
    rows, goal = check_features(samples, "samples"), check_features(reference, "reference")
    if rows.shape[1] != goal.shape[1]:
        raise InputError(f"features have {rows.shape[1]} and {goal.shape[1]} dimensions")
    size = min(subset_size, len(rows), len(goal))
    if size < 2 or num_subsets < 1:
        raise InputError(
            f"subsets of {size} images, {num_subsets} of them: expected 2 and 1 or more"
        )
    if size == len(rows) == len(goal):
        return Score(mmd_unbiased(rows, goal), len(rows), details={"subset_size": size})
    draw = np.random.default_rng(seed)
    values = []
    for _ in range(num_subsets):
        chosen = [torch.from_numpy(draw.choice(len(s), size, replace=False)) for s in (rows, goal)]
        values.append(mmd_unbiased(rows[chosen[0]], goal[chosen[1]]))
    error = float(np.std(values, ddof=1) / num_subsets**0.5) if num_subsets > 1 else 0.0
    return normal_score(
        float(np.mean(values)), error, len(rows), f"{num_subsets}-subsets", subset_size=size
    )


def bootstrap_mean(values: Any, *, num_draws: int = 2000, seed: int = 0) -> Score:
    """Mean of per-image values with a 95 % percentile bootstrap interval.

    Raises:
        InputError: no values, or values that are not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0 or not np.isfinite(array).all():
        raise InputError(f"values of shape {array.shape}: expected finite numbers, at least one")
    draw = np.random.default_rng(seed)
    means = np.array([draw.choice(array, len(array)).mean() for _ in range(num_draws)])
    low, high = (float(q) for q in np.quantile(means, (0.025, 0.975)))
    return Score(float(array.mean()), len(array), (low, high), float(means.std()), "bootstrap")
