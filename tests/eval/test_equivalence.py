"""Equivalence tests: they accept equal laws at their stated rate and find planted differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats as _scipy_stats

from arvision.errors import InputError
from arvision.eval import Score
from arvision.eval.equivalence import (
    frechet_equivalence,
    g_test,
    g_test_law,
    holm,
    log_likelihoods,
    permutation_mmd,
    same_tokens,
    token_law,
    verdict,
)
from arvision.eval.scores import mmd_unbiased

stats: Any = _scipy_stats


def law_tokens(num: int, seed: int, tilt: float = 0.0) -> np.ndarray:
    """Tokens [num, 6] over 40 values; `tilt` shifts mass at position 3."""
    draw = np.random.default_rng(seed)
    base = np.random.default_rng(99).dirichlet(np.full(40, 0.5), size=6)
    base[3] = (1 - tilt) * base[3] + tilt * np.roll(base[3], 1)
    return np.stack([draw.choice(40, size=num, p=row) for row in base], 1)


def test_same_tokens():
    a = law_tokens(50, 0)
    assert same_tokens(a, a).passed
    b = a.copy()
    b[3, 2] += 1
    result = same_tokens(a, b)
    assert not result.passed
    assert result.statistic == 0.98
    latents = np.random.default_rng(0).normal(size=(6, 5, 3))
    assert same_tokens(latents, latents.copy()).passed
    with pytest.raises(InputError, match="expected the same"):
        same_tokens(a, a[:3])


def test_g_test_equals_scipy():
    a, b = np.array([50, 60, 40]), np.array([70, 40, 45])
    expected = stats.chi2_contingency([a, b], correction=False, lambda_="log-likelihood")
    statistic, p_value, freedom = g_test(a, b)
    assert statistic == pytest.approx(expected.statistic)
    assert p_value == pytest.approx(expected.pvalue)
    assert freedom == 2


def test_g_test_pools_rare_cells():
    a, b = np.array([500, 3, 2, 2, 1]), np.array([480, 2, 1, 3, 4])
    _, p_value, freedom = g_test(a, b)
    assert freedom == 1
    assert p_value > 0.3
    assert g_test(np.array([7, 0]), np.array([9, 0]))[1] == 1.0


def test_g_test_level():
    """At alpha 5 %, equal laws are rejected in 2 to 9 % of 300 trials."""
    p_values = []
    for seed in range(300):
        a, b = law_tokens(500, 2 * seed), law_tokens(500, 2 * seed + 1)
        counts = [np.bincount(x[:, 0], minlength=40) for x in (a, b)]
        p_values.append(g_test(counts[0], counts[1])[1])
    assert 0.02 <= np.mean(np.array(p_values) < 0.05) <= 0.09


def test_law_of_an_enumerable_model_with_its_mutant():
    """V=4, L=3, N=2e5, alpha 1e-4: exact samples pass, a 5 % mutant of one probability fails."""
    law = np.random.default_rng(5).dirichlet(np.full(64, 1.0))
    draw = np.random.default_rng(6)
    exact = draw.multinomial(200_000, law)
    assert g_test_law(exact, law)[1] >= 1e-4
    mutant = law.reshape(4, 16).copy()
    mutant[0] *= 1.05
    mutant /= mutant.sum()
    assert g_test_law(draw.multinomial(200_000, mutant.ravel()), law)[1] < 1e-4
    impossible = np.array([0.5, 0.5, 0.0])
    assert g_test_law([40, 50, 10], impossible)[1] == 0


def test_holm():
    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])


def test_token_law_accepts_equal_and_finds_a_tilt():
    a = law_tokens(2000, 1)
    assert token_law(a, law_tokens(2000, 2)).passed
    result = token_law(a, law_tokens(2000, 3, tilt=0.3))
    assert not result.passed
    assert result.details["worst_position"] == 3
    with pytest.raises(InputError, match="shape"):
        token_law(a, a[:, :3])
    with pytest.raises(InputError, match="integers"):
        token_law(a, a.astype(float))


def test_log_likelihoods():
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=800), draw.normal(size=800)
    assert log_likelihoods(a, b).passed
    assert not log_likelihoods(a, b + 0.3).passed
    assert not log_likelihoods(a, b * 1.5).passed
    with pytest.raises(InputError, match="finite"):
        log_likelihoods(a, [np.nan, 1.0])


def test_permutation_mmd_accepts_equal_and_finds_a_shift():
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(300, 24, generator=draw) for _ in range(2))
    assert permutation_mmd(a, b, num_permutations=200).passed
    assert not permutation_mmd(a, b + 0.25, num_permutations=200).passed
    assert not permutation_mmd(a, b * 1.3, num_permutations=200).passed


def test_permutation_statistic_is_the_unbiased_mmd():
    a, b = torch.randn(40, 8).double(), torch.randn(30, 8).double()
    rows = torch.cat([a, b])
    scaled = (rows - rows.mean(0)) / rows.std(0)
    expected = mmd_unbiased(scaled[:40], scaled[40:])
    assert permutation_mmd(a, b, num_permutations=10).statistic == pytest.approx(expected, rel=1e-9)


def test_same_seed_pairs_make_the_mmd_negative():
    """Why the image test wants independent seeds."""
    a = torch.randn(200, 16)
    b = a + 0.01 * torch.randn(200, 16)
    result = permutation_mmd(a, b, num_permutations=200)
    assert result.statistic < 0
    assert result.p_value is not None
    assert result.p_value > 0.99


def test_frechet_equivalence():
    def score(value: float, error: float) -> Score:
        return Score(value, 50_000, None, error)

    assert frechet_equivalence(score(3.0, 0.005), score(3.01, 0.005)).passed
    assert not frechet_equivalence(score(3.0, 0.005), score(3.2, 0.005)).passed
    vague = frechet_equivalence(score(3.0, 0.2), score(3.0, 0.2))
    assert not vague.passed
    assert vague.details["needed"] < 0.2
    with pytest.raises(InputError, match="standard errors"):
        frechet_equivalence(Score(3.0, 10), score(3.0, 0.1))


def test_verdicts():
    a = law_tokens(300, 0)
    assert verdict([same_tokens(a, a)]).startswith("equal")
    equal, tilted = token_law(a, law_tokens(300, 1)), token_law(a, law_tokens(900, 1, tilt=0.9))
    assert verdict([equal]).startswith("no difference found")
    assert verdict([equal, tilted]).startswith("different")
    assert verdict([]).startswith("undecided")
