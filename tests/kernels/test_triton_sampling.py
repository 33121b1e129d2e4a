import pytest
import torch
from forms import covered

from arvision.kernels import sampling
from arvision.kernels.dispatch import is_interpreted
from arvision.kernels.sampling import Shaping

pytestmark = pytest.mark.usefixtures("_poisoned")
CASES = [
    {},
    {"temperature": 0.7},
    {"temperature": 0.0},
    {"top_k": 1},
    {"top_k": 5, "temperature": 1.3},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"top_k": 7, "top_p": 0.5503},
    {"top_k": 10**6, "top_p": 0.5},
]

OPTIONS = ("temperature", "top_k", "top_p")


def _split(given):
    return Shaping(**{name: given.pop(name) for name in OPTIONS if name in given}), given


def shape(logits, **given):
    how, rest = _split(given)
    return sampling.shape(logits, how, **rest)


def sample_gumbel(logits, identity, **given):
    how, rest = _split(given)
    return sampling.sample_gumbel(logits, identity, how, **rest)


def sample_inverse(logits, uniforms, **given):
    how, rest = _split(given)
    return sampling.sample_inverse(logits, uniforms, how, **rest)


def assert_same_law(ours, expected):
    assert ours.isneginf().equal(expected.isneginf()), "another set of tokens is kept"
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        *((torch.float32, case) for case in CASES),
        *((dtype, CASES[i]) for dtype in (torch.bfloat16, torch.float16) for i in (4, 7)),
    ],
    ids=str,
)
def test_guided_law_equals_the_reference(device, options, dtype):
    logits = (3 * torch.randn(2, 37, device=device)).to(dtype)
    law: dict = dict(options)
    if not (dtype == torch.bfloat16 and is_interpreted()):
        # The interpreter truncates to bfloat16 where hardware and PyTorch round to nearest.
        null = (3 * torch.randn(2, 37, device=device)).to(dtype)
        law |= {"null_logits": null, "guidance_scale": 2.3}
    assert_same_law(shape(logits, backend="triton", **law), shape(logits, **law))


@pytest.mark.parametrize(("options", "size"), covered(CASES, [1, 2100]), ids=str)
def test_law_over_tiles_with_ties(device, options, size):
    # Few different values, of both zeros: the cut falls among equal logits.
    logits = torch.randint(-3, 4, (1, size), device=device).float() / 2
    logits[0, ::3] *= -1
    assert_same_law(shape(logits, backend="triton", **options), shape(logits, **options))


@pytest.mark.parametrize("options", CASES, ids=str)
def test_extreme_rows(device, options):
    logits = torch.randn(6, 33, device=device)
    logits[0] *= 1e4
    logits[1, 3:] = float("-inf")
    logits[2, :] = float("-inf")
    logits[2, 7] = -1e4
    logits[3] = 0.0
    logits[4] = 1e4
    logits[5, ::2] = float("-inf")
    assert_same_law(shape(logits, backend="triton", **options), shape(logits, **options))


def test_equal_logits_are_cut_by_index(device):
    logits = torch.zeros(1, 64, device=device)
    kept = shape(logits, top_p=0.25, backend="triton").isfinite()
    assert kept[0].nonzero()[:, 0].tolist() == list(range(16))
    assert shape(logits, top_k=3, backend="triton").isfinite().all()


@pytest.mark.parametrize(
    ("size", "options"),
    [(3, {}), (70, {}), (70, CASES[4]), (70, CASES[7]), (2100, {"top_k": 40})],
    ids=str,
)
def test_draws_equal_the_reference(device, options, size):
    logits = 2 * torch.randn(2, size, device=device)
    identity = torch.randint(1 << 32, (2, 4), device=device)
    for use in (1, (1 << 32) - 1):
        ours = sample_gumbel(logits, identity, use=use, backend="triton", **options)
        assert ours.equal(sample_gumbel(logits, identity, use=use, **options, backend="reference"))
    uniforms = torch.rand(2, device=device, dtype=torch.float64)
    uniforms[0] = 1 - 2.0**-33
    ours = sample_inverse(logits, uniforms, backend="triton", **options)
    assert ours.equal(sample_inverse(logits, uniforms, **options, backend="reference"))


def test_a_vocabulary_of_several_programs(device, monkeypatch):
    from arvision.kernels.sampling import triton as implementation

    monkeypatch.setattr(implementation, "BLOCK", 64)
    monkeypatch.setattr(implementation, "SPLIT", 128)
    logits = torch.randn(2, 333, device=device)
    identity = torch.randint(1 << 32, (2, 4), device=device)
    ours = sample_gumbel(logits, identity, top_k=300, backend="triton")
    assert ours.equal(sample_gumbel(logits, identity, top_k=300, backend="reference"))


@pytest.mark.parametrize(
    ("dtype", "size"), covered([torch.float32, torch.float64], [1, 37, 2500]), ids=str
)
def test_noise_is_made_where_it_is_used(device, dtype, size):
    logp = torch.randn(3, 5, size, device=device, dtype=dtype).log_softmax(-1)
    logp = logp.masked_fill(torch.rand_like(logp) < 0.2, float("-inf"))
    logp[..., 0] = 0.0
    words = torch.randint(1 << 32, (3, 3), device=device)
    positions = torch.randint(50, (3, 5), device=device)
    positions[:, 1] = positions[:, 0]
    for law in (logp, logp[:, :1], logp.transpose(0, 1).contiguous().transpose(0, 1)):
        ours = sampling.draw_gumbel(law, words, positions, backend="triton")
        assert ours.equal(sampling.draw_gumbel(law, words, positions, backend="reference"))
    # One law at one position has one draw, whoever asks.
    assert ours[:, 0].equal(ours[:, 1]) or not logp[:, 0].equal(logp[:, 1])


def test_noise_over_several_programs(device, monkeypatch):
    from arvision.kernels.sampling import triton

    monkeypatch.setattr(triton, "SPLIT", 64)
    monkeypatch.setattr(triton, "BLOCK", 64)
    logp = torch.randn(2, 2, 150, device=device).log_softmax(-1)
    words, positions = torch.tensor([[1, 2, 3], [4, 5, 6]], device=device), torch.eye(2).long()
    given = (logp, words, positions.to(device))
    ours = sampling.draw_gumbel(*given, backend="triton")
    assert ours.equal(sampling.draw_gumbel(*given, backend="reference"))
