"""Reference values of the Frechet distance, streaming moments and their intervals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torchmetrics.image.fid import _compute_fid

from arvision.errors import InputError
from arvision.eval import (
    GroupedMoments,
    Moments,
    frechet_distance,
    frechet_from_features,
    frechet_infinity,
    merge_all,
)
from arvision.eval.frechet import frechet_jackknife
from arvision.eval.moments import GroupAssigner


def spd(dim: int, seed: int, rank: int | None = None) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    factor = torch.randn(dim, rank or dim, generator=draw, dtype=torch.float64)
    return factor @ factor.T / (rank or dim)


def test_one_dimension():
    assert frechet_distance([3.0], [[4.0]], [1.0], [[9.0]]) == pytest.approx(4 + 1, abs=1e-12)


def test_commuting_covariances():
    a, b = torch.rand(16).double() + 0.1, torch.rand(16).double() + 0.1
    zero = torch.zeros(16)
    expected = float((a.sqrt() - b.sqrt()).square().sum())
    assert frechet_distance(zero, a.diag(), zero, b.diag()) == pytest.approx(expected, abs=1e-12)


def test_scaled_covariance():
    a, zero = spd(32, 1), torch.zeros(32)
    expected = 0.25 * float(a.trace())
    assert frechet_distance(zero, a, zero, 1.5**2 * a) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rank", [64, 20], ids=["full", "singular"])
def test_non_commuting_closed_form(rank: int):
    a, t, zero = spd(64, 2, rank), spd(64, 3), torch.zeros(64)
    b = t @ a @ t
    expected = float(a.trace() + b.trace() - 2 * (t @ a).trace())
    assert frechet_distance(zero, a, zero, b) == pytest.approx(expected, abs=1e-10)


def test_two_by_two_constant():
    value = frechet_distance([0, 0], [[2.0, 1], [1, 2]], [0, 0], [[1.0, 0], [0, 3]])
    assert value == pytest.approx(8 - 2 * 14**0.5, abs=1e-12)
    assert value == pytest.approx(0.5166852265, abs=1e-10)


def test_rank_deficient_at_512():
    a, t, zero = spd(512, 4, 100), spd(512, 5), torch.zeros(512)
    b = t @ a @ t
    b = (b + b.T) / 2
    expected = float(a.trace() + b.trace() - 2 * (t @ a).trace())
    scale = float(a.trace() + b.trace())
    assert abs(frechet_distance(zero, a, zero, b) - expected) < 1e-10
    # The usual ways lose half the digits here: the reason for the nuclear norm.
    eigenvalues = np.linalg.eigvals(a.numpy() @ b.numpy())
    usual = scale - 2 * float(np.real(np.sqrt(eigenvalues.astype(complex))).sum())
    assert abs(usual - expected) > 1e-9


@pytest.mark.parametrize("smallest", [1e-2, 1e-7, 1e-12, 0.0])
def test_both_factorisations_agree(smallest: float, monkeypatch):
    """Cholesky for well-conditioned covariances, eigenvectors for the rest: one value."""
    draw = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(60, 60, generator=draw, dtype=torch.float64)).Q
    spectrum = torch.linspace(1, 0, 60).double() ** 2 * (1 - smallest) + smallest
    a, b, zero = turn @ spectrum.diag() @ turn.T, spd(60, 11), torch.zeros(60)
    value = frechet_distance(zero, a, zero, b)
    monkeypatch.setattr("arvision.eval.frechet.SAFE_PIVOT", 2.0)
    assert value == pytest.approx(frechet_distance(zero, a, zero, b), abs=1e-11)


def test_self_distance_is_zero_and_never_negative():
    rows = torch.randn(300, 512, dtype=torch.float64)
    own = Moments.of(rows)
    value = frechet_distance(own.mean, own.covariance(), own.mean, own.covariance())
    assert 0 <= value < 1e-9
    assert 0 <= frechet_from_features(rows, rows) < 1e-9
    for seed in range(5):
        near = spd(40, seed, 8)
        assert frechet_distance(torch.zeros(40), near, torch.zeros(40), near * (1 + 1e-12)) >= 0


def test_few_rows_agree_with_covariances():
    a, b = torch.randn(40, 96).double(), torch.randn(30, 96).double() + 0.3
    first, second = Moments.of(a), Moments.of(b)
    whole = frechet_distance(first.mean, first.covariance(), second.mean, second.covariance())
    assert frechet_from_features(a, b) == pytest.approx(whole, rel=1e-12)


def test_null_bias_at_64():
    dim = 64
    for size in (500, 4000):
        values = [
            frechet_from_features(torch.randn(size, dim).double(), torch.randn(size, dim).double())
            for _ in range(8)
        ]
        expected = 2 * dim / size + dim * (dim + 1) / (2 * size)
        # First order in 1/N; the second order adds under 2 % at N = 500, the mean of 8 draws 1 %.
        assert float(np.mean(values)) == pytest.approx(expected, rel=0.04)


def test_equal_to_torch_fidelity_and_torchmetrics():
    a, b = torch.randn(900, 64).double(), torch.randn(800, 64).double() @ spd(64, 7) + 0.1
    first, second = Moments.of(a), Moments.of(b)
    ours = frechet_distance(first.mean, first.covariance(), second.mean, second.covariance())
    stats = [{"mu": m.mean.numpy(), "sigma": m.covariance().numpy()} for m in (first, second)]
    theirs = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert ours == pytest.approx(float(theirs), rel=1e-6)
    metrics = _compute_fid(first.mean, first.covariance(), second.mean, second.covariance())
    assert ours == pytest.approx(float(metrics), rel=1e-6)


def test_equal_to_scipy_sqrtm():
    from scipy.linalg import sqrtm

    a, b = spd(48, 8).numpy(), spd(48, 9).numpy()
    expected = np.trace(a) + np.trace(b) - 2 * np.trace(np.real(sqrtm(a @ b)))
    assert frechet_distance(np.zeros(48), a, np.zeros(48), b) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([0.0], [[1.0]], [0.0, 0.0], np.eye(2)), "dimensions"),
        (([0.0, 0.0], [[1.0, 0.5], [0.0, 1.0]], [0.0, 0.0], np.eye(2)), "symmetric"),
        (([0.0], [[float("nan")]], [0.0], [[1.0]]), "NaN"),
        (([0.0], [[1.0, 0.0]], [0.0], [[1.0]]), r"\[D, D\]"),
        (([[0.0]], [[1.0]], [0.0], [[1.0]]), "vector"),
        (([0.0], [[-1.0]], [0.0], [[-1.0]]), "eigenvalue"),
    ],
)
def test_bad_input(arguments, words: str):
    with pytest.raises(InputError, match=words):
        frechet_distance(*arguments)


def test_one_row_is_refused():
    with pytest.raises(InputError, match="at least 2"):
        frechet_from_features(torch.randn(1, 8), torch.randn(5, 8))
    with pytest.raises(InputError, match="at least 2"):
        Moments.of(torch.randn(1, 8)).covariance()


def test_merge_keeps_digits_where_raw_sums_lose_them():
    rows = torch.randn(1000, 16, dtype=torch.float64) + 1e4
    merged = merge_all(Moments.of(part) for part in rows.split(70))
    expected = np.cov(rows.numpy(), rowvar=False)
    assert np.abs(merged.covariance().numpy() - expected).max() < 1e-11
    single = rows.float()
    raw = (single.T @ single - 1000 * torch.outer(single.mean(0), single.mean(0))) / 999
    assert np.abs(raw.numpy() - expected).max() > 1e-2


def test_add_is_merge_in_place():
    rows = torch.randn(200, 9) + 5
    added = Moments.zero(9)
    for part in rows.split(33):
        added.add(part)
    whole = Moments.of(rows)
    assert added.count == 200
    assert (added.mean - whole.mean).abs().max() < 1e-13
    assert (added.scatter - whole.scatter).abs().max() < 1e-11
    with pytest.raises(InputError, match="expected 9"):
        added.add(torch.randn(3, 8))


def test_without_undoes_merge():
    a, b = torch.randn(50, 8), torch.randn(30, 8) + 2
    rest = Moments.of(torch.cat([a, b])).without(Moments.of(b))
    expected = Moments.of(a)
    assert rest.count == 50
    assert (rest.mean - expected.mean).abs().max() < 1e-12
    assert (rest.scatter - expected.scatter).abs().max() < 1e-10


def test_grouped_moments_do_not_depend_on_batches():
    rows = torch.randn(1500, 12)
    groups = GroupAssigner(3)(range(1500))
    totals = []
    for size in (1500, 64, 7):
        grouped = GroupedMoments(3)
        for start in range(0, 1500, size):
            grouped.update(rows[start : start + size], groups[start : start + size])
        totals.append(grouped.total())
    for other in totals[1:]:
        assert torch.equal(totals[0].mean, other.mean)
        assert torch.equal(totals[0].scatter, other.scatter)


@pytest.mark.parametrize(
    "order", ["sorted", "interleaved", "unknown sorted", "unknown interleaved"]
)
def test_groups_are_balanced_within_classes(order: str):
    num_classes, per_class = 50, 40
    index = np.arange(num_classes * per_class)
    labels = index // per_class if "sorted" in order else index % num_classes
    known = None if "unknown" in order else labels.tolist()
    groups = np.array(GroupAssigner(20)(index.tolist(), known))
    counts = np.bincount(labels * 20 + groups, minlength=num_classes * 20)
    assert np.bincount(groups).max() <= 1.05 * len(index) / 20
    if known is not None:
        assert counts.min() == counts.max() == 2
    else:
        assert counts.max() <= 5


def test_jackknife_interval_covers():
    """95 % intervals around the expected estimate hold it in 80 to 100 % of 40 trials."""
    dim, size, hits, values, intervals = 8, 400, 0, [], []
    for _ in range(40):
        rows = torch.randn(size, dim).double() * 1.3
        grouped = GroupedMoments()
        grouped.update(rows, GroupAssigner()(range(size)))
        score = frechet_jackknife(grouped.parts(), torch.zeros(dim), torch.eye(dim).double())
        values.append(score.value)
        intervals.append(score.interval)
    centre = float(np.mean(values))
    hits = sum(low <= centre <= high for low, high in intervals)
    assert 32 <= hits <= 40
    assert np.mean([high - low for low, high in intervals]) < 0.5 * centre * 4


def test_an_interval_never_starts_below_zero():
    rows = torch.randn(60, 4).double()
    grouped = GroupedMoments(5)
    grouped.update(rows, [i % 5 for i in range(60)])
    whole = Moments.of(rows)
    score = frechet_jackknife(grouped.parts(), whole.mean, whole.covariance())
    assert score.value < 1e-9
    assert score.interval is not None
    assert score.interval[0] == 0.0 < score.interval[1]


def test_infinity_removes_the_bias():
    dim, size = 16, 4000
    rows = torch.randn(size, dim).double()
    zero, eye = torch.zeros(dim), torch.eye(dim).double()
    plain = frechet_from_features(rows, torch.randn(200_000, dim).double())
    extrapolated = frechet_infinity(rows, zero, eye, smallest=400)
    assert abs(extrapolated.value) < 0.5 * plain
    with pytest.raises(InputError, match="smallest"):
        frechet_infinity(rows, zero, eye, smallest=5000)
