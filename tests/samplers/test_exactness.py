"""Lossless samplers: plain sampling's tokens under Gumbel coupling, the model's law always."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from forms import LONG, SHORT, by_draws, by_fault, covered, slow
from mutants import clinging, generous

from arvision import get_sampler
from arvision.decoding import verify
from arvision.decoding.jacobi import INITS
from arvision.samplers.sjd import SJDSampler
from arvision.testing import (
    DroppingTableModel,
    TableModel,
    draw_joint,
    law_p_value,
    tiny_llamagen,
)

ALPHA = 1e-4
COUPLINGS = ["gumbel", "maximal", "independent"]


@pytest.fixture(scope="module")
def model():
    """A real network with 64 tokens, float64: rounding cannot flip an argmax."""
    return tiny_llamagen(grid=(8, 8)).to(torch.float64)


@pytest.fixture(scope="module")
def plain(model):
    """What `ar` draws for a seed, one image at a time."""
    ar = get_sampler("ar")

    @cache
    def draw(seed):
        return ar(model, [seed % 3], seeds=[seed], guidance_scale=2.0).tokens[0]

    return draw


@pytest.mark.parametrize("batches", [pytest.param([0], id="short"), slow([0, 7, 13], id="long")])
@pytest.mark.parametrize(("first", "window"), list(enumerate([2, 5, 16, 64])))
def test_gumbel_coupling_gives_the_tokens_of_plain_sampling(model, plain, first, window, batches):
    sjd = get_sampler("sjd", window=window)
    for seed in range(first, batches[-1] + 7, 4):  # all of them in batches below
        out = sjd(model, [seed % 3], seeds=[seed], guidance_scale=2.0)
        assert torch.equal(out.tokens[0], plain(seed))
        assert out.stats.forward_passes < 63
    for first in batches:
        seeds = list(range(first, first + 7))
        batch = sjd(model, [s % 3 for s in seeds], seeds=seeds, guidance_scale=2.0)
        assert torch.equal(batch.tokens, torch.stack([plain(seed) for seed in seeds]))
        assert len(set(batch.stats.passes_per_image)) > 1, "the batch was meant to be ragged"


@pytest.mark.parametrize(
    ("init", "shaping"),
    covered(sorted(INITS), [{"top_k": 5}, {"top_p": 0.8, "temperature": 1.3}]),
)
def test_inits_and_shaping_do_not_change_the_picture(model, init, shaping):
    conditions, seeds = [0, 1, 2], [(3, 0), (3, 1), (3, 2)]
    expected = get_sampler("ar", **shaping)(model, conditions, seeds=seeds, guidance_scale=1.5)
    sjd = get_sampler("sjd", window=7, init=init, **shaping)
    out = sjd(model, conditions, seeds=seeds, guidance_scale=1.5)
    assert torch.equal(out.tokens, expected.tokens)


def test_the_embedded_model_draws_the_same_pictures(fashion):
    transformer = fashion.transformer
    model = fashion.model
    try:
        transformer.to(torch.float64)
        seeds = [(11, k) for k in range(3)]
        classes = [0, 5, 8]
        out = [
            get_sampler(name)(model, classes, seeds=seeds, guidance_scale=3.0)
            for name in ("ar", "sjd")
        ]
    finally:
        transformer.to(torch.float32)
    assert torch.equal(out[0].tokens, out[1].tokens)
    assert out[1].stats.tokens_per_pass > 2.0


PAIRS = [(c, i) for c in COUPLINGS for i in sorted(INITS) if c == "gumbel" or i != "memory"]
LAWS = [
    # Every pair with one of the windows, and every init with both.
    *((*pair, 2 + 2 * (at % 2), SHORT) for at, pair in enumerate(PAIRS)),
    *(slow(*pair, window, LONG) for pair in PAIRS for window in (2, 4)),
]


@pytest.mark.parametrize(("coupling", "init", "window", "num"), LAWS)
def test_joint_law(coupling, init, window, num):
    sampler = get_sampler("sjd", coupling=coupling, window=window, init=init)
    for seed in range(2):
        # One table takes a model that can neither drop finished rows nor look past the end.
        model = (TableModel if seed == 0 else DroppingTableModel)(seed=seed, grid=(2, 2))
        samples = draw_joint(sampler, model, num, seed=seed)
        assert law_p_value(samples, model.joint(sampler.shaping())) > ALPHA


@by_draws
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_joint_law_with_shaping(coupling, num):
    sampler = get_sampler("sjd", coupling=coupling, window=3, temperature=1.4, top_k=3, top_p=0.9)
    model = DroppingTableModel(seed=5)
    samples = draw_joint(sampler, model, num, seed=5)
    assert law_p_value(samples, model.joint(sampler.shaping())) > ALPHA


@by_draws
def test_joint_law_of_plain_sampling(num):
    sampler, model = get_sampler("ar"), TableModel(seed=2)
    samples = draw_joint(sampler, model, num, seed=2)
    assert law_p_value(samples, model.joint(sampler.shaping())) > ALPHA


@by_fault
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_a_mutant_is_found(coupling, num, off):
    model = DroppingTableModel(seed=0)
    sampler = get_sampler("sjd", coupling=coupling, window=4, init="random")
    rule = verify.COUPLINGS[coupling]
    mutant = clinging(off) if coupling == "gumbel" else generous(rule, off)
    sampler.__class__ = type("Mutant", (SJDSampler,), {"rule": lambda self, model: mutant})
    samples = draw_joint(sampler, model, num, seed=0)
    assert law_p_value(samples, model.joint(sampler.shaping())) < ALPHA
