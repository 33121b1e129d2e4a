"""Speculative Jacobi decoding of latents: the law it draws from, and `ar`'s own picture."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian_latents import CRITICAL, NUM, GaussianModel, distance

import arvision
from arvision import InputError, get_sampler
from arvision.decoding.latents import verify as latent_verify

TARGET = GaussianModel(0.3, 1.2, num_tokens=3, pull=0.5)


def draw(model, name="csjd", num=NUM, **options):
    sampler = get_sampler(name, order="raster", **options)
    return sampler(model, [None] * num, seeds=[(0, image) for image in range(num)])


def innovations(samples, pull):
    """Each latent less its mean given the ones before: independent N(.3, 1.2^2)."""
    return samples - pull * (samples.cumsum(1) - samples)


def worst(samples):
    """Largest Kolmogorov-Smirnov distance of a place, and largest correlation of two places."""
    parts = innovations(samples.double()[..., 0], TARGET.pull)
    correlations = torch.corrcoef(parts.T) - torch.eye(parts.shape[1])
    return max(distance(part) for part in parts.T), float(correlations.abs().max())


@pytest.mark.parametrize("window", [1, 2, 3])
def test_joint_law(window):
    out = draw(TARGET, window=window)
    apart, correlation = worst(out.tokens)
    assert out.stats.lossless
    assert out.stats.exhausted < NUM / 1000  # residuals of laws that are nearly the same
    assert out.stats.nonfinite == 0
    assert apart < 1.95 / math.sqrt(NUM)  # 0.1 %: three places
    assert correlation < 3.9 / math.sqrt(NUM)
    assert {1, 2, 3} >= set(out.stats.passes_per_image) > {3}
    assert 0.3 < out.stats.acceptance_rate < 1


@pytest.mark.parametrize("factor", [1.05, 0.95])
def test_a_ratio_wrong_by_5_percent_is_found(monkeypatch, factor):
    """The test above fails on a rule that takes guesses too often or too seldom."""
    right = latent_verify.path_log_ratio
    monkeypatch.setattr(
        latent_verify,
        "path_log_ratio",
        lambda above, below: right(above, below) * factor + 4 * math.log(factor),
    )
    assert worst(draw(TARGET, window=2).tokens)[0] > CRITICAL


def test_without_tolerance_it_is_plain_sampling():
    plain = draw(TARGET, "ar", num=200)
    out = draw(TARGET, num=200, criterion="tolerance", tolerance=1e-9, window=3)
    torch.testing.assert_close(out.tokens, plain.tokens)
    assert not out.stats.lossless
    free = GaussianModel(0.3, 1.2, num_tokens=8)
    out = draw(free, num=5, criterion="tolerance", tolerance=1e-9, window=4)
    torch.testing.assert_close(out.tokens, draw(free, "ar", num=5).tokens)
    # Nothing depends on anything: one pass for the first guesses, then a window per pass.
    assert out.stats.forward_passes == 3
    assert out.stats.acceptance_rate == 1


def test_tolerance_trades_passes_for_distance():
    pipe = arvision.load("mar-fashion", device="cpu")
    options = {"seed": [(0, 0)], "progress": False, "output_type": "pt", "num_iter": 8}
    plain = arvision.sample(pipe, 8, "ar", **options)
    passes, apart = [], []
    for tolerance in (1e-4, 0.2, 1e3):
        out = arvision.sample(
            pipe, 8, "csjd", criterion="tolerance", tolerance=tolerance, **options
        )
        passes.append(out.stats.forward_passes)
        apart.append(float((out.tokens - plain.tokens).abs().max()))
    assert passes == sorted(passes, reverse=True)
    assert passes[0] <= 8
    assert passes[2] == 3  # 1, then windows of four
    assert apart[0] < 1e-2 < apart[2]


def test_batches_do_not_change_an_image():
    pipe = arvision.load("mar-fashion", device="cpu")
    options = {"progress": False, "output_type": "pt", "num_iter": 5, "window": 3}
    both = arvision.sample(pipe, [1, 8], "csjd", seed=[(0, 0), (0, 1)], **options)
    one = arvision.sample(pipe, [8], "csjd", seed=[(0, 1)], **options)
    torch.testing.assert_close(both.tokens[1:], one.tokens, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "never"}, "criterion 'never'"),
        ({"window": 0}, "window 0: expected an integer >= 1"),
        ({"tolerance": -1.0}, "tolerance -1.0: expected a number >= 0"),
        ({"temperature": 0.0}, "temperature 0: a chain without noise has no density"),
        ({"window": 4}, "window 4: expected 1 to 3, the latents"),
        ({"num_iter": 4}, "num_iter 4: expected 1 to 3"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(InputError, match=message):
        draw(TARGET, num=1, **options | ({} if "window" in options else {"window": 2}))
