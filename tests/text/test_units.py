"""Lexical units (LUD): a target trained to say several tokens at once, unseen or verified."""

from __future__ import annotations

import copy

import pytest
import torch
from text_models import random_prompts, repeating_llama

import arvision
from arvision import InputError
from arvision.text.drafters import PseudoDrafter
from arvision.text.drafters.papers.pseudo import load_pseudo, make_pseudo
from arvision.text.fitting.data import answer
from arvision.text.fitting.units import UnitObjective, UnitTraining, confidences, train_units
from arvision.text.generation import drafter_of
from arvision.training.loop import FitConfig

FIT = FitConfig(steps=40, batch_size=4, learning_rate=3e-3, warmup=5, log_every=10)


def twice(num, seed):
    """Prompts that say five tokens twice, for a target that goes on doing so."""
    return [ids * 2 for ids in random_prompts([5] * num, seed=seed, vocab=32)]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The target as it was, the tuned one, and the folder of the fit."""
    network = repeating_llama()
    own = copy.deepcopy(network)
    folder = tmp_path_factory.mktemp("units")
    answers = answer(network, twice(16, seed=9), num_tokens=30, progress=False)
    training = UnitTraining(num_guesses=2, threshold=0.5, length=40, fit=FIT)
    train_units(network, None, answers, folder, training, progress=False)
    return own, network, folder


def test_units_end_where_the_target_was_not_sure():
    training = UnitTraining(num_guesses=3, threshold=0.5, num_places=20)
    sure = torch.tensor([1.0, 1.0, 0.1, 0.9, 0.8, 0.2, 0.9, 0.9, 0.9, 0.9])
    text = list(range(10, 20))
    objective = UnitObjective(None, make_pseudo("lud", 8, 3), [(text, 1)], [sure], training)
    inputs = objective.inputs(torch.tensor([0]), torch.Generator().manual_seed(0))
    found = dict(zip(inputs["places"][0].tolist(), inputs["wanted"][0].tolist(), strict=True))
    # Behind place 0 comes token 1 by itself; 2 is not sure, and ends the unit.
    assert found[0] == [12, -100, -100]
    assert found[1] == [13, 14, 15]
    assert found[2] == [14, 15, -100]
    assert found[4] == [16, 17, 18]


def test_the_confidences_are_the_targets(tuned):
    own, _, _ = tuned
    (told,) = confidences(own, [([5, 9, 11], 1)])
    law = own(torch.tensor([[5, 9, 11]])).logits.softmax(-1)[0]
    torch.testing.assert_close(told, torch.stack([torch.tensor(1.0), law[0, 9], law[1, 11]]))


def test_units_are_learnt_verified_exactly_and_trusted_if_asked(tuned):
    """Verified, the text is the tuned target's own; margins are half of what was measured or less."""
    own, network, folder = tuned
    prompts = twice(6, seed=10)
    options = {"max_new_tokens": 30}
    passes = []
    for target, module in ((own, make_pseudo("lud", 32, 2, threshold=0.5)), (network, str(folder))):
        out = arvision.generate(target, prompts, drafter=PseudoDrafter(module), **options)
        assert out.tokens == arvision.generate(target, prompts, **options).tokens
        assert out.stats.lossless
        passes.append(out.stats.tokens_per_pass)
    print(passes)
    assert passes[1] > passes[0] + 0.3
    drafter = PseudoDrafter(str(folder))
    drawn = arvision.generate(network, prompts, drafter=drafter, temperature=0.8, **options)
    assert drawn.tokens == arvision.generate(network, prompts, temperature=0.8, **options).tokens

    plain = arvision.generate(network, prompts, **options).tokens
    trusted = arvision.generate(network, prompts, drafter=drafter, rule="unverified", **options)
    assert not trusted.stats.lossless
    assert trusted.stats.tokens_per_pass >= passes[1]
    # Pads stand behind the last token of a unit alone.
    assert trusted.stats.candidates / trusted.stats.forward_passes < 6 * (1 + 2 + 2)
    doubtful = PseudoDrafter(str(folder), threshold=1.0)
    out = arvision.generate(network, prompts, drafter=doubtful, rule="unverified", **options)
    assert out.tokens == plain


def test_the_folder_is_a_model_and_its_draft(tuned):
    _, network, folder = tuned
    assert drafter_of(folder) == ("pseudo", "module")
    assert load_pseudo(folder).threshold == 0.5
    from transformers import AutoModelForCausalLM

    saved = AutoModelForCausalLM.from_pretrained(folder).eval()
    out = arvision.generate(saved, [[1, 2, 3]], max_new_tokens=8)
    assert out.tokens == arvision.generate(network, [[1, 2, 3]], max_new_tokens=8).tokens


def test_unseen_drafts_need_a_confidence(tuned):
    own, _, _ = tuned
    with pytest.raises(InputError, match="rule 'unverified' with PromptLookup: its drafts hold no"):
        arvision.generate(own, [[1, 2]], drafter="prompt_lookup", rule="unverified")
    drafter = PseudoDrafter(make_pseudo("ppd", 32, 2))
    with pytest.raises(InputError, match="rule 'unverified' with PseudoDrafter: expected one of"):
        arvision.generate(own, [[1, 2]], drafter=drafter, rule="unverified")
    with pytest.raises(InputError, match="threshold 1"):
        UnitTraining(threshold=1.0)
