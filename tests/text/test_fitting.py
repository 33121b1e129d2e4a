"""Drafts fitted on a frozen target: they learn, resume, load, and never change the text.

What is learnt is measured on prompts that no fit has seen, against the same module untrained, on a
target whose answers do not loop. Margins are half of the gains that were measured, or less.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from text_models import greedy_reference, random_prompts, walking_llama

import arvision
from arvision import CheckpointError, InputError
from arvision.text.drafters import HeadDrafter
from arvision.text.drafters.heads import KINDS, load_heads, make_heads
from arvision.text.fitting.data import answer, frequent_tokens, head_examples, hidden_states
from arvision.text.fitting.heads import HeadObjective, HeadTraining, train_heads
from arvision.text.fitting.small_model import small_copy, train_small_model
from arvision.training.loop import FitConfig

FIT = FitConfig(steps=120, batch_size=64, learning_rate=1e-2, warmup=5, log_every=10)


@pytest.fixture(scope="module")
def network():
    return walking_llama()


@pytest.fixture(scope="module")
def prompts():
    return random_prompts([6] * 24, seed=9)


@pytest.fixture(scope="module")
def answers(network, prompts):
    return answer(network, prompts, num_tokens=40, batch_size=8, progress=False)


@pytest.fixture(scope="module")
def unseen():
    return random_prompts([6] * 6, seed=10)


@pytest.fixture(scope="module")
def unseen_answers(network, unseen):
    return answer(network, unseen, num_tokens=40, batch_size=6, progress=False)


@pytest.fixture
def tokens_per_pass(network, unseen, unseen_answers):
    """Measures a drafter on greedy text of 30 tokens, which must be the target's own."""

    def measure(drafter, **options) -> float:
        out = arvision.generate(network, unseen, drafter=drafter, max_new_tokens=30, **options)
        assert out.tokens == [text[6:36] for text in unseen_answers.texts]
        return out.stats.tokens_per_pass

    return measure


def test_the_targets_answers_do_not_loop(unseen_answers):
    for text in unseen_answers.texts:
        # 39 steps, of which few are wrong and may jump back once.
        assert len(set(itertools.pairwise(text[6:]))) > 25


def test_answers_are_the_targets_own(network, prompts, answers):
    assert answers.texts[3] == prompts[3] + greedy_reference(network, prompts[3], 40)
    assert answers.starts == [6] * 24


def test_examples_hold_the_states_and_tokens_of_their_places(network, answers):
    examples = head_examples(network, answers, 2, progress=False)
    per_text = 40 - 2
    assert len(examples.places) == 24 * per_text
    states = hidden_states(network, answers.texts[1])
    # The first place of the second text: its prompt's last token; and the first text's last place.
    found = examples.rows(torch.tensor([per_text, per_text - 1]))
    assert found["tokens"].tolist() == [answers.texts[1][6:9], answers.texts[0][-3:]]
    torch.testing.assert_close(found["hidden"][0].float(), states[5:8], rtol=0, atol=2e-2)


@pytest.mark.parametrize("num_heads", [1, 4])
def test_every_hidden_state_is_stored_once(network, answers, num_heads):
    """Two bytes a number, however many heads look at it; nothing of the prompts."""
    examples = head_examples(network, answers, num_heads, progress=False)
    stored = sum(part.untyped_storage().nbytes() for part in (examples.hidden, examples.tokens))
    assert stored == 24 * 40 * (32 * 2 + 8)


def test_frequent_tokens(answers):
    common = frequent_tokens(answers, 5)
    assert len(common) == 5
    assert common.tolist() == sorted(common.tolist())


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_heads_learn_resume_and_keep_the_text(
    kind, network, prompts, answers, unseen_answers, tokens_per_pass, tmp_path
):
    training = HeadTraining(kind=kind, num_heads=2, num_vocabulary=60, fit=FIT)
    train_heads(network, answers, tmp_path / "a", training, progress=False)
    fresh = make_heads(kind, 32, 2)
    heads, vocabulary = load_heads(tmp_path / "a")
    assert type(heads) is type(fresh)
    assert len(vocabulary) == 60
    examples = head_examples(network, unseen_answers, 2, progress=False)
    weights = network.model.embed_tokens.weight, network.lm_head.weight
    agreement = [
        HeadObjective(one, examples, *weights, training).agreement(torch.arange(6 * 38))[0]
        for one in (fresh, heads)
    ]
    assert agreement[1] > agreement[0] + 0.15
    for shape, margin in (("tree", 0.3), ("unit", 0.1)):
        passes = [
            tokens_per_pass(HeadDrafter(one, shape=shape, threshold=0.05))
            for one in (fresh, tmp_path / "a")
        ]
        assert passes[1] > passes[0] + margin
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


def test_online_updates_make_heads_better(network, prompts, tokens_per_pass):
    torch.manual_seed(0)
    heads = make_heads("hydra", 32, 2)
    drafter = HeadDrafter(copy.deepcopy(heads), online=1e-2, every=8)
    first = tokens_per_pass(HeadDrafter(heads))
    for _ in range(10):
        arvision.generate(network, prompts[:12], drafter=drafter, max_new_tokens=30)
    assert drafter.num_updates > 10
    assert tokens_per_pass(drafter) > first + 0.05


def test_a_small_model_drafts_for_its_target(network, answers, tokens_per_pass, tmp_path):
    fit = FitConfig(steps=40, batch_size=4, learning_rate=1e-2, warmup=2)
    figures = train_small_model(
        network, None, answers, tmp_path / "small", share=0.5, config=fit, progress=False
    )
    assert figures["layers"] == 2
    from transformers import AutoModelForCausalLM

    draft = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    passes = [
        tokens_per_pass("draft_model", drafter_options={"draft": one})
        for one in (small_copy(network, 0.5).eval(), draft)
    ]
    assert passes[1] > passes[0] + 1.0


def test_bad_input_has_one_clear_message(network, answers, tmp_path):
    with pytest.raises(CheckpointError, match="no heads of `arvision train-draft`"):
        load_heads(tmp_path)
    with pytest.raises(InputError, match="unknown kind of heads 'medussa': did you mean 'medusa'"):
        make_heads("medussa", 8, 2)
    with pytest.raises(InputError, match="unknown divergence"):
        HeadTraining(divergence="l2")
    with pytest.raises(InputError, match="heads of width 8: the model has 32"):
        arvision.generate(network, [[1, 2]], drafter=HeadDrafter(make_heads("medusa", 8, 2)))
