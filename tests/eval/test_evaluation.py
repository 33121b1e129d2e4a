"""`arvision.evaluate` does what the commands do, and refuses before it draws."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import arvision
from arvision import InputError
from arvision.cli.eval import app
from arvision.eval.shards import ShardFolder

DRAW = {"protocol": "fashion", "num": 24, "sampler": "sjd"}


@pytest.fixture(scope="module")
def found(tmp_path_factory, fashion) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("evaluated")
    report = arvision.evaluate(
        fashion, out=out, extractor="fashion-classifier", seed=3, window=8, progress=False, **DRAW
    )
    return out, report


def run(*arguments: object) -> dict:
    done = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    return json.loads(done.stdout)


def test_it_does_what_the_commands_do(found, tmp_path: Path):
    out, report = found
    options = [f"--{name}={value}" for name, value in DRAW.items()]
    samples = tmp_path / "samples"
    shown = ("--json", "--quiet")
    model = ("--model", "llamagen-fashion", "--seed", 3, "--option", "window=8")
    run("generate", *model, *options, "--out", samples, *shown)
    mine, theirs = ShardFolder(out / "samples"), ShardFolder(samples)
    assert mine.config == theirs.config
    assert np.array_equal(mine.read(0, 24), theirs.read(0, 24))
    reference = ("--reference", "fashion-test", "--extractor", "fashion-classifier")
    told = run("report", "--samples", samples, *reference, "--out", tmp_path / "report", *shown)
    report = json.loads(json.dumps(report))  # numbers of classes become text
    assert report["scores"] == told["scores"]
    assert set(report["scores"]) >= {"class_consistency", "precision", "recall"}
    for name in ("run", "config_hash", "reference", "extractor", "protocol", "num"):
        assert report[name] == told[name], name
    assert json.loads((out / "report.json").read_text()) == report
    assert "Protocol **fashion/v1**" in (out / "report.md").read_text()


def test_again_it_draws_nothing(found, fashion, monkeypatch):
    out, report = found

    def draw(*_, **__):
        raise AssertionError("the images were there")

    monkeypatch.setattr(type(fashion), "__call__", draw)
    again = arvision.evaluate(
        fashion, out=out, extractor="fashion-classifier", seed=3, window=8, progress=False, **DRAW
    )
    assert again["scores"] == report["scores"]
    with pytest.raises(InputError, match="seed=3, asked for seed=4"):
        arvision.evaluate(
            fashion,
            out=out,
            extractor="fashion-classifier",
            seed=4,
            window=8,
            progress=False,
            **DRAW,
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "fasion"}, "did you mean 'fashion'"),
        ({"protocol": "adm-in256"}, "no reference of its own: give reference="),
        ({"reference": "nowhere.npz"}, "reference nowhere.npz does not exist"),
        ({"extractor": "fashion-clasifier"}, "did you mean 'fashion-classifier'"),
        ({"sampler": "sdj"}, "did you mean 'sjd'"),
        ({"sampler": "csjd"}, "drives continuous models"),
        ({"windw": 8}, "did you mean 'window'"),
        ({"window": 0}, "window 0"),
        ({"num": 1}, "expected at least 2 images"),
        ({"pixels": "plane"}, "did you mean 'plain'"),
        ({"dtype": "bfloat16"}, "loaded already"),
        ({"prompts": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_bad_input_leaves_nothing_behind(fashion, tmp_path: Path, changes, message):
    out = tmp_path / "out"
    given = {"extractor": "fashion-classifier", **DRAW, **changes}
    with pytest.raises(InputError, match=message):
        arvision.evaluate(fashion, out=out, progress=False, **given)
    assert not out.exists()


def test_any_pipeline_and_any_module(tiny_pipeline, tmp_path: Path):
    class Means(torch.nn.Module):
        def forward(self, images):
            return images.float().flatten(2).mean(2)

    tiny_pipeline.transformer.eval()
    side = torch.as_tensor(
        arvision.sample(tiny_pipeline, 0, progress=False, output_type="pt").images
    ).shape[-1]
    reference = tmp_path / "reference.npz"
    pictures = np.random.default_rng(0).integers(0, 256, (40, side, side, 3), dtype=np.uint8)
    np.savez(reference, arr_0=pictures)
    report = arvision.evaluate(
        tiny_pipeline,
        out=tmp_path / "out",
        protocol="free",
        num=12,
        num_classes=2,
        reference=reference,
        extractor=Means(),
        metrics=["frechet"],
        progress=False,
    )
    assert report["run"]["model"] == type(tiny_pipeline.transformer).__name__
    (score,) = report["scores"].values()
    assert score["value"] > 0
