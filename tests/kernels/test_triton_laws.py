"""Draws from logits: one launch, no law and no noise in memory, and the tokens of the references."""

import pytest
import torch
from forms import covered, slow
from scipy.stats import chi2

from arvision import InputError, generate, get_sampler
from arvision.decoding.guidance import Guidance
from arvision.kernels import dispatch
from arvision.kernels.sampling import Laws, Shaping, contest, laws_of, reference, triton
from arvision.models import VAR, VARTokenizer, VARTransformer
from arvision.testing import tiny_llamagen

pytestmark = pytest.mark.usefixtures("_poisoned")
HOW = {
    "plain": Shaping(),
    "greedy": Shaping(temperature=0),
    "cut": Shaping(temperature=0.8, top_k=20, top_p=0.9),
}


def identities(batch, num, device):
    words = torch.randint(1 << 32, (batch, 3), device=device)
    return words, torch.randint(9, (batch, num), device=device)


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels of sampling as they are launched, and how many programs each had."""
    seen = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            seen.append((self.kernel.fn.__name__, grid[0]))
            return self.kernel[grid]

    for name in ("_cut", "_write", "_gumbel", "_draw", "_inverse"):
        monkeypatch.setattr(triton, name, Counted(getattr(triton, name)))
    return seen


@pytest.mark.parametrize(("name", "scale"), covered(HOW, [None, 2.5, "own"]))
def test_a_draw_from_logits_is_the_draw_from_their_law(device, launched, name, scale):
    logits, null = 2 * torch.randn(2, 2, 3, 70, device=device)
    if scale is None:
        null, scale = None, 1.0
    elif scale == "own":
        scale = 1 + 3 * torch.rand(2, 1, 1, device=device)
    words, positions = identities(2, 3, device)
    expected = reference.shape(logits, HOW[name], null, scale)
    laws = laws_of(logits, HOW[name], null, scale, backend="triton")
    assert isinstance(laws, Laws)
    assert laws.draw(words, positions).equal(reference.draw_gumbel(expected, words, positions))
    assert launched == [("_cut", 6)]
    assert laws.norms.isfinite().all()
    torch.testing.assert_close(laws.at(-1), expected[:, -1], rtol=1e-6, atol=2e-6)
    assert launched == [("_cut", 6), ("_write", 2)]
    torch.testing.assert_close(laws.written, expected, rtol=1e-6, atol=2e-6)
    some = torch.tensor([1, 0], device=device), torch.tensor([2, 2], device=device)
    torch.testing.assert_close(laws[some].written, expected[some], rtol=1e-6, atol=2e-6)
    # Other numbers are another draw from the same cut.
    other = laws.draw(words + 1, positions)
    assert other.equal(reference.draw_gumbel(expected, words + 1, positions))
    assert launched[-1] == ("_gumbel", 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float16)], ids=str)
def test_half_precision_differs_nowhere_without_guidance(device, dtype):
    logits = (3 * torch.randn(3, 4, 50, device=device)).to(dtype)
    words, positions = identities(3, 4, device)
    how = Shaping(temperature=0.8)
    ours = laws_of(logits, how, backend="triton").draw(words, positions)  # pyright: ignore
    expected = reference.draw_gumbel(reference.shape(logits, how), words, positions)
    assert int((ours != expected).sum()) == 0


def test_long_rows_and_a_margin_that_is_too_narrow(device, monkeypatch):
    """Blocks whose rough numbers cannot win are left out, and no others."""
    monkeypatch.setattr(triton, "DRAWN_AT_ONCE", 32)
    logits = torch.randn(2, 3, 200, device=device)
    words, positions = identities(2, 3, device)
    expected = reference.draw_gumbel(reference.shape(logits, Shaping()), words, positions)

    def drawn():
        return laws_of(logits, Shaping(), backend="triton").draw(words, positions)  # pyright: ignore

    assert drawn().equal(expected)
    monkeypatch.setattr(triton, "DRAWN_ALONE", 64)  # a row for several programs
    monkeypatch.setattr(triton, "SPLIT", 128)
    assert drawn().equal(expected)
    if dispatch.is_interpreted():
        monkeypatch.setattr(contest, "MARGIN", triton.tl.constexpr(-1.0))
        assert not drawn().equal(expected)


@pytest.mark.parametrize("bits", [0, 1, 1 << 20, (1 << 31) - 1, (1 << 32) - 256, (1 << 32) - 1])
def test_rough_numbers_are_within_the_margin(bits):
    """The arithmetic of `contend` in float32, at the ends of the range and where it changes."""
    numbers = (torch.arange(256) + bits).clamp(max=(1 << 32) - 1)
    exact = -(-((numbers.double() + 0.5) * 2.0**-32).log()).log()
    u, v = (((one.float() + 0.5) * 2.0**-32) for one in (numbers, numbers ^ 0xFFFFFFFF))
    late = torch.where(v < 0.004, v * (1 + v * (0.5 + v * 0.33333334)), -u.log())
    assert float((exact + late.log()).abs().max()) < contest.MARGIN.value / 50


def rejects(tokens, law):
    """Whether a chi-square test at 1e-4 finds that tokens do not follow a law [V]."""
    observed = torch.bincount(tokens.flatten(), minlength=len(law))
    if bool((observed[law == 0] > 0).any()):
        return True
    kept = law > 0
    expected = law[kept].double() * tokens.numel()
    statistic = float(((observed[kept] - expected) ** 2 / expected).sum())
    return chi2.sf(statistic, int(kept.sum()) - 1) < 1e-4


def test_draws_follow_the_guided_law_and_a_mutant_does_not(device):
    logits = torch.tensor([1.0, -0.5, 0.2], device=device)
    null = torch.tensor([-0.2, 0.6, 0.4], device=device)
    law = reference.shape(logits, Shaping(), null, 1.5).exp().cpu()
    words = torch.stack([torch.arange(6), torch.zeros(6), torch.ones(6)], 1).long().to(device)
    positions = torch.arange(12, device=device).expand(6, 12)
    given = logits.expand(6, 12, 3), Shaping(), null.expand(6, 12, 3)

    def drawn(scale):
        return laws_of(*given, scale, backend="triton").draw(words, positions).cpu()  # pyright: ignore

    assert not rejects(drawn(1.5), law)
    assert rejects(drawn(-1.0), law)


def no_law(self):
    raise AssertionError("a law was written")


DRAWING = [
    ("ar", 2.0),
    ("ar", "falling"),
    ("sjd:window=3", "falling"),
    ("zipar", 2.0),
    ("pjd", 2.0),
]


@pytest.mark.parametrize(("spec", "weights"), DRAWING)
def test_samplers_that_only_draw_write_no_law(device, monkeypatch, launched, spec, weights):
    model = tiny_llamagen(grid=(2, 3), num_layers=1).to(device)
    scale = Guidance(3.0, weights) if isinstance(weights, str) else weights
    sampler = get_sampler(spec)

    def draw():
        return sampler(model, [0, 2], seeds=[3, 4], guidance_scale=scale).tokens

    with dispatch.taking("reference"):
        expected = draw()
    assert not launched
    monkeypatch.setattr(Laws, "written", property(no_law))
    with dispatch.taking("triton"):
        assert draw().equal(expected)
    names = {name for name, _ in launched}
    assert names <= {"_cut", "_write", "_draw"}
    # The last law of a row stays for what is drafted next.
    assert ("_write" in names) == spec.startswith("sjd")
    assert all(rows <= 2 for name, rows in launched if name == "_write")


def tiny_var():
    sizes = {"patch_nums": (1, 2), "codebook_size": 16, "z_channels": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = VARTransformer(
            num_classes=3, hidden_size=32, num_layers=1, num_heads=2, **sizes
        )
        return VAR(transformer.eval(), VARTokenizer(ch=32, ch_mult=(1, 1), **sizes).eval())


def test_a_scale_model_and_text_write_no_law(device, monkeypatch, launched):
    from text_models import random_prompts, tiny_llama

    var = tiny_var().to(device)
    network = tiny_llama(num_hidden_layers=1).float().to(device)
    prompts = [2 * random_prompts([4])[0]]

    def draw():
        tokens = get_sampler("ar")(var, [0, 1], seeds=[3, 4], guidance_scale=2.0).tokens
        options = {"max_new_tokens": 3, "seed": 3, "temperature": 0.9}
        text = generate(network, prompts, drafter="prompt_lookup", **options).tokens
        return tokens.tolist(), text

    with dispatch.taking("reference"):
        expected = draw()
    monkeypatch.setattr(Laws, "written", property(no_law))
    with dispatch.taking("triton"):
        assert draw() == expected
    assert {name for name, _ in launched} == {"_cut"}


@pytest.mark.parametrize("spec", ["ar", "zipar"])
def test_numbers_that_are_none_are_told(device, spec):
    model = tiny_llamagen(grid=(2, 3), num_layers=1).to(device)
    model.transformer.output.weight.data[3] = float("nan")
    with dispatch.taking("triton"), pytest.raises(InputError, match="NaN or infinity in pass"):
        get_sampler(spec)(model, [0], seeds=[3], guidance_scale=2.0)
