"""References: statistics of any maker, few images, orders of labels, and modules of the caller's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import arvision
from arvision.errors import InputError
from arvision.eval import (
    FrechetDistance,
    Moments,
    evaluate,
    frechet_distance,
    get_extractor,
    inception_score,
    load_reference,
    open_source,
)
from arvision.eval.evaluate import choose_metrics
from arvision.eval.extract import extract
from arvision.eval.frechet import check_gaussian, frechet_jackknife
from arvision.eval.full_report import full_report
from arvision.eval.reference import prepare_reference
from arvision.eval.scores import check_label_order, check_score_order

CONV = get_extractor("random-conv")
NAME = "frechet_random-conv"


def pictures(count: int, seed: int = 0, side: int = 8) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=draw)


class Unread:
    """Images that nobody may read before the metrics are chosen."""

    name, labels = "unread", None

    def __len__(self) -> int:
        return 300

    def read(self, start: int, stop: int) -> torch.Tensor:
        raise AssertionError("a picture was read")


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    found = extract(open_source(pictures(300)), CONV, progress=False)
    assert found is not None
    return torch.from_numpy(np.array(found.features))


@pytest.fixture(scope="module")
def files(tmp_path_factory, features) -> dict[str, Path]:
    """The same statistics as different packages write them."""
    folder, whole = tmp_path_factory.mktemp("stats"), Moments.of(features)
    mu, sigma = whole.mean.numpy(), whole.covariance().numpy()
    images = pictures(300).permute(0, 2, 3, 1).numpy()
    spatial = {"mu_s": np.zeros(7), "sigma_s": np.eye(7)}
    contents: dict[str, dict[str, Any]] = {
        "pytorch-fid": {"mu": mu, "sigma": sigma},
        "float32": {"mu": mu.astype(np.float32), "sigma": sigma.astype(np.float32)},
        "row": {"mu": mu[None], "sigma": sigma},
        "ours": {"count": whole.count, "mean": whole.mean, "scatter": whole.scatter},
        "feats": {"feats": features},
        "adm": {"mu": mu, "sigma": sigma, "arr_0": images, **spatial},
    }
    for name, arrays in contents.items():
        save = np.savez_compressed if name == "feats" else np.savez
        save(folder / f"{name}.npz", **arrays)
    return {name: folder / f"{name}.npz" for name in contents}


@pytest.mark.parametrize("name", ["pytorch-fid", "float32", "row", "ours", "feats", "adm"])
def test_statistics_of_every_maker_score_alike(files, name):
    wanted = evaluate(pictures(200, 1), pictures(300), CONV, metrics="frechet", progress=False)
    scores = evaluate(pictures(200, 1), files[name], CONV, metrics="frechet", progress=False)
    assert wanted is not None and scores is not None  # noqa: PT018
    assert scores[NAME].value == pytest.approx(wanted[NAME].value, rel=1e-5)


def test_moments_in_memory_are_a_reference(features):
    scores = evaluate(pictures(300), Moments.of(features), CONV, metrics="frechet", progress=False)
    assert scores is not None
    assert scores[NAME].value < 1e-9


@pytest.mark.parametrize("name", ["pytorch-fid", "ours"])
def test_statistics_score_what_they_allow_and_name_the_rest(files, name, tmp_path):
    message = r"not scored: precision, recall, density, coverage, kid \(.*has no images: expected"
    with pytest.warns(UserWarning, match=message):
        scores = evaluate(pictures(300), str(files[name]), CONV, progress=False)
    assert scores is not None
    assert list(scores) == [NAME]
    with pytest.warns(UserWarning, match=message):
        found = full_report(pictures(300), files[name], CONV, progress=False)
    assert found is not None
    assert list(found["scores"]) == [NAME]


@pytest.mark.parametrize(("name", "wanted"), [("feats", 6), ("adm", 6)])
def test_statistics_with_rows_or_images_score_all(files, name, wanted, recwarn):
    scores = evaluate(pictures(300), files[name], CONV, progress=False)
    assert scores is not None
    assert len(scores) == wanted
    assert scores["precision"].value == scores["recall"].value == 1
    assert not [w for w in recwarn if "not scored" in str(w.message)]


@pytest.mark.parametrize("metrics", ["precision", ["recall"], ["frechet", "kid"], "frechet, kid"])
def test_what_was_asked_for_and_cannot_be_is_refused_unread(files, metrics):
    with pytest.raises(InputError, match=r"metric (precision|recall|kid): .*has no images: exp"):
        evaluate(Unread(), files["pytorch-fid"], CONV, metrics=metrics, progress=False)


def test_an_evaluation_refuses_before_it_draws(files, tmp_path):
    with pytest.raises(InputError, match="has no images"):
        arvision.evaluate(
            "llamagen-fashion",
            out=tmp_path / "out",
            protocol="fashion",
            reference=files["pytorch-fid"],
            extractor=CONV,
            metrics=["precision"],
            num=40,
        )
    assert not (tmp_path / "out").exists()


BAD_STATISTICS: dict[str, tuple[dict[str, Any], str]] = {
    "mu alone": ({"mu": np.zeros(64)}, "expected sigma too"),
    "sigma alone": ({"sigma": np.eye(64)}, "expected mu too"),
    "width": ({"mu": np.zeros(9), "sigma": np.eye(9)}, r"for random-conv"),
    "not square": ({"mu": np.zeros(64), "sigma": np.ones((64, 9))}, r"for random-conv"),
    "nan": ({"mu": np.full(64, np.nan), "sigma": np.eye(64)}, "finite"),
    "infinite": ({"mu": np.zeros(64), "sigma": np.diag([np.inf] * 64)}, "finite"),
    "complex": ({"mu": np.zeros(64), "sigma": np.eye(64) + 0j}, "complex128: expected real"),
    "texts": ({"mu": np.full(64, "a"), "sigma": np.eye(64)}, "<U1: expected real numbers"),
    "asymmetric": ({"mu": np.zeros(64), "sigma": np.tri(64)}, "not symmetric"),
    "negative": ({"mu": np.zeros(64), "sigma": -np.eye(64)}, "smallest eigenvalue -1"),
    "indefinite": (
        {"mu": np.zeros(64), "sigma": np.diag([1.0] * 63 + [-1e-3])},
        "smallest eigenvalue -0.001 beside 1: expected a covariance",
    ),
    "count": ({"count": 1, "mean": np.zeros(64), "scatter": np.eye(64)}, "expected at least 2"),
    "count text": ({"count": "x", "mean": np.zeros(64), "scatter": np.eye(64)}, "at least 2"),
    "feats": ({"feats": np.zeros((9, 5))}, "for random-conv"),
    "feats flat": ({"feats": np.zeros(64)}, r"expected \[N, D\]"),
    "images": ({"x": np.zeros(3)}, "holds x: expected images under arr_0"),
    "float images": (
        {"mu": np.zeros(64), "sigma": np.eye(64), "arr_0": np.zeros((4, 8, 8, 3))},
        "",
    ),
}


@pytest.mark.parametrize("name", BAD_STATISTICS)
def test_bad_statistics_are_one_line_before_a_picture_is_read(tmp_path, name):
    arrays, message = BAD_STATISTICS[name]
    np.savez(tmp_path / "stats.npz", **arrays)
    with pytest.raises(InputError, match=message) as error:
        evaluate(Unread(), tmp_path / "stats.npz", CONV, progress=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("count", [3, 20, 60, 500])
def test_float32_statistics_are_a_covariance(count):
    draw = torch.Generator().manual_seed(count)
    scales = torch.logspace(1, -3, 64, dtype=torch.float64)
    rows = torch.randn(count, 64, generator=draw, dtype=torch.float64) * scales
    other = Moments.of(torch.randn(400, 64, generator=draw, dtype=torch.float64) * scales)
    exact = Moments.of(rows)
    small = np.cov(rows.float().numpy(), rowvar=False, dtype=np.float32)
    for covariance in (small, small.astype(np.float64), exact.covariance().float()):
        lowest = float(np.linalg.eigvalsh(np.asarray(covariance, np.float64)).min())
        assert lowest < 0 or count > 64
        check_gaussian(exact.mean, covariance, "reference")
        ends = other.mean, other.covariance()
        wanted = frechet_distance(exact.mean, exact.covariance(), *ends)
        assert frechet_distance(exact.mean, covariance, *ends) == pytest.approx(wanted, rel=3e-3)
        assert frechet_distance(exact.mean, covariance, exact.mean, covariance) < 1e-6
        parts = [Moments.of(rows[k::3]) for k in range(3)] if count > 3 else [exact]
        assert frechet_jackknife(parts, exact.mean, covariance).value < 3e-3


@pytest.mark.parametrize("relative", [-1e-9, -1e-8, -1e-7])
def test_eigenvalues_that_rounding_makes_negative_pass(relative):
    values = np.r_[np.ones(1), np.full(255, 1e-3)]
    values[-1] = relative
    matrix = np.diag(values)
    assert frechet_distance(np.zeros(256), matrix, np.zeros(256), matrix) < 1e-12


# Few images, odd sizes of batches.


def test_a_reference_of_three_images(tmp_path):
    message = r"not scored: precision, recall, density, coverage \(.*holds 3 images: expected at"
    with pytest.warns(UserWarning, match=message):
        scores = evaluate(pictures(50), pictures(3, 1), CONV, progress=False)
    assert scores is not None
    assert list(scores) == [NAME, "kid"]
    with pytest.raises(InputError, match="metric recall: tensor holds 3 images: expected at least"):
        evaluate(Unread(), pictures(3), CONV, metrics=["recall"], progress=False)
    with pytest.warns(UserWarning, match="3 samples: expected at least 4"):
        scores = evaluate(pictures(3), pictures(50), CONV, progress=False)
    assert scores is not None
    assert "precision" not in scores
    network = get_extractor("fashion-classifier")
    with pytest.raises(InputError, match="metric is: 9 samples: expected at least 10"):
        evaluate(pictures(9, side=32), pictures(9, side=32), network, metrics="is")
    for few in (pictures(1), pictures(0)):
        with pytest.raises(InputError, match=r"(samples|images?)"):
            evaluate(few, pictures(50), CONV, progress=False)
        with pytest.raises(InputError, match=r"(samples|images?)"):
            evaluate(pictures(50), few, CONV, progress=False)


@pytest.mark.parametrize("size", [0, -1, 1.5, "8", None, True, float("nan")])
def test_a_batch_size_is_a_count(size):
    with pytest.raises(InputError, match=r"batch_size .*expected an integer >= 1"):
        evaluate(Unread(), Unread(), CONV, batch_size=size, progress=False)
    with pytest.raises(InputError, match=r"batch_size .*expected an integer >= 1"):
        extract(Unread(), CONV, batch_size=size, progress=False)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ("", "unknown metric ''"),
        ([], "no metric"),
        ("fid", "unknown metric 'fid'"),
        (3, "metrics 3: expected names"),
        ([None], "unknown metric 'None'"),
    ],
)
def test_metrics_that_do_not_exist(metrics, message):
    goal = prepare_reference(pictures(50), CONV)
    with pytest.raises(InputError, match=message):
        choose_metrics(metrics, CONV, goal)


def test_references_of_every_kind(tmp_path):
    images = pictures(60).permute(0, 2, 3, 1).numpy()
    np.save(tmp_path / "a.npy", images)
    for given in (images, list(images), tmp_path / "a.npy", open_source(images)):
        goal = load_reference(given, CONV, need_rows=True, progress=False)
        assert goal is not None
        scores = evaluate(given, goal, CONV, metrics=["frechet", "recall"], progress=False)
        assert scores is not None
        assert scores[NAME].value < 1e-9
        assert scores["recall"].value == 1


# Labels.


def labels_file(path: Path, labels: Any) -> Path:
    np.savez(path, arr_0=pictures(40, side=32).permute(0, 2, 3, 1).numpy(), arr_1=labels)
    return path


@pytest.mark.parametrize(
    "labels",
    [
        np.arange(40) % 4,
        (np.arange(40) % 4).astype(np.float32),
        np.array(["cat", "dog", "owl", "pig"])[np.arange(40) % 4],
        np.array([b"cat", b"dog", b"owl", b"pig"])[np.arange(40) % 4],
        (np.arange(40) % 4)[:, None],
        np.arange(40) % 4 - 1,
        (np.arange(40) % 2).astype(bool),
    ],
)
def test_labels_of_any_type_count(tmp_path, labels):
    path = labels_file(tmp_path / "a.npz", labels)
    network = get_extractor("fashion-classifier")
    scores = evaluate(path, pictures(40, side=32), network, progress=False, metrics="is,frechet")
    assert scores is not None
    plain = evaluate(
        labels_file(tmp_path / "b.npz", np.unique(labels.reshape(-1), return_inverse=True)[1]),
        *(pictures(40, side=32), network),
        metrics="is,frechet",
        progress=False,
    )
    assert plain is not None
    assert {k: s.value for k, s in scores.items()} == {k: s.value for k, s in plain.items()}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.arange(40) / 3, "labels of dtype float64, expected class ids"),
        (np.full(40, np.nan), "expected class ids"),
        (np.full(40, np.inf), "expected class ids"),
        (np.arange(40) + 1j, "expected class ids"),
        (np.full(40, 2**63, np.uint64), "expected class ids"),
        (np.full(40, 1e300), "expected class ids"),
        (np.arange(39), "39 labels for 40 images"),
        (np.eye(4)[np.arange(40) % 4], "160 labels for 40 images"),
        (np.zeros((40, 64, 64, 3), np.uint8), "491520 labels for 40 images"),
        (np.array([None, "a"] * 20, dtype=object), "pickled objects"),
        (np.array("2020-01-01", "M8[D]") + np.arange(40), "expected class ids"),
    ],
)
def test_labels_that_are_no_classes_are_one_line(tmp_path, labels, message):
    path = labels_file(tmp_path / "a.npz", labels)
    with pytest.raises(InputError, match=message):
        open_source(path)


def long_tailed(count: int, num_classes: int, seed: int, power: float = 1.0) -> np.ndarray:
    """Labels in random order, class k with probability like 1 / (k + 1)^power."""
    share = (1.0 + np.arange(num_classes)) ** -power
    return np.random.default_rng(seed).choice(num_classes, count, p=share / share.sum())


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
@pytest.mark.parametrize(("count", "num_classes"), [(20, 2), (40, 10), (1000, 100), (2000, 500)])
def test_shuffled_long_tailed_labels_are_not_sorted(count, num_classes, power):
    for seed in range(40):
        assert check_label_order(long_tailed(count, num_classes, seed, power).tolist())


@pytest.mark.parametrize("power", [0.0, 1.0])
@pytest.mark.parametrize(("count", "num_classes"), [(40, 10), (1000, 100), (5000, 1000), (100, 2)])
def test_sorted_long_tailed_labels_are(count, num_classes, power):
    for seed in range(5):
        labels = np.sort(long_tailed(count, num_classes, seed, power))
        assert not check_label_order(labels.tolist())
        assert not check_label_order(labels[::-1].tolist())
        runs = np.random.default_rng(seed).permutation(labels.max() + 1)[labels]
        assert not check_label_order(runs[np.argsort(runs, kind="stable")].tolist())


def test_the_label_check_agrees_with_the_score_it_protects():
    """What passes scores within 10 % of its shuffles, what does not falls below 90 %."""
    draw, verdicts = np.random.default_rng(0), set()
    for mixed in (0.0, 0.3, 0.6, 0.7, 0.8, 0.9, 1.0):
        labels = np.sort(long_tailed(2000, 50, 1))
        moved = np.flatnonzero(draw.random(2000) < mixed)
        labels[moved] = labels[draw.permutation(moved)]
        logits = torch.nn.functional.one_hot(torch.from_numpy(labels)).double() * 50
        own = inception_score(logits).value
        shuffled = np.mean([inception_score(logits[torch.randperm(2000)]).value for _ in range(9)])
        is_fine = check_label_order(labels.tolist())
        verdicts.add(is_fine)
        if abs(own / shuffled - 0.9) > 0.02:
            assert is_fine == (own > 0.9 * shuffled)
            assert check_score_order(logits) == is_fine
    assert verdicts == {True, False}


# The caller's module.


class Features(torch.nn.Module):
    """With all that a caller may notice: modes, gradients, buffers that training changes, hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 7, 3, 2)
        self.norm = torch.nn.BatchNorm2d(7)
        self.drop = torch.nn.Dropout(0.5)
        self.convolution.bias.requires_grad_(False)  # type: ignore[union-attr]
        self.norm.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        dtype = self.convolution.weight.dtype
        hidden = self.norm(self.convolution(images.to(dtype) / 255))
        return self.drop(hidden).mean((2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_module_of_the_callers_stays_as_it_was(dtype):
    module, seen = Features().to(dtype), []
    module.train()
    module.norm.eval()
    module.convolution.register_forward_hook(lambda *_: seen.append(1))

    def state() -> tuple[Any, ...]:
        return (
            [m.training for m in module.modules()],
            [
                (p.requires_grad, p.device, p.dtype, p.grad, p.data_ptr())
                for p in module.parameters()
            ],
            copy.deepcopy({k: v.tolist() for k, v in module.state_dict().items()}),
            [len(m._forward_hooks) for m in module.modules()],
            torch.is_grad_enabled(),
        )

    before = state()
    network = get_extractor(module, device="cpu")
    scores = evaluate(pictures(40), pictures(50, 1), network, metrics="frechet", progress=False)
    assert scores is not None
    get_extractor(module, device="meta")
    network.to("meta", torch.float16)
    assert state() == before
    assert seen
    loss = module(pictures(4)).sum()
    loss.backward()
    assert module.convolution.weight.grad is not None


class Trainer:
    """Whose method is a hook; it may not be copied."""

    seen = 0

    def hook(self, *_: Any) -> None:
        self.seen += 1

    def __deepcopy__(self, memo: Any) -> Trainer:
        raise AssertionError("a trainer was copied")


def test_modules_that_keep_answers_and_have_trainers():
    inner = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(192, 5))
    with pytest.warns(FutureWarning, match="weight_norm"):
        old = torch.nn.utils.weight_norm(torch.nn.Linear(192, 5))
    for linear in (inner, old):
        module, trainer = (
            torch.nn.Sequential(Odd(lambda x: x.flatten(1).float()), linear),
            Trainer(),
        )
        linear.register_forward_hook(trainer.hook)
        module(pictures(2)).sum().backward()
        module[0].kept = module(pictures(2))
        network = get_extractor(module, dim=5)
        assert torch.equal(network(pictures(2)), module(pictures(2)).detach())
        assert trainer.seen == 4


def test_an_extractor_of_the_callers_keeps_its_place():
    own = get_extractor("random-conv")
    moved = get_extractor(own, device="meta")
    assert moved.device.type == "meta"
    assert own.device.type == "cpu"
    assert get_extractor(own, device="cpu") is own


@pytest.mark.parametrize(
    ("extractor", "options", "message"),
    [
        ("random-conv", {"device": "gpu"}, "device 'gpu': expected a name"),
        (Features(), {"device": "gpu"}, "device 'gpu': expected a name"),
        ("random-conv", {"dim": 0}, "dim 0: expected an integer >= 1"),
        ("random-conv", {"dim": "8"}, "dim '8': expected an integer >= 1"),
        ("lite0", {"size": "64"}, "size '64': expected an integer >= 1"),
        (Features(), {"size": 64}, "extractor Features: .*unexpected keyword argument 'size'"),
        (Features(), {"dim": 0}, "dim 0: expected an integer >= 1"),
        (Features, {}, "extractor is a type: expected a name or a torch module"),
        (None, {}, "extractor is a NoneType"),
    ],
)
def test_what_is_no_extractor_is_one_line(extractor, options, message):
    with pytest.raises(InputError, match=message):
        get_extractor(extractor, **options)


def test_statistics_of_a_metric_are_checked():
    metric = FrechetDistance("random-conv")
    metric.set_real_statistics(np.zeros(64, np.float32), np.eye(64, dtype=np.float32))
    for mean, covariance, count in (
        *(("x", np.eye(64), 2), (np.zeros(64), -np.eye(64), 2), (np.zeros(9), np.eye(9), 2)),
        *((np.zeros(64), np.full((64, 64), np.nan), 2), (np.zeros(64), np.eye(64), 1)),
    ):
        with pytest.raises(InputError, match="expected"):
            metric.set_real_statistics(mean, covariance, count)


class Odd(torch.nn.Module):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, images: torch.Tensor) -> Any:
        return self.answer(images)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: (x,), "gave a tuple: expected"),
        (lambda x: x.float(), r"gave \[2, 3, 64, 64\]: expected \[B, D\]"),
        (lambda x: x.float().mean(), r"gave \[\]: expected"),
        (lambda x: x.conv(), "does not take uint8"),
        (lambda x: torch.nn.functional.conv2d(x, torch.ones(2, 3, 3, 3)), "does not take uint8"),
        (lambda x: x.view(2, -1)[:, : 64 * 99 * 99].reshape(2, 3, 99, 99), "does not take uint8"),
    ],
)
def test_modules_that_are_no_extractors_are_one_line(answer, message):
    with pytest.raises(InputError, match=message) as error:
        get_extractor(Odd(answer))
    assert "\n" not in str(error.value)
