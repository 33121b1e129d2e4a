"""Samplers on the chain of a flow head: the law they draw, against the one computed by hand.

The velocity of a Gaussian target is linear, so every step of the chain is, and its law is Gaussian.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gaussian_latents import CRITICAL, NUM, GaussianModel, distance
from torch import nn

from arvision import get_sampler
from arvision.decoding.latents import verify as latent_verify
from arvision.models.latent_head import HeadNetwork
from arvision.models.nextstep.law import FlowSteps, NextStepHead

MEAN, DEVIATION, PULL = 0.3, 1.2, 0.5


class GaussianNet(HeadNetwork):
    """The exact velocity towards N(mean, deviation^2), z = (mean, deviation), in float64."""

    def __init__(self):
        super().__init__(1, 2, 1, 0, 1)
        self.time_embed = _InFirst()
        self.cond_embed = _InOthers(2, 1)

    def modulate(self, conditions):
        return [(conditions,)]

    def run(self, x, modulations):
        time, mean, deviation = modulations[-1][0].split(1, dim=-1)
        spread = time**2 * deviation**2 + (1 - time) ** 2
        return mean + (time * deviation**2 - (1 - time)) / spread * (x - time * mean)


class _InFirst(nn.Module):
    def forward(self, times):
        return nn.functional.pad(times[:, None], (0, 2))


class _InOthers(nn.Linear):
    def forward(self, z):
        return nn.functional.pad(z, (1, 0))


def flow_model(release, num_steps=8, mean=MEAN, num_tokens=3):
    model: Any = GaussianModel(mean, DEVIATION, num_tokens=num_tokens, pull=PULL)
    steps = FlowSteps(num_steps=num_steps, release=release)
    model.head = NextStepHead(GaussianNet(), steps)
    model.is_causal = True
    return model


def law_by_hand(release, last_noise, num_steps=8):
    """Factor on the mean, and deviation, of what the chain draws."""
    num = num_steps
    factor, variance = 0.0, 1.0
    for row in range(num):
        time = row * 0.96 / (num - 1) if release == "1" else row / num
        is_last = row == num - 1
        length = (0.04 if is_last else 0.96 / (num - 1)) if release == "1" else 1 / num
        spread = time**2 * DEVIATION**2 + (1 - time) ** 2
        slope = (time * DEVIATION**2 - (1 - time)) / spread
        # x + v dt, or x + ((1 + t) v - x) dt, with v = slope x + (1 - slope t) mean.
        plain = release == "1" and is_last
        keep, push = (1.0, length) if plain else (1 - length, (1 + time) * length)
        factor = (keep + push * slope) * factor + push * (1 - slope * time)
        variance = (keep + push * slope) ** 2 * variance
        if not plain or last_noise:
            variance += 2 * (1 - time) * length
    return factor, math.sqrt(variance)


def draw(model, name, num=NUM, **options):
    sampler = get_sampler(name, **options)
    return sampler(model, [None] * num, seeds=[(0, image) for image in range(num)])


def worst(samples, release, last_noise):
    """Largest Kolmogorov-Smirnov distance of a place, and largest correlation of two places."""
    factor, deviation = law_by_hand(release, last_noise)
    samples = samples.double()[..., 0]
    parts = samples - factor * PULL * (samples.cumsum(1) - samples)
    correlations = torch.corrcoef(parts.T) - torch.eye(parts.shape[1])
    apart = max(distance(part, factor * MEAN, deviation) for part in parts.T)
    return apart, float(correlations.abs().max())


def assert_law(samples, release, last_noise):
    apart, correlation = worst(samples, release, last_noise)
    assert apart < 1.95 / math.sqrt(NUM)  # 0.1 %: three places
    assert correlation < 3.9 / math.sqrt(NUM)


@pytest.mark.parametrize(
    ("release", "last_noise"), [("1", False), ("1", True), ("1.1", False), ("1.1", True)]
)
def test_plain_sampling(release, last_noise):
    out = draw(flow_model(release), "ar", last_noise=last_noise)
    assert_law(out.tokens, release, last_noise or release == "1.1")


@pytest.mark.parametrize("release", ["1", "1.1"])
@pytest.mark.parametrize("window", [1, 3])
def test_csjd(release, window):
    """Release 1.1: the law of `ar`. Release 1: that of `ar` with noise in the last step."""
    out = draw(flow_model(release), "csjd", window=window)
    assert out.stats.lossless
    assert out.stats.nonfinite == 0
    assert_law(out.tokens, release, True)
    assert {1, 2, 3} >= set(out.stats.passes_per_image) > {3}
    assert 0.3 < out.stats.acceptance_rate < 1


@pytest.mark.parametrize("drafting", ["sequential", "parallel"])
@pytest.mark.parametrize("release", ["1", "1.1"])
def test_cspd(release, drafting):
    draft = flow_model(release, mean=MEAN + 0.4)
    how = {"criterion": "trajectory", "context": "batched", "max_draft": 3, "prefill": 0.0}
    out = draw(flow_model(release), "cspd", draft=draft, drafting=drafting, **how)
    assert_law(out.tokens, release, True)
    assert 0.3 < out.stats.acceptance_rate < 1


@pytest.mark.parametrize("factor", [1.05, 0.95])
def test_a_ratio_wrong_by_5_percent_is_found(monkeypatch, factor):
    """The tests above fail on a rule that takes guesses too often or too seldom."""
    right = latent_verify.path_log_ratio
    monkeypatch.setattr(
        latent_verify,
        "path_log_ratio",
        lambda above, below: right(above, below) * factor + 4 * math.log(factor),
    )
    out = draw(flow_model("1.1"), "csjd", window=2)
    assert worst(out.tokens, "1.1", True)[0] > CRITICAL


def test_the_deterministic_end_of_the_first_release_is_not_the_law_with_noise():
    """What csjd draws for release 1 is not `ar`'s own law, and the figures can tell them apart."""
    plain, noisy = law_by_hand("1", False)[1], law_by_hand("1", True)[1]
    assert noisy**2 - plain**2 == pytest.approx(2 * 0.04 * 0.04)
    out = draw(flow_model("1"), "ar")
    assert out.tokens[:, 0].double().var() == pytest.approx(plain**2, rel=4 * math.sqrt(2 / NUM))


def test_without_tolerance_either_release_gives_its_own_picture():
    for release in ("1", "1.1"):
        model = flow_model(release)
        plain = draw(model, "ar", num=200)
        out = draw(model, "csjd", num=200, criterion="tolerance", tolerance=1e-9, window=3)
        torch.testing.assert_close(out.tokens, plain.tokens)


def test_shorter_chains_late_in_the_image():
    """The first place has the law of all steps, the last that of the final number."""
    out = draw(flow_model("1.1"), "ar", final_head_steps=3)
    samples = out.tokens.double()[..., 0]
    factor, deviation = law_by_hand("1.1", True)
    assert distance(samples[:, 0], factor * MEAN, deviation) < CRITICAL
    factor, deviation = law_by_hand("1.1", True, num_steps=3)
    innovation = samples[:, 2] - factor * PULL * (samples[:, 0] + samples[:, 1])
    assert distance(innovation, factor * MEAN, deviation) < CRITICAL
    assert out.stats.head_steps == 8 + round(5.5) + 3
