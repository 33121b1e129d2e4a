"""`draft`: the target's law and `ar`'s tokens, whatever the draft says and however long its chains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forms import SHORT, by_draws, by_fault, covered
from mutants import clinging, generous
from tiny_pipelines import disturbed_copy

import arvision
from arvision import ARPipeline, InputError, get_sampler
from arvision.decoding import draft_model, verify
from arvision.decoding.tree import TokenTree
from arvision.samplers import draft as draft_module
from arvision.samplers.draft import DraftSampler
from arvision.testing import (
    DroppingTableModel,
    TableModel,
    draw_joint,
    law_p_value,
    tiny_llamagen,
)

ALPHA = 1e-4
COUPLINGS = sorted(verify.COUPLINGS)
WEIGHTS = dict.fromkeys(draft_model.MEASURED, (1.5, 0.5, -1.0, 0.5))


def table_pair(seed, kind: Any = DroppingTableModel):
    """A target, and a draft that is a disturbed copy of it and stops at confidence of its own."""
    target, draft = kind(seed=seed), kind(seed=seed)
    noise = torch.randn(draft.table.shape, generator=torch.Generator().manual_seed(100 + seed))
    draft.table = draft.table + 0.8 * noise.double()
    draft.calibration = WEIGHTS
    return target, draft


def disturbed(model, scale):
    """A draft that is often, but not always, right, and stops at confidence of its own."""
    draft = disturbed_copy(model, scale)
    draft.calibration = WEIGHTS
    return draft


@pytest.fixture(scope="module")
def model():
    return tiny_llamagen(grid=(8, 8)).to(torch.float64)


@by_draws
@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_joint_law_with_adaptive_chains(coupling, seed, num):
    # One table takes models that can neither drop finished rows nor look past the end.
    target, draft = table_pair(seed, TableModel if seed == 0 else DroppingTableModel)
    sampler = get_sampler("draft", draft=draft, coupling=coupling, max_draft=3, stop_threshold=0.55)
    seeds = [(seed, image) for image in range(num)]
    out = sampler(target, [None] * num, seeds=seeds)
    assert law_p_value(target.number(out.tokens), target.joint(sampler.shaping())) > ALPHA
    assert 0.3 < out.stats.acceptance_rate < 0.95
    if coupling != "gumbel" and seed > 0:
        padded = out.stats.candidates - sum(out.stats.passes_per_image) - out.stats.drafted
        assert padded > num / 10, "rows were meant to stop at different lengths"


@by_draws
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_joint_law_with_shaping(coupling, num):
    target, draft = table_pair(4)
    sampler = get_sampler(
        "draft", draft=draft, coupling=coupling, max_draft=2, temperature=1.4, top_k=3, top_p=0.9
    )
    samples = draw_joint(sampler, target, num, seed=4)
    assert law_p_value(samples, target.joint(sampler.shaping())) > ALPHA


@by_fault
@pytest.mark.parametrize("coupling", ["independent", "gumbel"])
def test_a_mutant_is_found(coupling, num, off):
    """Chain speculative sampling that accepts too often, a Gumbel walk that clings to drafts."""
    rule = verify.independent_redraw
    mutant = clinging(off) if coupling == "gumbel" else generous(rule, off)
    target, draft = table_pair(1)
    sampler = get_sampler("draft", draft=draft, coupling=coupling, max_draft=3, stop_threshold=0.55)
    sampler.__class__ = type("Mutant", (DraftSampler,), {"rule": lambda self, model: mutant})
    samples = draw_joint(sampler, target, num, seed=1)
    assert law_p_value(samples, target.joint(sampler.shaping())) < ALPHA


def test_a_chain_that_hides_its_last_draft_is_found(monkeypatch):
    """Stopping may look at a draft that is verified, never at one that is then withheld."""

    class Withholding(draft_model.DraftModelDrafter):
        def propose(self, tokens, lengths, num, round_number):
            tree = super().propose(tokens, lengths, num, round_number)
            drafts, laws = tree.tokens, tree.logq
            assert laws is not None
            if drafts.shape[1]:
                likely = laws.gather(-1, drafts.clamp(min=0)[..., None])[..., 0].exp() > 0.4
                drafts = torch.where(likely.long().cumprod(1).bool(), drafts, -1)
            return TokenTree(drafts, laws)

    monkeypatch.setattr(draft_module, "DraftModelDrafter", Withholding)
    target, draft = table_pair(1)
    sampler = get_sampler("draft", draft=draft, coupling="independent", max_draft=3)
    samples = draw_joint(sampler, target, SHORT, seed=1)
    assert law_p_value(samples, target.joint(sampler.shaping())) < ALPHA


@pytest.mark.parametrize(("max_draft", "scale"), covered([1, 4, 11], [0.1, 0.3]))
def test_gumbel_coupling_gives_the_tokens_of_plain_sampling(model, max_draft, scale):
    classes, seeds = [k % 3 for k in range(7)], list(range(7))
    plain = get_sampler("ar")(model, classes, seeds=seeds, guidance_scale=2.0)
    sampler = get_sampler("draft", draft=disturbed(model, scale), max_draft=max_draft)
    out = sampler(model, classes, seeds=seeds, guidance_scale=2.0)
    assert torch.equal(out.tokens, plain.tokens)
    assert len(set(out.stats.passes_per_image)) > 1, "the batch was meant to be ragged"
    assert out.stats.forward_passes < 63


def test_a_small_unrelated_draft_does_not_change_the_picture(model):
    draft = tiny_llamagen(grid=(8, 8), seed=3, hidden_size=16, num_layers=1).to(torch.float64)
    plain = get_sampler("ar", top_k=8)(model, [0, 1], seeds=[4, 5], guidance_scale=1.5)
    sampler = get_sampler("draft", draft=draft, top_k=8, draft_guidance_scale=1.0)
    out = sampler(model, [0, 1], seeds=[4, 5], guidance_scale=1.5)
    assert torch.equal(out.tokens, plain.tokens)


@pytest.mark.parametrize("coupling", ["independent", "maximal"])
def test_speculative_pictures_do_not_depend_on_the_batch(model, coupling):
    """Rows stop where their own drafts look doubtful, whatever stands beside them."""
    classes, seeds = [k % 3 for k in range(7)], [(8, k) for k in range(7)]
    sampler = get_sampler(
        "draft", draft=disturbed(model, 0.1), coupling=coupling, stop_threshold=0.6
    )
    batch = sampler(model, classes, seeds=seeds, guidance_scale=2.0)
    assert len(set(batch.stats.passes_per_image)) > 1, "the batch was meant to be ragged"
    for row in (0, 3, 6):
        alone = sampler(
            model, classes[row : row + 1], seeds=seeds[row : row + 1], guidance_scale=2.0
        )
        assert torch.equal(alone.tokens[0], batch.tokens[row])


def test_a_perfect_draft_is_always_accepted(model):
    for coupling in COUPLINGS:
        sampler = get_sampler(
            "draft", draft=model, coupling=coupling, max_draft=8, stop_threshold=1
        )
        out = sampler(model, [0], seeds=[1], guidance_scale=2.0)
        assert out.stats.acceptance_rate == 1.0
        assert out.stats.forward_passes == 7  # 63 tokens, 9 per pass


def test_statistics(model):
    sampler = get_sampler("draft", draft=disturbed(model, 0.3), max_draft=5)
    stats = sampler(model, [0, 1, 2], seeds=[1, 2, 3], guidance_scale=2.0).stats
    assert stats.acceptance_rate == stats.accepted / stats.drafted
    # Each pass gives its accepted drafts and one token more; the prefill gives the first.
    assert stats.accepted + sum(stats.passes_per_image) == 3 * 63
    assert stats.draft_passes >= stats.forward_passes - 1


class Untouchable(TableModel):
    def start(self, conditions, guidance_scale=1.0):
        raise AssertionError("the model was called")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_draft": 0}, "max_draft 0: expected an integer >= 1"),
        ({"max_draft": 1.5}, "max_draft 1.5"),
        ({"stop_threshold": 1.5}, "stop_threshold 1.5: expected 0 <= stop_threshold <= 1"),
        ({"coupling": "independant"}, "unknown coupling 'independant': did you mean 'independent'"),
        ({"draft": 3}, "draft int: expected a model name"),
        ({"draft_guidance_scale": -1}, "guidance_scale -1"),
        ({}, "no draft: expected a token model"),
        ({"draft": "small"}, "draft 'small' is a name that is not loaded"),
        ({"draft": Untouchable(vocab_size=5)}, "a vocabulary of 5 tokens: expected a vocabulary of 4"),
        ({"draft": Untouchable(grid=(1, 4))}, r"the grid \(1, 4\): expected the grid None"),
        ({"draft": Untouchable(num_tokens=5)}, "images of 5 tokens: expected images of 4"),
    ],
)  # fmt: skip
def test_bad_input_before_any_model_call(options, message):
    with pytest.raises(InputError, match=message):
        get_sampler("draft", **options)(Untouchable(), [None], seeds=[0])


def test_a_calibration_with_too_few_weights():
    draft: Any = TableModel()
    draft.calibration = {"gumbel": (1.0, 2.0)}
    with pytest.raises(InputError, match="calibration of 'gumbel' has 2 weights: expected 4"):
        get_sampler("draft", draft=draft)


def test_a_pipeline_finds_the_draft(tmp_path, tiny_pipeline):
    draft = ARPipeline.from_model(tiny_llamagen(), calibration=WEIGHTS)
    draft.save_pretrained(tmp_path / "draft")
    expected = arvision.sample(tiny_pipeline, 1, "ar", progress=False)
    for given in (str(tmp_path / "draft"), tmp_path / "draft", draft, draft.model):
        out = arvision.sample(tiny_pipeline, 1, "draft", draft=given, progress=False)
        assert torch.equal(out.tokens, expected.tokens)
        assert out.stats.acceptance_rate > 0.99
    with pytest.raises(InputError, match="unknown model 'no-such-draft'"):
        arvision.sample(tiny_pipeline, 1, "draft", draft="no-such-draft", progress=False)
    with pytest.raises(InputError, match="no draft"):
        arvision.sample(tiny_pipeline, 1, "draft", progress=False)


def test_the_name_of_a_draft_is_saved_and_a_loaded_one_is_kept(tmp_path):
    name = "llamagen-fashion-draft"
    sampler = get_sampler("draft", draft=name, max_draft=3)
    sampler.save_pretrained(tmp_path)
    again = DraftSampler.from_pretrained(tmp_path)
    assert isinstance(again, DraftSampler)
    assert again.config["draft"] == name
    assert again.missing(None) == ["draft"]
    bound = get_sampler("draft", draft=TableModel())
    bound.save_pretrained(tmp_path)
    changed = bound.with_options(max_draft=2)
    assert isinstance(changed, DraftSampler)
    assert changed.missing(None) == []


def test_the_old_word_of_a_coupling_still_works_for_a_release(model):
    options = {"draft": disturbed(model, 0.3), "max_draft": 3}
    with pytest.warns(FutureWarning, match="coupling 'speculative' is called 'independent' now"):
        old = get_sampler("draft", coupling="speculative", **options)
    assert old.config["coupling"] == "independent"
    new = get_sampler("draft", coupling="independent", **options)
    maximal = get_sampler("draft", coupling="maximal", **options)
    tokens = [one(model, [0, 1], seeds=[3, 4]).tokens for one in (old, new, maximal)]
    assert torch.equal(tokens[0], tokens[1])
    # A calibration that was published with the old word is read as before.
    weights = {"gumbel": (1.0, 0, 0, 0), "speculative": (2.0, 0, 0, 0)}
    assert draft_model.Calibration(weights).weights["independent"] == (2.0, 0, 0, 0)
