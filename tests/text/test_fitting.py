"""Drafts fitted on a frozen target: they learn, resume, load, and never change the text.

What is learnt is measured on prompts that no fit has seen, against the same module untrained, on a
target whose answers do not loop. Margins are half of the gains that were measured, or less.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from text_models import greedy_reference, random_prompts, walking_llama

import arvision
from arvision import CheckpointError, InputError
from arvision.decoding.tree import best_tree
from arvision.text import HFCausalLM
from arvision.text.drafters import DraftTree, Eagle3, HeadDrafter, PseudoDrafter
from arvision.text.drafters.head_drafter import RANKS
from arvision.text.drafters.heads import KINDS, PrefixHeads, load_heads, make_heads
from arvision.text.drafters.papers.pseudo import load_pseudo, make_pseudo, pseudo_layout
from arvision.text.fitting.data import (
    answer,
    frequent_tokens,
    head_examples,
    hidden_states,
    read_texts,
)
from arvision.text.fitting.eagle3 import make_eagle3
from arvision.text.fitting.heads import HeadObjective, HeadTraining, train_heads
from arvision.text.fitting.pseudo import PseudoObjective, PseudoTraining, train_pseudo
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
    fresh = make_heads(kind, 32, 2)
    reads = isinstance(fresh, PrefixHeads)
    fit = replace(FIT, batch_size=8) if reads else FIT
    training = HeadTraining(kind=kind, num_heads=2, num_vocabulary=60, fit=fit)
    train_heads(network, answers, tmp_path / "a", training, progress=False)
    heads, vocabulary = load_heads(tmp_path / "a")
    assert type(heads) is type(fresh)
    assert len(vocabulary) == 60
    if reads:
        examples = read_texts(network, unseen_answers, 192, least=3, progress=False)
    else:
        examples = head_examples(network, unseen_answers, 2, progress=False)
    weights = network.model.embed_tokens.weight, network.lm_head.weight
    accuracies = []
    for one in (fresh, heads):
        judge = HeadObjective(one, examples, *weights, training)
        accuracies.append(judge.accuracies(torch.arange(judge.num_items)))
    assert accuracies[1][0][0] > accuracies[0][0][0] + 0.15
    assert [len(row) for row in heads.accuracies] == [10, 10]
    assert heads.accuracies[0][0] > accuracies[0][0][0] + 0.15
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


def test_online_updates_make_heads_better_and_are_saved(
    network, prompts, tokens_per_pass, tmp_path
):
    torch.manual_seed(0)
    heads = make_heads("hydra", 32, 2)
    drafter = HeadDrafter(heads, online=1e-2, every=16, capacity=400)
    assert drafter.replay is not None
    before = [parameter.clone() for parameter in heads.parameters()]
    first = tokens_per_pass(HeadDrafter(heads))
    for _ in range(12):
        arvision.generate(network, prompts[:12], drafter=drafter, max_new_tokens=30)
    # Drafts end in nearly every pass of a row, until they are mostly right.
    assert drafter.replay.num_updates > 40
    assert len(drafter.replay) == 400
    drafter.save(tmp_path)
    saved = tokens_per_pass(HeadDrafter(tmp_path)); print("HH", first, saved)
    assert saved > first + 0.4
    assert all(map(torch.equal, before, heads.parameters()))


def test_online_updates_make_a_draft_model_better_and_are_saved(
    network, prompts, tokens_per_pass, tmp_path
):
    draft = HFCausalLM(small_copy(network, 0.5).eval(), 40)
    drafter = DraftTree(draft, "chain", 3, 3, online=5e-3, every=16, capacity=300)
    assert drafter.learner is not None
    first = tokens_per_pass(DraftTree(draft, "chain", 3, 3))
    for _ in range(6):
        arvision.generate(network, prompts[:12], drafter=drafter, max_new_tokens=30)
    assert drafter.learner.replay.num_updates > 15
    drafter.save(tmp_path)
    saved = tokens_per_pass(
        "draft_model",
        drafter_options={"draft": str(tmp_path), "expansion": "chain", "num_draft": 3},
    )
    print("HH", first, saved); assert saved > first + 0.3
    with pytest.raises(InputError, match=r"expected a rate in \(0, 1\), and float32"):
        DraftTree(HFCausalLM(small_copy(network, 0.5).bfloat16()), online=1e-3)
    with pytest.raises(InputError, match="expected a language model of transformers"):
        Eagle3(make_eagle3(network, torch.arange(60)), online=1e-3)


def test_the_tree_of_heads_follows_from_what_was_measured():
    """A first head that is always right and a second one that is right once in its second guess."""
    heads = make_heads("medusa", 32, 2)
    assert HeadDrafter(heads).ranks == RANKS
    heads.accuracies = ((1.0, 0.0), (0.5, 0.5))
    assert best_tree(HeadDrafter(heads).ranks, 3, 2).tolist() == [-1, 0, 0]
    assert HeadDrafter(heads, ranks=(0.9, 0.1)).ranks == (0.9, 0.1)
    # Of all trees of 4 candidates none has more expected tokens.
    by_level = ((0.6, 0.25, 0.1), (0.45, 0.3, 0.05))
    parents = best_tree(by_level, 4, 2).tolist()
    assert tree_value(parents, by_level) == pytest.approx(
        max(
            tree_value([-1, *rest], by_level)
            for rest in itertools.product((-1, 0, 1, 2), repeat=3)
            if all(above <= place for place, above in enumerate(rest))
        )
    )


def tree_value(parents, by_level):
    """Expected accepted drafts of a tree, if ranks are right with these probabilities; 0 if it has
    a candidate that the ranks do not speak of."""
    values, depths, seen = {-1: 1.0}, {-1: -1}, dict.fromkeys(range(-1, 9), 0)
    for node, parent in enumerate(parents):
        depths[node] = depths[parent] + 1
        if depths[node] >= len(by_level) or seen[parent] >= len(by_level[0]):
            return 0.0
        values[node] = values[parent] * by_level[depths[node]][seen[parent]]
        seen[parent] += 1
    return sum(values.values()) - 1


def test_pseudo_tokens_stand_behind_every_place():
    parents, owners, numbers = pseudo_layout(1, 2)
    assert parents == [-1, -1, 1, 0, 3]
    assert owners == [0, 1, 0, 0, 1, 1]
    assert numbers == [-1, -1, 0, 1, 0, 1]


@pytest.mark.parametrize("kind", ["ppd", "hidden_transfer"])
def test_pseudo_tokens_learn_and_keep_the_text(
    kind, network, prompts, answers, unseen_answers, tokens_per_pass, tmp_path
):
    fit = FitConfig(steps=60, batch_size=4, learning_rate=3e-2, warmup=3, log_every=1)
    training = PseudoTraining(kind=kind, num_guesses=2, num_places=8, length=40, fit=fit)
    before = [parameter.clone() for parameter in network.parameters()]
    figures = train_pseudo(network, answers, tmp_path / "p", training, progress=False)
    assert all(map(torch.equal, before, network.parameters()))
    log = (tmp_path / "p" / "fit" / "log.jsonl").read_text().splitlines()
    assert figures["loss"] < float(log[0].split('"loss": ')[1].split(",")[0])
    trained = load_pseudo(tmp_path / "p")
    fresh = make_pseudo(kind, 32, 2, trained.layer)
    # Two vectors of 32 numbers (ppd) cannot turn many guesses, but bring their laws nearer.
    losses = []
    for one in (fresh, trained):
        objective = PseudoObjective(one, network, unseen_answers, training)
        loss = objective(torch.arange(6), torch.Generator().manual_seed(0))["loss"]
        losses.append(loss.item())
    drafter = PseudoDrafter(trained)
    passes = [tokens_per_pass(one) for one in (PseudoDrafter(fresh), drafter)]
    assert losses[1] < losses[0] - (0.6 if kind == "ppd" else 3.0)
    assert passes[1] > passes[0] + (-0.1 if kind == "ppd" else 0.2)
    with pytest.raises(InputError, match=r"rule 'multi_round' with PseudoDrafter"):
        arvision.generate(
            network, prompts[:1], drafter=drafter, rule="multi_round", temperature=1.0
        )


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
