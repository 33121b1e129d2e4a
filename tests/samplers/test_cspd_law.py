"""Laws that `cspd` draws from, on continuous models whose laws are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gaussian_latents import CRITICAL, NUM, GaussianLaw, GaussianModel, distance

from arvision import get_sampler
from arvision.decoding.latents import verify as latent_verify


def run(target, draft, num=NUM, seed=0, **options):
    options = {"prefill": 0.0, "order": "raster", "max_draft": 1} | options
    sampler = get_sampler("cspd", draft=draft, **options)
    seeds = [(seed, image) for image in range(num)]
    return sampler(target, [None] * num, seeds=seeds)


EXACT: dict[str, Any] = {"criterion": "trajectory", "context": "batched"}
Q, P = GaussianModel(0.0, 1.0), GaussianModel(0.3, 1.2)


def test_plain_sampling_draws_the_law_of_the_chain():
    seeds = [(1, image) for image in range(NUM)]
    out = get_sampler("ar", last_noise=True)(P, [None] * NUM, seeds=seeds)
    assert distance(out.tokens) < CRITICAL


def test_the_exact_pair_draws_the_target_law():
    out = run(P, Q, **EXACT)
    assert out.stats.lossless
    assert out.stats.exhausted == out.stats.nonfinite == 0
    assert distance(out.tokens) < CRITICAL


def test_one_step_accepts_one_minus_total_variation():
    """With a single Gaussian step: TV(N(0, 1), N(.3, 1.2^2)) = .1324."""
    target, draft = (GaussianModel(m, s, num_steps=1) for m, s in ((0.3, 1.2), (0.0, 1.0)))
    for model in (target, draft):
        model.head.law = lambda z, guidance_scale=1.0: OneStep(*z.chunk(2, dim=-1))
    out = run(target, draft, **EXACT)
    assert distance(out.tokens) < CRITICAL
    spread = math.sqrt(0.8676 * 0.1324 / NUM)
    assert out.stats.acceptance_rate == pytest.approx(0.8676, abs=3 * spread)
    assert out.stats.proposals / out.stats.rejected == pytest.approx(1 / 0.1324, rel=0.05)


class OneStep:
    """One draw from N(mean, deviation^2) that does not look at the start."""

    num_steps = 1

    def __init__(self, mean, deviation):
        self.latent_dim, self._mean, self._deviation = mean.shape[1], mean, deviation

    def moments(self, x, step):
        return self._mean, 2 * self._deviation.log()

    def path_moments(self, states):
        mean, log_variance = self.moments(None, 0)
        return mean[None], log_variance[None]


@pytest.mark.parametrize("factor", [1.05, 0.95])
def test_a_ratio_wrong_by_5_percent_is_found(monkeypatch, factor):
    """The same test on rules that err by 5 % fails: it could have found such an error."""
    right = latent_verify.path_log_ratio

    def wrong(above, below):
        # p / q in acceptance and q / p in the residual: either is wrong the same way.
        shift = math.log(factor)
        return right(above, below) + (shift if wrong.is_acceptance else -shift)

    class Tilted(latent_verify.Verifier):
        def compare(self, *args):
            wrong.is_acceptance = True
            return super().compare(*args)

        def replace(self, *args):
            wrong.is_acceptance = False
            return super().replace(*args)

    target, draft = (GaussianModel(m, s, num_steps=1) for m, s in ((0.3, 1.2), (0.0, 1.0)))
    for model in (target, draft):
        model.head.law = lambda z, guidance_scale=1.0: OneStep(*z.chunk(2, dim=-1))
    monkeypatch.setattr(latent_verify, "path_log_ratio", wrong)
    monkeypatch.setattr("arvision.decoding.latents.speculation.Verifier", Tilted)
    assert distance(run(target, draft, **EXACT).tokens) > CRITICAL


@pytest.mark.parametrize("inner_temperature", [42.0, 1.0])
def test_the_published_criterion_is_not_exact(inner_temperature):
    out = run(P, Q, criterion="published", inner_temperature=inner_temperature)
    assert not out.stats.lossless
    assert distance(out.tokens) > CRITICAL


def energy_distance(a, b):
    def mean_distance(x, y):
        return float(torch.cdist(x, y).mean())

    return 2 * mean_distance(a, b) - mean_distance(a, a) - mean_distance(b, b)


def test_four_dimensions():
    """Energy distance to the target's law against that of two samples of this law."""
    mean = torch.tensor([0.4, -0.3, 0.2, 0.1])
    target, draft = GaussianModel(mean, 0.9, dim=4), GaussianModel(0.0, 1.0, dim=4)
    out = run(target, draft, num=NUM, **EXACT)
    for column, goal in enumerate(mean.tolist()):
        found = out.tokens[:, 0, column]
        assert distance(found, goal, 0.9) < 1.95 / math.sqrt(NUM)  # 0.1 %: four tests
    generator = torch.Generator().manual_seed(0)
    some = out.tokens[:4000, 0].double()
    own = [mean + 0.9 * torch.randn(4000, 4, generator=generator).double() for _ in range(12)]
    among = [energy_distance(own[i], own[i + 1]) for i in range(11)]
    assert energy_distance(some, own[0]) < max(among) * 1.5
    wrong = torch.randn(4000, 4, generator=generator).double()
    assert energy_distance(wrong, own[0]) > max(among) * 10


