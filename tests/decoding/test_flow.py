"""The flow-matching map against closed forms, a recorded reference and the law itself."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import chi2

from arvision import get_sampler
from arvision.decoding.flow import FlowMap
from arvision.errors import InputError

GOLDEN = Path(__file__).parents[1] / "goldens" / "dd"


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def log_law(size, seed=1):
    return normal(size, seed=seed).log_softmax(-1)


def test_recorded_reference():
    json.loads((GOLDEN / "flow_map_own_reference.json").read_text())
    case = load_file(GOLDEN / "flow_map_own_reference.io.safetensors")
    noise = case["noise"].double()
    laws = case["probs"].double().log()[:, None].expand(*noise.shape[:2], -1)
    fine = FlowMap(case["codebook"].double(), 2000)
    assert torch.equal(fine(laws, noise), case["indices"].long())
    assert (FlowMap(case["codebook"].double())(laws, noise) != case["indices"]).sum() <= 1
    place = int((case["times"] - 0.3).abs().argmin())
    time = float(case["times"][place])
    moved = fine.transport(laws, noise, 1.0, time)
    torch.testing.assert_close(moved, case["trajectory"][:, :, place].double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("width", [1, 3, 8])
def test_two_codes_are_split_by_a_plane(width):
    codes, logp = normal(2, width, seed=3), torch.tensor([0.3, 0.7], dtype=torch.float64).log()
    noise = normal(5000, width, seed=4)
    unit = (codes[1] - codes[0]) / (codes[1] - codes[0]).norm()
    border = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(0.3, dtype=torch.float64))
    expected = (noise @ unit > border).long()
    found = FlowMap(codes)(logp.expand(5000, 2), noise)
    near = (noise @ unit - border).abs() < 1e-2
    assert torch.equal(found[~near], expected[~near])


def test_one_dimension_is_the_quantile_map():
    codes, logp = torch.linspace(-1, 2, 7, dtype=torch.float64)[:, None], log_law(7)
    noise = normal(4000, 1, seed=5)
    quantile = torch.distributions.Normal(0.0, 1.0).cdf(noise[:, 0])
    edges = logp.exp().cumsum(0)
    expected = torch.searchsorted(edges, quantile)
    near = (quantile[:, None] - edges[None]).abs().min(1).values < 5e-3
    found = FlowMap(codes)(logp.expand(4000, 7), noise)
    assert torch.equal(found[~near], expected[~near])


def test_moving_turning_scaling_and_renaming_codes_changes_nothing():
    codes, noise, logp = normal(40, 4, seed=6), normal(500, 4, seed=7), log_law(40)
    laws = logp.expand(500, 40)
    found = FlowMap(codes)(laws, noise)
    turn = torch.linalg.qr(normal(4, 4, seed=8)).Q
    assert torch.equal(FlowMap(codes + 5)(laws, noise), found)
    assert torch.equal(FlowMap(codes @ turn)(laws, noise @ turn), found)
    assert torch.equal(FlowMap(codes * 10)(laws, noise), found)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(9))
    assert torch.equal(order[FlowMap(codes[order])(laws[:, order], noise)], found)
    halves = [FlowMap(codes)(laws[part], noise[part]) for part in (slice(0, 123), slice(123, 500))]
    assert torch.equal(torch.cat(halves), found)


def test_certain_and_impossible_codes():
    codes, noise = normal(30, 5, seed=10), normal(300, 5, seed=11)
    sure = torch.full((300, 30), float("-inf"), dtype=torch.float64)
    sure[:, 17] = 0.0
    assert (FlowMap(codes)(sure, noise) == 17).all()
    logp = log_law(30).clone()
    logp[::2] = float("-inf")
    assert (FlowMap(codes)(logp.log_softmax(-1).expand(300, 30), noise) % 2 == 1).all()


def chi_square(counts, probs):
    expected = probs * counts.sum()
    assert expected.min() >= 5
    return chi2.sf(float(((counts - expected) ** 2 / expected).sum()), len(probs) - 1)


def test_the_law_is_the_one_given_and_a_mutant_is_found():
    codes, logp = normal(50, 8, seed=12), log_law(50, seed=13)
    found = FlowMap(codes.float())(logp.float().expand(20_000, 50), normal(20_000, 8, seed=14))
    counts = torch.bincount(found, minlength=50).double()
    assert chi_square(counts, logp.exp()) > 1e-4
    mutant = (1.3 * logp).log_softmax(-1).exp()
    assert chi_square(counts, mutant) < 1e-4


def test_the_way_back_finds_the_noise():
    codes, logp, noise = normal(20, 3, seed=15), log_law(20), normal(100, 3, seed=16)
    flow = FlowMap(codes, 1000)
    there = flow.transport(logp.expand(100, 20), noise, 1.0, 0.2)
    back = flow.transport(logp.expand(100, 20), there, 0.2, 1.0)
    torch.testing.assert_close(back, noise, atol=2e-3, rtol=0)


def test_ar_with_flow_noise_is_a_function_of_the_seed_alone(fashion):
    sampler = get_sampler("ar", noise="flow")
    seeds = [(3, k) for k in range(3)]
    whole = sampler(fashion.model, [0, 4, 7], seeds=seeds, guidance_scale=3.0).tokens
    one = sampler(fashion.model, [4], seeds=[(3, 1)], guidance_scale=3.0).tokens
    assert (whole[1] == one[0]).double().mean() > 0.95
    assert not torch.equal(whole[0], whole[1])


def test_bad_input():
    with pytest.raises(InputError, match="num_evaluations 1"):
        FlowMap(torch.randn(4, 2), 1)
    with pytest.raises(InputError, match="codebook"):
        FlowMap(torch.randn(4, 2))(torch.zeros(3, 5), torch.zeros(3, 2))
