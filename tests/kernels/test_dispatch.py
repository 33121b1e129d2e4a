"""What runs where, and that the references are what the samplers compute."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chi2

from arvision import InputError, get_sampler
from arvision.decoding import verify as decoding
from arvision.decoding.logits import Shaping
from arvision.decoding.noise import Noise
from arvision.kernels import dispatch, sampling
from arvision.kernels.nearest_code import nearest_code
from arvision.kernels.tree_attention import tree_attention
from arvision.kernels.tree_attention.reference import visible
from arvision.kernels.verify import verify
from arvision.testing import TableModel

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


def shape_logits(logits, null_logits=None, guidance_scale=1.0, **how):
    return Shaping(**how)(logits, null_logits, guidance_scale)


def test_the_cpu_runs_references_and_says_so():
    nearest_code(torch.ones(1, 2), torch.ones(3, 2))
    assert dispatch.last_run("nearest_code") == dispatch.Choice(
        "reference", "Triton does not compile for cpu tensors"
    )
    nearest_code(torch.ones(1, 2), torch.ones(3, 2), backend="reference")
    assert dispatch.last_run("nearest_code") == dispatch.Choice("reference", "asked for")


def test_what_cannot_run_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match="does not compile for cpu tensors"):
        nearest_code(torch.ones(1, 2), torch.ones(3, 2), backend="triton")
    with pytest.raises(InputError, match=r"unknown backend 'tirton': did you mean 'triton'"):
        nearest_code(torch.ones(1, 2), torch.ones(3, 2), backend="tirton")
    with pytest.raises(InputError, match="unknown operation 'sort'"):
        dispatch.last_run("sort")


def test_a_gpu_runs_triton_unless_it_has_a_reason(monkeypatch):
    monkeypatch.setattr(dispatch, "triton_version", lambda: "3.4.0")
    assert dispatch.explain("cuda").implementation == "triton"
    limited = dispatch.explain("cuda", limit="too wide")
    assert limited == dispatch.Choice("reference", "too wide")
    monkeypatch.setattr(dispatch, "triton_version", lambda: None)
    assert dispatch.explain("cuda").reason == "Triton is not installed"
    with pytest.raises(dispatch.MissingDependencyError, match="pip install triton"):
        dispatch.explain("cuda", "triton")


def test_bad_numbers_are_refused_when_asked():
    logits = torch.zeros(3, 5)
    logits[1, 2] = float("nan")
    with pytest.raises(InputError, match="logits row 1: its largest logit is nan"):
        shape(logits, check=True)
    logits[1] = float("-inf")
    with pytest.raises(InputError, match="row 1: its largest logit is -inf"):
        sample_inverse(logits, torch.rand(3, dtype=torch.float64), check=True)
    logits[1, 0] = -1e4
    assert shape(logits, check=True)[1, 0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.0}, {"top_k": 5, "temperature": 0.6}, {"top_k": 20, "top_p": 0.7}],
    ids=str,
)
def test_shape_is_shape_logits(options, dtype):
    logits, null = torch.randn(2, 7, 40).to(dtype)
    given = {"null_logits": null, "guidance_scale": 3.5, **options}
    assert shape(logits, **given).equal(shape_logits(logits, **given))


def test_of_equal_logits_both_keep_the_first():
    logits = torch.randint(-2, 3, (20, 64)).float()
    law = shape_logits(logits, top_p=0.6)
    assert shape(logits, top_p=0.6).equal(law)
    for row, kept in zip(logits, law.isfinite(), strict=True):
        ties = kept[row == row[kept].min()].long()
        assert ties.equal(ties.sort(descending=True).values)


def test_gumbel_numbers_are_those_of_the_noise():
    seeds = [(5, 1), (1 << 40, 2)]
    positions = torch.tensor([[3, 9]]).expand(2, 2)
    logits = torch.randn(2, 2, 30)
    words = torch.tensor([(seed & 0xFFFFFFFF, seed >> 32, image) for seed, image in seeds])
    identity = torch.cat([words[:, None].expand(2, 2, 3), positions[..., None]], -1).flatten(0, 1)
    expected = decoding.gumbel_draw(logits.log_softmax(-1), positions, Noise(seeds))
    assert sample_gumbel(logits.flatten(0, 1), identity).equal(expected.flatten())


@pytest.mark.parametrize("window", [0, 1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_verify_is_the_couplings(window, dtype):
    target = (2 * torch.randn(50, window + 1, 9, dtype=dtype)).log_softmax(-1)
    draft = (target[:, :-1] + torch.randn(50, window, 9, dtype=dtype)).log_softmax(-1)
    draft[:5] = target[:5, :-1]
    drafts = torch.randint(-1, 9, (50, window))
    positions = torch.arange(window + 1).expand(50, window + 1)
    noise = Noise(list(range(50)))
    chain = decoding.Round(drafts, draft, target, positions, noise, number=3)
    fresh = decoding.fresh(chain)
    kept = torch.where(decoding.accept(chain), drafts, decoding.recover(chain))
    kept = torch.where(drafts < 0, fresh[:, :-1], kept)  # as behind a row's last draft
    maximal = torch.cat([kept, fresh[:, -1:]], dim=1)
    chosen = decoding.gumbel_draw(target, positions, noise)
    expected = {
        "maximal": decoding.follow(chain, maximal),
        "independent": decoding.through_first_rejection(chain, decoding.accept(chain), fresh),
        "gumbel": decoding.follow(chain, chosen),
    }
    for coupling, wanted in expected.items():
        found = decoding.get_coupling(coupling)(chain)
        assert found.tokens.equal(wanted.tokens)
        assert found.counts.equal(wanted.counts)


def test_samplers_shape_and_verify_through_the_kernels(monkeypatch):
    monkeypatch.setattr(dispatch, "LAST", {})
    model = TableModel(num_tokens=4, vocab_size=3, seed=0)
    get_sampler("sjd", window=2, coupling="maximal")(model, [0], seeds=[0])
    assert {"sampling", "verify", "philox"} <= set(dispatch.LAST)


def rejects(tokens, law):
    """Whether a chi-square test at 1e-4 finds that tokens do not follow a law [V]."""
    kept = law > 0
    observed = torch.bincount(tokens, minlength=len(law))
    assert not observed[~kept].any()
    expected = law[kept].double() * len(tokens)
    statistic = ((observed[kept] - expected) ** 2 / expected).sum()
    return float(statistic) > chi2.ppf(1 - 1e-4, int(kept.sum()) - 1)


def test_draws_follow_the_law_and_a_mutant_does_not():
    num = 200_000
    logits = torch.tensor([0.3, -1.0, 1.1, 0.3, -3.0]).expand(num, 5)
    law = shape_logits(logits[0], top_k=4, temperature=0.9).exp()
    options = {"top_k": 4, "temperature": 0.9}
    identity = torch.zeros(num, 4, dtype=torch.int64)
    identity[:, 2] = torch.arange(num)
    uniforms = torch.rand(num, dtype=torch.float64)
    assert not rejects(sample_gumbel(logits, identity, **options), law)
    assert not rejects(sample_inverse(logits, uniforms, **options), law)
    assert rejects(sample_inverse(logits, uniforms**1.05, **options), law)
    assert rejects(sample_gumbel(logits, identity, top_k=4, temperature=0.945), law)


def test_verified_tokens_follow_the_target_and_a_mutant_does_not():
    num = 200_000
    target = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    draft = torch.tensor([0.2, 0.2, 0.3, 0.3], dtype=torch.float64)
    drafts = torch.multinomial(draft, num, replacement=True)[:, None]
    laws = draft.log().expand(num, 1, 4), target.log().expand(num, 2, 4)
    accept, recover = (torch.rand(num, 1, dtype=torch.float64) for _ in range(2))
    bonus = torch.rand(num, 2, dtype=torch.float64)
    for coupling in ("maximal", "independent"):
        tokens, _ = verify(drafts, *laws, accept, recover, bonus, coupling=coupling)
        assert not rejects(tokens[:, 0], target)
        mutant, _ = verify(drafts, *laws, accept * 0.95, recover, bonus, coupling=coupling)
        assert rejects(mutant[:, 0], target)


def test_tree_attention_sees_what_the_tree_says():
    ancestors = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool()
    sees = visible(torch.tensor([0, 2]), ancestors, 6, torch.tensor([[True], [False]]))
    assert sees[0].long().tolist() == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0]]
    assert sees[1].long().tolist() == [[0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0], [0, 1, 1, 0, 1, 0]]
    queries, keys, values = torch.randn(2, 4, 3, 8), *torch.randn(2, 2, 2, 6, 8)
    ours = tree_attention(queries, keys, values, torch.tensor([0, 2]), ancestors)
    mask = visible(torch.tensor([0, 2]), ancestors, 6, None)[:, None]
    scores = queries @ keys.repeat_interleave(2, 1).transpose(-1, -2) / 8**0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    torch.testing.assert_close(ours, weights @ values.repeat_interleave(2, 1))
    hidden = torch.tensor([3, 5])
    for row, end in enumerate(hidden):
        keys[row, :, end:] = values[row, :, end:] = float("nan")
    again = tree_attention(queries, keys, values, torch.tensor([0, 2]), ancestors)
    torch.testing.assert_close(again, ours)
    with pytest.raises(InputError, match=r"ancestors .*: expected \[3, 3\] or \[2, 3, 3\] bool"):
        tree_attention(queries, keys, values, torch.tensor([0, 2]), ancestors.long())
