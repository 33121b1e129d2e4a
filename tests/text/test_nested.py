"""A nested draft: one fit, exits that are models of their own, targets of several sizes (S2D)."""

from __future__ import annotations

import json

import pytest
import torch
from text_models import random_prompts, walking_llama
from transformers import AutoModelForCausalLM

import arvision
from arvision import InputError
from arvision.decoding.noise import Noise
from arvision.text.drafters import NestedExit
from arvision.text.fitting.data import answer
from arvision.text.fitting.nested import NestedTraining, exit_logits, train_nested
from arvision.text.fitting.small_model import small_copy
from arvision.text.generation import drafter_of
from arvision.text.layers import running_only
from arvision.text.model import as_text_model
from arvision.training.loop import FitConfig

FIT = FitConfig(steps=50, batch_size=4, learning_rate=5e-3, warmup=5, log_every=10)


@pytest.fixture(scope="module")
def targets():
    """Two targets of different sizes, both trained on the same walk, with its errors of their own."""
    return walking_llama(), walking_llama(hidden_size=48, num_hidden_layers=6)


@pytest.fixture(scope="module")
def folder(targets, tmp_path_factory):
    """A draft of three layers of the small target, fitted on the answers of both."""
    out = tmp_path_factory.mktemp("nested")
    prompts = random_prompts([6] * 16, seed=9)
    answers = [answer(one, prompts, num_tokens=40, progress=False) for one in targets]
    training = NestedTraining(share=0.75, fit=FIT)
    figures = train_nested(targets[0], None, answers, out, training, progress=False)
    (out / "figures.json").write_text(json.dumps(figures))
    return out


def test_one_draft_serves_two_targets(targets, folder):
    """Fitted once, it drafts for both, and more than the same layers unfitted, by a margin."""
    prompts = random_prompts([6] * 6, seed=10)
    fitted = as_text_model(AutoModelForCausalLM.from_pretrained(folder).eval(), 30)
    fresh = as_text_model(small_copy(targets[0], kept=range(3)).eval(), 30)
    for target in targets:
        plain = arvision.generate(target, prompts, max_new_tokens=30)
        passes = []
        for draft, exits in ((fresh, (1 / 3, 2 / 3, 1.0)), (fitted, None)):
            drafter = NestedExit(draft, exits=exits, confidence=0.3)
            out = arvision.generate(target, prompts, drafter=drafter, max_new_tokens=30)
            assert out.tokens == plain.tokens
            passes.append(out.stats.tokens_per_pass)
        assert passes[1] > passes[0] + 0.5
        options = {"temperature": 0.7, "max_new_tokens": 20}
        made = {"drafter": "nested_exit", "drafter_options": {"draft": fitted}}
        drawn = arvision.generate(target, prompts, **made, **options)
        assert drawn.tokens == arvision.generate(target, prompts, **options).tokens


def test_the_exit_follows_the_confidence(targets, folder):
    """Any confidence will do: the first exit speaks; none is enough: the whole draft does."""
    draft = as_text_model(AutoModelForCausalLM.from_pretrained(folder).eval(), 30)
    drafter = NestedExit(draft, confidence=0.0)
    assert drafter.exits == pytest.approx((1 / 3, 2 / 3, 1.0))
    arvision.generate(targets[1], random_prompts([6], seed=11), drafter=drafter, max_new_tokens=12)
    assert drafter.num_left[0] > 3
    assert drafter.num_left[1:] == [0, 0]
    drafter.start(Noise([0]), 64, 30)
    drafter.histories = [[5, 7]]
    drafter.begin(None)
    tokens = torch.tensor([[3, 9]])
    for confidence, number in ((0.0, 0), (2.0, 2)):
        drafter.confidence, before = confidence, list(drafter.num_left)
        law = drafter.law(tokens)
        assert drafter.num_left[number] == before[number] + 1
        wanted = drafter.state.draft(tokens, layers=range(number + 1))[:, -1].log_softmax(-1)
        torch.testing.assert_close(law, wanted)


def test_a_pass_that_leaves_early_is_that_of_its_layers(targets):
    """What stands behind an exit is what the network of these layers says, and no layer runs more."""
    network = targets[1]
    ids = torch.tensor([[3, 9, 4, 11]])
    behind = exit_logits(network, [2, 4, 6], ids)
    for exit, found in zip([2, 4, 6], behind, strict=True):
        with running_only(network, range(exit)):
            torch.testing.assert_close(network(ids, use_cache=False).logits[0], found)
    ran = []
    handle = network.model.layers[3].mlp.register_forward_hook(lambda *_: ran.append(1))
    try:
        for leaves, expected in ((True, 0), (False, 1)):
            ran.clear()
            with running_only(network, range(6), {2: lambda _, leaves=leaves: leaves}):
                out = network(ids, use_cache=False).logits[0]
            assert len(ran) == expected
            torch.testing.assert_close(out, behind[0 if leaves else 2])
    finally:
        handle.remove()
    torch.testing.assert_close(network(ids, use_cache=False).logits[0], behind[2])


def test_the_folder_tells_what_it_is(folder):
    assert drafter_of(folder) == ("nested_exit", "draft")
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["exits"] == [1, 2, 3]
    assert figures["agreement"][-1] > 0.5


def test_bad_input_has_one_clear_message(targets):
    with pytest.raises(InputError, match="a draft without exits in its configuration"):
        NestedExit(as_text_model(targets[0], 8))
    with pytest.raises(InputError, match="shares that ascend to 1"):
        NestedTraining(exits=(0.5, 0.25, 1.0))
    with pytest.raises(InputError, match="a draft of 4 layers for a target of 4"):
        train_nested(targets[0], None, [], "none", NestedTraining(share=0.99), progress=False)
