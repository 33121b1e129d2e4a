"""Drafts fitted on a frozen target: they learn, resume, load, and never change the text."""

from __future__ import annotations

import pytest
import torch
from text_models import greedy_reference, random_prompts, tiny_llama

import arvision
from arvision import CheckpointError, InputError
from arvision.text.drafters import HeadDrafter, PseudoDrafter
from arvision.text.drafters.heads import KINDS, load_heads, make_heads
from arvision.text.drafters.papers.pseudo import load_pseudo, make_pseudo, pseudo_layout
from arvision.text.fitting.data import answer, frequent_tokens, head_examples, hidden_states
from arvision.text.fitting.heads import HeadTraining, train_heads
from arvision.text.fitting.pseudo import PseudoTraining, train_pseudo
from arvision.text.fitting.small_model import train_small_model
from arvision.training.loop import FitConfig

FIT = FitConfig(steps=40, batch_size=64, learning_rate=1e-2, warmup=5, log_every=10)


@pytest.fixture(scope="module")
def network():
    return tiny_llama(num_hidden_layers=4).float().requires_grad_(False)


@pytest.fixture(scope="module")
def prompts():
    return random_prompts([6] * 24, seed=9)


@pytest.fixture(scope="module")
def answers(network, prompts):
    return answer(network, prompts, num_tokens=40, batch_size=8, progress=False)


def test_answers_are_the_targets_own(network, prompts, answers):
    assert answers.texts[3] == prompts[3] + greedy_reference(network, prompts[3], 40)
    assert answers.starts == [6] * 24


def test_examples_hold_the_states_and_tokens_of_their_places(network, answers):
    examples = head_examples(network, answers, 2, progress=False)
    per_text = 40 - 2
    assert examples.hidden.shape == (24 * per_text, 3, 32)
    states = hidden_states(network, answers.texts[1])
    first = per_text  # the first place of the second text: its prompt's last token
    assert examples.tokens[first].tolist() == answers.texts[1][6:9]
    torch.testing.assert_close(examples.hidden[first].float(), states[5:8], rtol=0, atol=2e-2)
    common = frequent_tokens(answers, 5)
    assert len(common) == 5
    assert common.tolist() == sorted(common.tolist())


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_heads_learn_resume_and_keep_the_text(kind, network, prompts, answers, tmp_path):
    training = HeadTraining(kind=kind, num_heads=2, num_vocabulary=48, fit=FIT)
    figures = train_heads(network, answers, tmp_path / "a", training, progress=False)
    fresh = make_heads(kind, 32, 2)
    heads, vocabulary = load_heads(tmp_path / "a")
    assert type(heads) is type(fresh)
    assert figures["agreement"][0] > 0.2
    assert len(vocabulary) <= 48
    expected = [greedy_reference(network, ids, 30) for ids in prompts[:3]]
    passes = {}
    for shape in ("tree", "unit"):
        drafter = HeadDrafter(tmp_path / "a", shape=shape, threshold=0.05)
        out = arvision.generate(network, prompts[:3], drafter=drafter, max_new_tokens=30)
        assert out.tokens == expected
        passes[shape] = out.stats.tokens_per_pass
    assert passes["tree"] > 1.2
    plain = {"max_new_tokens": 30, "temperature": 0.9, "seed": 4}
    drawn = arvision.generate(network, prompts[:2], drafter=HeadDrafter(tmp_path / "a"), **plain)
    assert drawn.tokens == arvision.generate(network, prompts[:2], **plain).tokens


