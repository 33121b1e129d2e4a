"""`arvision bench`: counts and bytes are right, files come back, changes are told from noise."""

from __future__ import annotations

import json

import pytest

from arvision import InputError, bench


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from arvision import ARPipeline
    from arvision.testing import tiny_llamagen

    path = tmp_path_factory.mktemp("model") / "tiny"
    ARPipeline.from_model(tiny_llamagen(), guidance_scale=3.0).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def measured(folder):
    return bench.run([folder], ["ar", "sjd:window=4"], batches=[1, 2], device="cpu", rounds=2)


def test_counts_and_bytes(measured):
    plain, plain_two, guessed, _ = measured.rows
    assert (plain.sampler, plain.batch, plain_two.batch) == ("ar", 1, 2)
    assert plain.passes == 15  # 16 tokens, one of which the prefill gives
    assert guessed.passes < plain.passes
    assert all(len(row.seconds) == 2 and 1 <= row.reads < 3 for row in measured.rows)
    from arvision.testing import tiny_llamagen

    network = tiny_llamagen().transformer
    weights = sum(p.numel() for name, p in network.named_parameters() if "embedd" not in name)
    config = network.config
    # Keys and values of 8 tokens and the class, of two rows: guidance.
    cache = 2 * 2 * config["num_layers"] * 9 * config["hidden_size"]
    assert plain.bytes == 4 * (weights + cache)
    assert plain_two.bytes == 4 * (weights + 2 * cache)
    assert 0 < (plain.share(measured.machine["bandwidth"]) or 0) < 1


def test_a_file_comes_back_and_is_compared(measured, tmp_path):
    written = measured.write(tmp_path)
    assert all(path.stat().st_size > 100 for path in written)
    again = bench.read(tmp_path / "bench.json")
    assert again.rows == measured.rows
    assert measured.markdown(again).count("| the same |") == 4
    again.rows[0].seconds = [10 * each for each in again.rows[0].seconds]
    again.rows[0].passes = 16
    again.rows[1].seconds = [1.01 * each for each in again.rows[1].seconds]
    table = measured.markdown(again)
    assert "| passes 16 to 15, 10.00x as fast |" in table
    assert table.count("| the same |") == 3


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 2, "machine": {}, "rows": []}', '{"format": 1}']
)
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match=r"x\.json: "):
        bench.read(tmp_path / "x.json")


def test_the_command(cli, folder, tmp_path):
    options = ("--models", folder, "--samplers", "ar", "--rounds", "1", "--quiet", "--json")
    done = cli("bench", *options, "--device", "cpu", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"][0]["passes"] == 15
    for more, word in (
        (("--batch", "two"), "--batch 'two'"),
        (("--batch", "0"), "batch 0"),
        (("--compare", tmp_path / "none.json"), "none.json"),
        (("--samplers", "csjd"), "csjd"),
    ):
        bad = cli("bench", *options, "--out", tmp_path / "out", *more)
        assert (bad.returncode, bad.stderr.count("\n")) == (2, 1)
        assert word in bad.stderr


OFFICIAL = """
import torch
from torch import nn
from arvision.testing import tiny_llamagen

class ModelArgs:
    def __init__(self, **given):
        self.given = given
        assert given["dim"] == 32 and given["block_size"] == 16, given

def Transformer(args):
    return tiny_llamagen(seed=5).transformer
"""
GENERATE = """
calls = []
def generate(network, ids, num, cfg_scale, temperature, top_k, top_p):
    first = next(network.parameters())
    calls.append((ids.tolist(), num, cfg_scale, float(first.sum())))
"""


def test_against_code_on_the_path(folder, tmp_path, monkeypatch):
    """A stand-in package where the authors' would be: it gets our weights and settings."""
    import sys

    package = tmp_path / "autoregressive" / "models"
    package.mkdir(parents=True)
    (package / "gpt.py").write_text(OFFICIAL)
    (package / "generate.py").write_text(GENERATE)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        found = bench.run([folder], ["ar"], batches=[2], device="cpu", rounds=1, against="official")
        calls = sys.modules["autoregressive.models.generate"].calls
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "autoregressive"]:
            del sys.modules[name]
    ours, theirs = found.rows
    assert (theirs.sampler, theirs.passes, theirs.bytes) == ("official ar", ours.passes, ours.bytes)
    from arvision import load

    weights = float(next(load(folder).transformer.parameters()).sum())
    assert calls[0] == ([0, 1], 16, 3.0, weights)
    assert len(calls) == 3
    assert "`official ar`" in found.markdown()
    assert bench.window_of("official ar") == 1


def test_against_code_that_is_not_there(folder):
    with pytest.raises(
        InputError, match=r"no autoregressive\.models\.gpt\.ModelArgs on the Python"
    ):
        bench.run([folder], ["ar"], device="cpu", against="official")
    with pytest.raises(InputError, match="unknown against 'theirs': expected one of official"):
        bench.run([folder], ["ar"], device="cpu", against="theirs")
