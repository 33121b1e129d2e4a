"""Lossless samplers against plain sampling on the embedded model, by statistics alone.

Independent seeds on both sides; the tests are those of `arvision.eval.equivalence`.
"""

from __future__ import annotations

import pytest
import torch

from arvision import get_sampler
from arvision.decoding.teacher_forcing import teacher_forced
from arvision.eval.equivalence import log_likelihoods, token_law

NUM = 2000
ALPHA = 1e-4


def draw(model, sampler, seed):
    tokens, likelihoods = [], []
    for first in range(0, NUM, 100):
        classes = [(first + k) % 10 for k in range(100)]
        seeds = [(seed, first + k) for k in range(100)]
        drawn = sampler(model, classes, seeds=seeds, guidance_scale=3.0).tokens
        laws = teacher_forced(model, classes, drawn, 3.0).log_softmax(-1)
        likelihoods.append(laws.gather(-1, drawn[..., None])[..., 0].sum(1))
        tokens.append(drawn)
    return torch.cat(tokens), torch.cat(likelihoods)


@pytest.fixture(scope="module")
def plain(fashion):
    return draw(fashion.model, get_sampler("ar"), seed=101)


@pytest.mark.slow
@pytest.mark.parametrize("coupling", ["gumbel", "maximal", "independent"])
def test_lossless(fashion, plain, coupling):
    tokens, likelihoods = draw(fashion.model, get_sampler("sjd", coupling=coupling), seed=202)
    assert token_law(tokens, plain[0], ALPHA).passed
    assert log_likelihoods(likelihoods, plain[1], ALPHA).passed


@pytest.mark.slow
def test_a_lossy_sampler_is_found(fashion, plain):
    _, likelihoods = draw(fashion.model, get_sampler("lantern", tv=0.3), seed=303)
    assert not log_likelihoods(likelihoods, plain[1], ALPHA).passed
