"""Reference values of IS, KID, precision and recall."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from arvision.errors import InputError
from arvision.eval import bootstrap_mean, inception_score, kernel_distance, precision_recall
from arvision.eval.scores import (
    check_label_order,
    check_score_order,
    mmd_unbiased,
    refuse_sorted,
)


def test_inception_score_of_identical_rows_is_one():
    row = torch.randn(1, 20).double()
    assert inception_score(row.expand(100, -1)).value == pytest.approx(1, abs=1e-12)


def test_inception_score_of_balanced_one_hot_is_the_number_of_classes():
    labels = torch.arange(700) % 7
    logits = torch.nn.functional.one_hot(labels, 7).double() * 1e4
    assert inception_score(logits).value == pytest.approx(7, abs=1e-9)


def test_inception_score_equals_torch_fidelity():
    logits = torch.randn(1000, 30).double() * 3
    theirs = isc_features_to_metric(logits, splits=10, shuffle=False)
    ours = inception_score(logits)
    assert ours.value == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert ours.details["std"] == pytest.approx(theirs["inception_score_std"], rel=1e-9)


def test_sorted_labels_ruin_the_inception_score():
    """A 90 % confident classifier on 1,000 classes: about 60 sorted, about 360 interleaved."""
    num_classes, count = 1000, 10_000
    logp_right, logp_wrong = np.log(0.9), np.log(0.1 / (num_classes - 1))
    values = {}
    for order in ("sorted", "interleaved"):
        index = torch.arange(count)
        labels = index // 10 if order == "sorted" else index % num_classes
        logits = torch.full((count, num_classes), float(logp_wrong), dtype=torch.float64)
        logits[index, labels] = float(logp_right)
        values[order] = inception_score(logits).value
    assert values["sorted"] == pytest.approx(59.7, abs=1.5)
    assert values["interleaved"] == pytest.approx(362, abs=3)


def test_sorted_labels_are_detected():
    assert check_label_order([i % 100 for i in range(5000)])
    assert check_label_order(None)
    assert check_label_order(np.random.default_rng(0).integers(0, 100, 5000).tolist())
    ordered = [i // 50 for i in range(5000)]
    assert not check_label_order(ordered)
    with pytest.raises(InputError, match="sorted by class"):
        refuse_sorted(check_label_order(ordered))
    with pytest.warns(UserWarning, match="sorted by class"):
        refuse_sorted(False, allow=True)


@pytest.mark.parametrize("confidence", [0.5, 0.9])
def test_sorted_files_without_labels_are_detected(confidence: float):
    """By the score itself: it rises when the file is shuffled."""
    num_classes, count = 100, 2000
    draw = np.random.default_rng(0)
    for labels, is_fine in (
        (np.arange(count) // 20, False),
        (np.arange(count) % num_classes, True),
        (draw.integers(0, num_classes, count), True),
    ):
        logits = torch.full((count, num_classes), np.log((1 - confidence) / (num_classes - 1)))
        seen = np.where(draw.random(count) < confidence, labels, draw.integers(0, 100, count))
        logits[torch.arange(count), torch.from_numpy(seen)] = np.log(confidence)
        assert check_score_order(logits) is is_fine


def test_kid_of_two_points_is_minus_thirteen():
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]])
    assert mmd_unbiased(x.double(), y.double()) == pytest.approx(-13, abs=1e-12)
    assert kernel_distance(x, y).value == pytest.approx(-13, abs=1e-12)


def test_kid_agrees_with_torch_fidelity():
    a, b = torch.randn(600, 32).double(), torch.randn(500, 32).double() * 1.2 + 0.2
    ours = kernel_distance(a, b, num_subsets=100, subset_size=200)
    theirs = kid_features_to_metric(a, b, kid_subsets=100, kid_subset_size=200, rng_seed=1)
    mean, std = theirs["kernel_inception_distance_mean"], theirs["kernel_inception_distance_std"]
    assert ours.value == pytest.approx(mean, abs=4 * std / 100**0.5 * 2**0.5)


def test_precision_recall_extremes():
    rows = torch.randn(60, 5)
    same = precision_recall(rows, rows)
    assert same["precision"].value == same["recall"].value == same["coverage"].value == 1
    far = precision_recall(rows, rows + 1e3)
    assert far["precision"].value == far["recall"].value == far["density"].value == 0


def brute_force(samples: np.ndarray, reference: np.ndarray, k: int) -> dict[str, float]:
    def square(a, b):
        return ((a[:, None] - b[None]) ** 2).sum(-1)

    radius_s = np.sort(square(samples, samples), 1)[:, k]
    radius_r = np.sort(square(reference, reference), 1)[:, k]
    inside = square(samples, reference) <= radius_r[None]
    return {
        "precision": inside.any(1).mean(),
        "recall": (square(samples, reference) <= radius_s[:, None]).any(0).mean(),
        "density": inside.sum() / k / len(samples),
        "coverage": inside.any(0).mean(),
    }


@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall_equal_brute_force_over_tiles(k: int, monkeypatch):
    monkeypatch.setattr("arvision.eval.scores.TILE", 37)
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(150, 6)), draw.normal(size=(110, 6)) * 1.4 + 0.5
    ours = precision_recall(a, b, k, dtype=torch.float64)
    for name, value in brute_force(a, b, k).items():
        assert ours[name].value == pytest.approx(value, abs=1e-12), name


def test_precision_recall_equal_torch_fidelity():
    a, b = torch.randn(400, 16), torch.randn(300, 16) * 1.1
    theirs = prc_features_to_metric(a, b, prc_neighborhood=3)
    ours = precision_recall(a, b)
    assert ours["precision"].value == pytest.approx(theirs["precision"], abs=1e-6)
    assert ours["recall"].value == pytest.approx(theirs["recall"], abs=1e-6)


def test_far_from_the_origin_keeps_precision():
    rows = torch.randn(80, 8) + 3000.0
    assert precision_recall(rows, rows)["precision"].value == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: inception_score(torch.randn(5, 3)), "splits"),
        (lambda: kernel_distance(torch.randn(5, 3), torch.randn(5, 4)), "dimensions"),
        (lambda: kernel_distance(torch.randn(1, 3), torch.randn(5, 3)), "subsets"),
        (lambda: precision_recall(torch.randn(3, 3), torch.randn(9, 3)), "k is 3"),
        (lambda: precision_recall(torch.randn(9, 3), torch.randn(9, 4)), "dimensions"),
        (lambda: precision_recall(torch.full((9, 3), float("nan")), torch.randn(9, 3)), "finite"),
        (lambda: bootstrap_mean([]), "at least one"),
    ],
)
def test_bad_input(call, words: str):
    with pytest.raises(InputError, match=words):
        call()


def test_bootstrap_interval_has_the_normal_width():
    values = np.random.default_rng(0).normal(size=400)
    score = bootstrap_mean(values)
    assert score.interval is not None
    width = score.interval[1] - score.interval[0]
    assert width == pytest.approx(2 * 1.96 * values.std() / 400**0.5, rel=0.1)