def joint_distances(samples, pull):
    """KS distances of token 1, and of token 2 less its mean given token 1."""
    first, second = samples[:, 0, 0], samples[:, 1, 0] - pull * samples[:, 0, 0]
    return distance(first), distance(second)


PAIR = [GaussianModel(m, s, num_tokens=2, pull=c) for m, s, c in ((0.3, 1.2, 0.8), (0.0, 1.0, 0.2))]


@pytest.mark.parametrize("drafting", ["sequential", "parallel"])
def test_joint_law_of_two_tokens(drafting):
    target, draft = PAIR
    out = run(target, draft, max_draft=2, drafting=drafting, **EXACT)
    assert max(joint_distances(out.tokens, target.pull)) < CRITICAL
    # The residual, standardised, does not depend on the first token.
    first, second = out.tokens[:, 0, 0], out.tokens[:, 1, 0] - target.pull * out.tokens[:, 0, 0]
    correlation = float(torch.corrcoef(torch.stack([first, second]))[0, 1])
    assert abs(correlation) < 3.3 / math.sqrt(NUM)
    passes = torch.tensor(out.stats.passes_per_image)
    assert {1, 2} == set(passes.tolist())


def test_one_context_for_all_drafts_is_not_exact():
    """The target must see what the draft saw: the joint law tells."""
    target, draft = PAIR
    out = run(target, draft, max_draft=2, criterion="trajectory", context="verified")
    assert not out.stats.lossless
    assert max(joint_distances(out.tokens, target.pull)) > 3 * CRITICAL


def test_a_draft_equal_to_the_target_is_always_accepted():
    out = run(P, GaussianModel(0.3, 1.2), num=200, **EXACT)
    assert out.stats.acceptance_rate == 1.0


def test_densities_that_are_not_finite_are_rejected_and_counted():
    """A draft that gives no density is never accepted; the law stays the target's."""
    broken = GaussianModel(0.0, 1.0)

    class Broken(GaussianLaw):
        def moments(self, x, step):
            mean, log_variance = super().moments(x, step)
            return mean, torch.full_like(mean, -torch.inf) if step == 3 else log_variance

    broken.head.law = lambda z, guidance_scale=1.0: Broken(*z.chunk(2, dim=-1), num_steps=10)
    out = run(P, broken, num=5000, max_tries=8, **EXACT)
    assert out.stats.nonfinite == 5000
    assert out.stats.accepted == 0
    assert out.stats.exhausted == 5000
    assert bool(out.tokens.isfinite().all())
    assert distance(out.tokens) < 1.628 / math.sqrt(5000)
