"""`arvision compare`: the same seeds under several samplers."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

import arvision
from arvision import InputError, get_sampler
from arvision.comparison import compare
from arvision.testing import tiny_llamagen


def test_table_sheet_and_plot(tmp_path, tiny_pipeline):
    specs = ["ar", "sjd:coupling=gumbel:window=4", "sjd:coupling=maximal:window=8"]
    result = compare(tiny_pipeline, ["cat", "dog"], specs, num_images=2, seed=3, batch_size=2)
    written = {path.name for path in result.write(tmp_path)}
    assert written == {"table.txt", "table.md", "table.json", "sheet.png", "acceptance.png"}
    assert {path.name for path in tmp_path.iterdir()} == written
    record = json.loads((tmp_path / "table.json").read_text())
    rows = {row["sampler"]: row for row in record["samplers"]}
    assert rows["ar"]["speed_up"] == 1.0
    assert rows["ar"]["same_as_ar"] == rows[specs[1]]["same_as_ar"] == 4
    assert rows[specs[2]]["same_as_ar"] < 4
    assert rows["ar"]["passes"] == 15
    assert all(row["lossless"] for row in rows.values())
    passes = torch.tensor(record["commit_pass"][specs[1]])
    assert passes.shape == (4, 16)
    assert "| sjd:coupling=gumbel:window=4 |" in (tmp_path / "table.md").read_text()
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > 3 * 96
    with Image.open(tmp_path / "acceptance.png") as plot:
        assert plot.width > 300


def test_a_seed_does_not_depend_on_the_batch_size(tiny_pipeline):
    one, four = (
        compare(tiny_pipeline, 1, ["sjd"], num_images=4, seed=2, batch_size=size).rows[0].tokens
        for size in (1, 4)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, four, strict=True))


def test_without_a_baseline_nothing_is_compared(tiny_pipeline):
    record = compare(tiny_pipeline, 1, ["sjd"], num_images=1).records()[0]
    assert record["speed_up"] is None
    assert record["same_as_ar"] is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sdj", "did you mean 'sjd'"),
        ("sjd:window", "expected option=value"),
        ("sjd:windw=3", "did you mean 'window'"),
        ("sjd:window=0", "window 0"),
        ("sjd:coupling=none", "coupling"),
    ],
)
def test_bad_specifications(spec, message):
    with pytest.raises(InputError, match=message):
        get_sampler(spec)


def test_one_grammar_for_samplers_with_options(tiny_pipeline):
    sampler = get_sampler("sjd:window=3:top_p=0.5:coupling=maximal", top_k=4)
    told = {name: sampler.config[name] for name in ("window", "top_p", "coupling", "top_k")}
    assert told == {"window": 3, "top_p": 0.5, "coupling": "maximal", "top_k": 4}
    assert get_sampler("draft:draft=runs/My-Draft:draft_guidance_scale=None").config["draft"] == (
        "runs/My-Draft"
    )
    draw = {"seed": 5, "output_type": "latent", "progress": False}
    spec = arvision.sample(tiny_pipeline, 1, "sjd:window=3:top_k=4:coupling=maximal", **draw)
    options = {"window": 3, "coupling": "maximal", "top_k": 4}
    assert torch.equal(
        spec.tokens, arvision.sample(tiny_pipeline, 1, "sjd", **options, **draw).tokens
    )
    assert spec.stats.windows[0] == 3
    for call in (
        lambda: get_sampler("sjd:window=3", window=4),
        lambda: get_sampler("sjd:window=3:window=4"),
        lambda: arvision.sample(tiny_pipeline, 1, "sjd:window=3", window=4, **draw),
        lambda: arvision.sample(tiny_pipeline, 1, "sjd:top_k=3", top_k=4, **draw),
    ):
        with pytest.raises(InputError, match="is given twice"):
            call()


def test_a_student_stands_beside_its_teacher(fashion):
    specs = ["ar:noise=flow", "dd@llamagen-fashion-dd", "dd:steps=2@llamagen-fashion-dd"]
    result = compare(fashion, ["sneaker"], specs, num_images=1)
    records = result.records()
    assert [record["passes"] for record in records] == [63, 1, 2]
    assert [record["lossless"] for record in records] == [True, False, False]
    with pytest.raises(InputError, match="'dd' drives student models"):
        compare(fashion, ["sneaker"], ["dd"])


def test_continuous_models_are_compared(tmp_path):
    pipe = arvision.load("mar-fashion", device="cpu")
    result = compare(pipe, ["bag"], ["ar:num_iter=4", "cspd:num_iter=4"], num_images=1, top_k=0)
    assert [record["lossless"] for record in result.records()] == [True, False]
    result.write(tmp_path)
    assert (tmp_path / "sheet.png").exists()


def test_what_a_text_says_goes_before_what_the_model_recommends():
    pipe = arvision.ARPipeline.from_model(tiny_llamagen(), temperature=0.0)
    specs = ["ar", "ar:temperature=1.0"]
    compared = arvision.compare(pipe, [0, 1], specs, num_images=2, seed=3, batch_size=4)
    drawn = [torch.stack(row.tokens) for row in compared.rows]
    assert not torch.equal(*drawn)
    for spec, tokens in zip(specs, drawn, strict=True):
        identities = [(3, k) for k in range(4)]
        alone = arvision.sample(
            pipe, [0, 1], spec, num_images=2, seed=identities, output_type="latent", progress=False
        )
        assert torch.equal(tokens, alone.tokens)
    with pytest.raises(InputError, match="'temperature' is given twice"):
        arvision.compare(pipe, 0, specs, temperature=0.5)
