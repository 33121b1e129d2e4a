"""`sample` without a sampler: the faster of `ar` and `sjd` for that many images, the same tokens."""

from __future__ import annotations

import pytest
import torch

import arvision
from arvision import api
from arvision.samplers import SJDSampler
from arvision.testing import tiny_llamagen


@pytest.fixture(scope="module")
def pipe():
    return arvision.ARPipeline.from_model(tiny_llamagen())


@pytest.mark.parametrize(
    ("num", "told"),
    [
        (1, "sjd:window=16"),
        (2, "sjd:window=8"),
        (4, "sjd:window=4"),
        (5, "ar"),
        (16, "ar"),
        (64, "ar"),
    ],
)
def test_the_batch_decides_and_the_tokens_do_not_change(pipe, num, told):
    wanted = arvision.sample(pipe, 1, "ar", num_images=num, seed=3, progress=False)
    out = arvision.sample(pipe, 1, num_images=num, seed=3, progress=False)
    assert out.stats.sampler == told
    assert out.stats.lossless
    assert torch.equal(out.tokens, wanted.tokens)
    assert wanted.stats.sampler == "ar"
    if num > 1:
        listed = arvision.sample(pipe, [1] * num, seed=3, progress=False, output_type="latent")
        assert listed.stats.sampler == told


def test_an_accelerator_takes_more(pipe, monkeypatch):
    monkeypatch.setattr(type(pipe.model), "device", torch.device("cuda"))
    chosen = [api._own_sampler(pipe, num) for num in (1, 16, 64, 1000)]
    assert [one.config.get("window") for one in chosen] == [16, 16, 4, None]


def test_who_names_a_sampler_gets_it(pipe):
    out = arvision.sample(pipe, 1, "sjd:window=5", num_images=16, seed=3, progress=False)
    assert out.stats.sampler == "sjd:window=5"
    pipe.sampler = SJDSampler(window=7)
    try:
        out = arvision.sample(pipe, 1, num_images=16, seed=3, progress=False)
    finally:
        pipe.sampler = arvision.get_sampler("ar")
    assert out.stats.sampler == "sjd:window=7"
