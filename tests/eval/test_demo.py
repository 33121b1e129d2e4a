"""The demo's parts on small runs, and (slow) the whole command."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from arvision.cli.eval_demo import plan
from arvision.eval import Score, generate, get_extractor
from arvision.eval.demo import Judge, Row, compare, plot, to_table, write_demo
from arvision.eval.extract import extract
from arvision.eval.sources import ShardSource, TensorSource
from arvision.training.data import load_fashion

SCRIPT = Path(__file__).with_name("maker.py")
spec = importlib.util.spec_from_file_location("demo_maker", SCRIPT)
assert spec is not None
assert spec.loader is not None
maker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(maker)


def garments(start: int, stop: int) -> TensorSource:
    images, labels = load_fashion("test")
    return TensorSource(images[start:stop, None], labels[start:stop].tolist(), "test images")


@pytest.fixture(scope="module")
def judge() -> Judge:
    networks = [get_extractor("random-conv"), get_extractor("fashion-classifier")]
    return Judge(garments(0, 200), networks, progress=False)


def test_plan_names_every_sampler_once():
    entries = plan(["ar", "gsd", "sjd", "zipar"])
    assert [e.name for e in entries] == [
        *("ar", "sjd gumbel", "sjd maximal", "sjd independent", "gsd window 8", "zipar")
    ]
    assert len({e.folder for e in entries}) == len(entries)
    # Only the coupling that promises ar's own pictures shares its seed: other tests need
    # independent draws.
    assert [e.name for e in entries if e.seed == 0] == ["ar", "sjd gumbel"]


def test_real_images_score_well_and_noise_does_not(judge: Judge):
    scores, features = judge.score(garments(200, 400))
    assert set(scores) == {
        *("frechet_random-conv", "frechet_fashion-classifier"),
        *("precision", "recall", "class_consistency"),
    }
    assert features.features is not None
    assert scores["class_consistency"].value > 0.88
    noise = torch.randint(0, 256, (200, 3, 32, 32), dtype=torch.uint8)
    poor, _ = judge.score(TensorSource(noise, [i % 10 for i in range(200)], "noise"))
    for name in ("frechet_random-conv", "frechet_fashion-classifier"):
        assert poor[name].value > 5 * scores[name].value
    assert poor["class_consistency"].value < 0.3
    assert poor["precision"].value < scores["precision"].value


def test_compare_takes_the_tests_that_the_seeds_allow(tmp_path: Path):
    network = get_extractor("random-conv")
    sides = []
    for name, seed in (("a", 0), ("same", 0), ("other", 1)):
        generate(maker.make, maker.config(300, seed=seed), tmp_path / name, progress=False)
        source = ShardSource(tmp_path / name)
        found = extract(source, network, progress=False)
        assert found is not None
        sides.append((source.shards, found))
    tests, sentence = compare(sides[0], sides[1])
    assert [t.name for t in tests] == ["same tokens"]
    assert sentence.startswith("same picture")
    draw = np.random.default_rng(0)
    tests, sentence = compare(sides[0], sides[2], lambda shards: draw.normal(size=shards.num))
    assert [t.name for t in tests] == [
        *("token law per position", "log-likelihood", "permutation MMD"),
    ]
    assert sentence.startswith("no difference")


def rows() -> list[Row]:
    def scores(value: float) -> dict[str, Score]:
        distance = Score(value, 10, (value - 0.98, value + 0.98), 0.5, "jackknife-20")
        return {"frechet_x": distance, "precision": Score(0.5, 10)}

    return [
        Row("10 training images", "", 10, scores(20.0)),
        Row("ar", "exact", 10, scores(30.0), passes=63.0, seconds=0.2),
        Row("sjd", "exact", 10, scores(30.5), [], "no difference found", 23.0, 0.1),
    ]


def test_table_has_a_line_per_row():
    lines = to_table(rows(), ["frechet_x"]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[4].startswith("| sjd | exact | 23.0 | 0.100 | 2.00x | 30.500 ± 0.980 | 0.50 |")
    assert lines[2].startswith("| 10 training images |  |  |  |  | 20.000 ± 0.980 |")


def test_plot_and_report_are_written(judge: Judge, tmp_path: Path):
    with Image.open(plot(rows(), "frechet_x", tmp_path / "p.png")) as picture:
        pixels = np.array(picture.convert("RGB")).reshape(-1, 3)
    # matplotlib's blue, of exact samplers, is on the picture.
    assert (np.abs(pixels - np.array([31, 119, 180])).max(1) < 8).sum() > 50
    report = write_demo(rows(), judge, tmp_path, {"model": "m", "num": 10})
    assert json.loads((tmp_path / "report.json").read_text()) == report
    text = (tmp_path / "report.md").read_text()
    assert "not FID" in text
    assert "quality-speed.png" in text
    assert (tmp_path / "quality-speed.png").exists()


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path):
    from typer.testing import CliRunner

    from arvision.cli.eval import app

    arguments = ["demo", "--out", str(tmp_path), "--num", "20", "--size", "32", "--timed", "1"]
    arguments += ["--samplers", "sjd,zipar", "--num-real", "300"]
    done = CliRunner().invoke(app, [*arguments, "--workers", "1", "--quiet", "--json"])
    assert done.exception is None, done.exception
    report = json.loads(done.stdout)
    names = [row["name"] for row in report["rows"]]
    assert names[:5] == [
        *("20 training images", "ar", "sjd gumbel", "sjd maximal", "sjd independent"),
    ]
    by_name = {row["name"]: row for row in report["rows"]}
    assert by_name["sjd gumbel"]["passes"] < by_name["ar"]["passes"]
    assert by_name["sjd gumbel"]["tests"][0]["details"]["equal_tokens"] > 0.8
    assert (tmp_path / "report.md").exists()
