"""SpecDec++ for text: a head that tells whether drafts are accepted, and chains that end by it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from text_models import random_prompts, text_folder, tiny_llama, walking_llama
from typer.testing import CliRunner

import arvision
from arvision import CheckpointError, InputError
from arvision.cli import app
from arvision.decoding.draft_model import StillLikely
from arvision.testing import law_p_value
from arvision.text.drafters import DraftTree
from arvision.text.drafters.papers.acceptance import AcceptanceHead
from arvision.text.fitting.acceptance import (
    AcceptanceTraining,
    acceptance_figures,
    drafted_tokens,
    train_acceptance,
)
from arvision.text.fitting.data import answer
from arvision.text.model import as_text_model
from arvision.training.loop import FitConfig

ALPHA = 1e-4


def test_a_row_goes_on_while_all_of_its_drafts_are_likely_accepted():
    likely = StillLikely(3, 0.7, torch.ones(1))
    likely.see(torch.tensor([0.9, 0.5, 0.2]))
    assert likely.going.tolist() == [True, True, False]
    likely.see(torch.tensor([0.9, 0.5, 1.0]))
    assert likely.going.tolist() == [True, False, False]


@pytest.fixture(scope="module")
def network():
    return walking_llama()


@pytest.fixture(scope="module")
def draft(network):
    """The target with a quarter of its tokens misread: what it drafts behind these is wrong."""
    other = copy.deepcopy(network)
    weight = other.model.embed_tokens.weight.data
    weight[48:] = weight[48:].flip(0)
    return other.eval()


@pytest.fixture(scope="module")
def answers(network):
    return answer(network, random_prompts([6] * 30, seed=9), num_tokens=40, progress=False)


@pytest.fixture(scope="module")
def fitted(network, draft, answers, tmp_path_factory):
    out = tmp_path_factory.mktemp("acceptance")
    training = AcceptanceTraining(
        rounds=4, fit=FitConfig(steps=150, batch_size=128, learning_rate=1e-2, warmup=5)
    )
    return train_acceptance(network, draft, answers, out, training, progress=False), out


def test_labels_are_what_the_target_says_of_the_drafts_own_tokens(network, draft, answers):
    greedy = drafted_tokens(network, draft, answers, AcceptanceTraining(), progress=False)
    assert set(greedy.accepted.unique().tolist()) == {0.0, 1.0}
    assert 0.5 < float(greedy.accepted.mean()) < 0.9
    drawn = AcceptanceTraining(temperature=1.0)
    same = drafted_tokens(network, network, answers, drawn, progress=False)
    assert torch.allclose(same.accepted, torch.ones(1))


def test_a_trained_head_tells_accepted_drafts_from_rejected_ones(network, draft, answers, fitted):
    """Against the constant prediction, which is what an untrained head gives."""
    figures, _ = fitted
    assert figures["nats"] < 0.7 * figures["blind"]
    assert figures["ranking"] > 0.85
    drafted = drafted_tokens(network, draft, answers, AcceptanceTraining(), progress=False)
    untrained = acceptance_figures(AcceptanceHead(32), drafted)
    assert untrained["ranking"] == 0.5


def test_chains_end_where_a_rejection_is_likely(network, draft, fitted):
    prompts = random_prompts([6] * 3, seed=10)
    plain = arvision.generate(network, prompts, max_new_tokens=30)

    def run(head):
        drafter = DraftTree(
            as_text_model(draft, 64), "chain", num_draft=8, max_depth=8, acceptance=head
        )
        found = [
            arvision.generate(network, [ids], drafter=drafter, max_new_tokens=30).stats
            for ids in prompts
        ]
        out = arvision.generate(network, prompts, drafter=drafter, max_new_tokens=30)
        assert out.tokens == plain.tokens
        passes = sum(stats.forward_passes for stats in found)
        return 3 * 29 / passes, sum(stats.candidates for stats in found) / (3 * 29)

    trained, untrained, fixed = run(fitted[1]), run(AcceptanceHead(32)), run(None)
    # Longer than chains that end after two drafts anyhow, with fewer candidates than all of eight.
    assert trained[0] > 1.15 * untrained[0]
    assert trained[1] < 0.8 * fixed[1]
    assert trained[0] > 0.85 * fixed[0]


def law_of_stopping_chains(rule, expansion):
    """How likely the texts are, where chains end behind drafts that the head calls unlikely."""
    target = tiny_llama(vocab_size=4, num_hidden_layers=2, sharpness=1.0)
    draft = tiny_llama(seed=3, vocab_size=4, num_hidden_layers=2, sharpness=1.0)
    texts = torch.cartesian_prod(*[torch.arange(4)] * 3)
    ids = torch.cat([torch.tensor([0, 1]).expand(64, 2), texts], dim=1)
    with torch.no_grad():
        logp = target(ids).logits[:, 1:-1].log_softmax(-1)
    joint = logp.gather(2, texts[..., None])[..., 0].sum(1).exp()
    torch.manual_seed(0)
    head = AcceptanceHead(32).double()
    torch.nn.init.normal_(head.confidence.weight, std=2.0)
    torch.nn.init.normal_(head.score.weight)
    drafter = DraftTree(
        as_text_model(draft, 16),
        expansion,
        branching=(1, 1, 1),
        max_depth=3,
        acceptance=head.float(),
        stop_threshold=0.5,
    )
    out = arvision.generate(
        target,
        [[0, 1]] * 2000,
        drafter=drafter,
        rule=rule,
        temperature=1.0,
        max_new_tokens=3,
    )
    assert out.stats.lossless
    found = (torch.tensor(out.tokens) * torch.tensor([16, 4, 1])).sum(1)
    return law_p_value(found, joint)


@pytest.mark.parametrize(
    ("rule", "expansion"),
    [("gumbel", "chain"), ("independent", "independent"), ("block", "independent")],
)
def test_chains_that_end_early_keep_the_law(rule, expansion):
    assert law_of_stopping_chains(rule, expansion) > ALPHA


def test_a_chain_that_takes_its_last_draft_back_does_not_keep_the_law(monkeypatch):
    """The head may look at a draft and end the chain behind it, never in front of it."""
    whole = DraftTree._likely_chain

    def mutant(self, root, law, lengths, num, round_number):
        tree = whole(self, root, law, lengths, num, round_number)
        unlikely = tree.logq.exp().gather(2, tree.tokens.clamp(min=0)[..., None])[..., 0] < 0.3
        kept = (~unlikely).cumprod(1).bool()
        return type(tree)(tree.tokens.where(kept, -1), tree.logq)

    monkeypatch.setattr(DraftTree, "_likely_chain", mutant)
    assert law_of_stopping_chains("independent", "independent") < ALPHA


def test_heads_are_checked(tmp_path):
    with pytest.raises(InputError, match="acceptance with expansion 'dyspec'"):
        DraftTree(as_text_model(tiny_llama(), 8), acceptance=AcceptanceHead(32))
    with pytest.raises(CheckpointError, match=r"no acceptance head of `arvision train-draft`"):
        AcceptanceHead.of(tmp_path)
    options = {"draft": tiny_llama(), "expansion": "chain", "acceptance": AcceptanceHead(16)}
    with pytest.raises(InputError, match="on a draft of width 16: this one has 32"):
        arvision.generate(
            tiny_llama(), [[1, 2]], drafter="draft_model", drafter_options=options, max_new_tokens=4
        )
    with pytest.raises(InputError, match=r"share 0\.9"):
        AcceptanceTraining(share=0.9)


def test_the_commands_fit_a_head_and_draft_with_it(tmp_path):
    folder = text_folder(tmp_path / "model")
    (tmp_path / "p.txt").write_text("ABC\nBCD\nCDE\n")
    common = [
        "train-draft",
        "--model",
        str(folder),
        "--prompts",
        str(tmp_path / "p.txt"),
        "--quiet",
    ]
    options = ["--kind", "acceptance", "--draft", str(folder), "--answer-tokens", "12"]
    out = ["--steps", "3", "--out", str(tmp_path / "stop"), "--json"]
    result = CliRunner().invoke(app, [*common, *options, *out])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["acceptance"] == 1.0  # the draft is the target
    run = ["generate", "--model", str(folder), "--prompt", "ABC", "--max-new-tokens", "8", "--json"]
    drafts = ["--draft", str(folder), "--option", "expansion=chain"]
    stop = ["--option", f"acceptance={tmp_path / 'stop'}"]
    found = json.loads(CliRunner().invoke(app, [*run, *drafts, *stop]).stdout)
    assert found["tokens"] == json.loads(CliRunner().invoke(app, run).stdout)["tokens"]
    with pytest.raises(InputError, match="draft None with kind 'acceptance': expected a draft"):
        CliRunner().invoke(app, [*common, "--kind", "acceptance", *out], catch_exceptions=False)