def test_an_interrupted_fit_ends_where_an_uninterrupted_one_does(network, answers, tmp_path):
    from arvision.training import loop

    training = HeadTraining(kind="medusa", num_heads=1, num_vocabulary=48, fit=FIT)
    whole = train_heads(network, answers, tmp_path / "whole", training, progress=False)
    fit = loop.fit

    def stops(objective, config, folder, **options):
        return fit(objective, config, folder, progress=options["progress"], stop_after=15)

    import arvision.text.fitting.heads as module

    module.fit = stops
    try:
        train_heads(network, answers, tmp_path / "part", training, progress=False)
    finally:
        module.fit = fit
    again = train_heads(network, answers, tmp_path / "part", training, progress=False)
    assert again["agreement"] == whole["agreement"]
    for a, b in zip(
        load_heads(tmp_path / "whole")[0].parameters(),
        load_heads(tmp_path / "part")[0].parameters(),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_online_updates_make_heads_better(network, prompts):
    torch.manual_seed(0)
    drafter = HeadDrafter(make_heads("hydra", 32, 2), online=1e-2, every=24)
    first = arvision.generate(network, prompts[:4], drafter=drafter, max_new_tokens=30)
    for _ in range(6):
        arvision.generate(network, prompts[:12], drafter=drafter, max_new_tokens=30)
    assert drafter.num_updates > 5
    last = arvision.generate(network, prompts[:4], drafter=drafter, max_new_tokens=30)
    assert last.tokens == first.tokens
    assert last.stats.tokens_per_pass > first.stats.tokens_per_pass


def test_pseudo_tokens_stand_behind_every_place():
    parents, owners, numbers = pseudo_layout(1, 2)
    assert parents == [-1, -1, 1, 0, 3]
    assert owners == [0, 1, 0, 0, 1, 1]
    assert numbers == [-1, -1, 0, 1, 0, 1]


@pytest.mark.parametrize("kind", ["ppd", "hidden_transfer"])
def test_pseudo_tokens_learn_and_keep_the_text(kind, network, prompts, answers, tmp_path):
    fit = FitConfig(steps=30, batch_size=4, learning_rate=3e-2, warmup=3, log_every=1)
    training = PseudoTraining(kind=kind, num_guesses=2, num_places=8, length=40, fit=fit)
    before = [parameter.clone() for parameter in network.parameters()]
    figures = train_pseudo(network, answers, tmp_path / "p", training, progress=False)
    assert all(map(torch.equal, before, network.parameters()))
    log = (tmp_path / "p" / "fit" / "log.jsonl").read_text().splitlines()
    assert figures["loss"] < float(log[0].split('"loss": ')[1].split(",")[0])
    expected = [greedy_reference(network, ids, 30) for ids in prompts[:3]]
    drafter = PseudoDrafter(tmp_path / "p")
    out = arvision.generate(network, prompts[:3], drafter=drafter, max_new_tokens=30)
    assert out.tokens == expected
    assert out.stats.tokens_per_pass > 1.05
    with pytest.raises(InputError, match=r"rule 'multi_round' with PseudoDrafter"):
        arvision.generate(
            network, prompts[:1], drafter=drafter, rule="multi_round", temperature=1.0
        )


def test_a_small_model_drafts_for_its_target(network, prompts, answers, tmp_path):
    fit = FitConfig(steps=20, batch_size=4, learning_rate=1e-3, warmup=2)
    figures = train_small_model(
        network, None, answers, tmp_path / "small", share=0.5, config=fit, progress=False
    )
    assert figures["layers"] == 2
    from transformers import AutoModelForCausalLM

    draft = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    out = arvision.generate(
        network,
        prompts[:2],
        drafter="draft_model",
        drafter_options={"draft": draft},
        max_new_tokens=30,
    )
    assert out.tokens == [greedy_reference(network, ids, 30) for ids in prompts[:2]]
    assert out.stats.tokens_per_pass > 1.2


def test_bad_input_has_one_clear_message(network, answers, tmp_path):
    with pytest.raises(CheckpointError, match="no heads of `arvision train-draft`"):
        load_heads(tmp_path)
    with pytest.raises(CheckpointError, match="no pseudo tokens"):
        load_pseudo(tmp_path)
    with pytest.raises(InputError, match="unknown kind of heads 'medussa': did you mean 'medusa'"):
        make_heads("medussa", 8, 2)
    with pytest.raises(InputError, match="unknown divergence"):
        HeadTraining(divergence="l2")
    with pytest.raises(InputError, match="heads of width 8: the model has 32"):
        arvision.generate(network, [[1, 2]], drafter=HeadDrafter(make_heads("medusa", 8, 2)))
    with pytest.raises(InputError, match="pseudo tokens of width 8"):
        arvision.generate(network, [[1, 2]], drafter=PseudoDrafter(make_pseudo("ppd", 8, 2, 0)))
    with pytest.raises(InputError, match="expected shorter prompts or longer answers"):
        train_pseudo(network, answers, tmp_path, PseudoTraining(length=8), progress=False)
