"""`model.generate(..., custom_generate=arvision.custom_generate)` answers as plain `generate` does."""

from __future__ import annotations

import pytest
import torch
from text_models import random_prompts, tiny_llama

import arvision
from arvision import InputError


@pytest.fixture(scope="module")
def network():
    return tiny_llama()


def padded(lengths):
    rows = random_prompts(lengths)
    longest = max(lengths)
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("drafter", ["prompt_lookup+token_recycling", "jacobi", None])
def test_greedy_answers_are_those_of_generate(network, drafter):
    inputs = padded([5, 9, 7])
    plain = network.generate(**inputs, max_new_tokens=20, do_sample=False)
    ours = network.generate(
        **inputs,
        max_new_tokens=20,
        do_sample=False,
        custom_generate=arvision.custom_generate,
        drafter=drafter,
    )
    assert torch.equal(ours, plain)


def test_end_tokens_pad_the_shorter_rows(network):
    inputs = padded([6, 6])
    plain = network.generate(**inputs, max_new_tokens=24, do_sample=False)
    end = int(plain[0, 6 + 4])
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": end, "pad_token_id": 1}
    network.generation_config.eos_token_id = end
    try:
        plain = network.generate(**inputs, **options)
        ours = network.generate(**inputs, **options, custom_generate=arvision.custom_generate)
    finally:
        network.generation_config.eos_token_id = None
    assert torch.equal(ours, plain)


def test_sampling_follows_the_seed_of_torch(network):
    inputs = padded([6])
    options = {
        **inputs,
        "max_new_tokens": 12,
        "do_sample": True,
        "temperature": 1.5,
        "top_k": 20,
        "custom_generate": arvision.custom_generate,
        "return_dict_in_generate": True,
    }
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(network.generate(**options).sequences)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams 2: expected 1"),
        ({"repetition_penalty": 1.2}, "logits processor RepetitionPenaltyLogitsProcessor"),
        ({"max_time": 1.0}, "stopping criterion MaxTimeCriteria"),
        ({"output_scores": True}, "output_scores: not kept"),
        ({"drafter": "nothing"}, "nothing"),
    ],
)
def test_what_has_no_counterpart_is_refused(network, options, message):
    with pytest.raises(InputError, match=message):
        network.generate(
            **padded([5]),
            max_new_tokens=4,
            do_sample=False,
            custom_generate=arvision.custom_generate,
            **options,
        )
