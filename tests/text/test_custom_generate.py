"""`model.generate(..., custom_generate=arvision.custom_generate)` answers as plain `generate` does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forms import covered
from text_models import greedy_reference, random_prompts, tiny_llama
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

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
        ({"guidance_scale": 1.5}, "UnbatchedClassifierFreeGuidanceLogitsProcessor cannot act"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens: another way of decoding"),
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


class Rotating(LogitsProcessor):
    """Forbids a token that depends on everything before it."""

    def __call__(self, input_ids, scores):
        """Scores [N, V] after ids [N, L]."""
        barred = (input_ids.sum(1) + input_ids[:, -1] * 3) % scores.shape[1]
        return scores.scatter(1, barred[:, None], float("-inf"))


class TopPLogitsWarper(LogitsProcessor):
    """A user's own class that happens to have a known name: the least likely token first."""

    def __call__(self, input_ids, scores):
        """Scores [N, V] turned around."""
        return -scores


class SawSum(StoppingCriteria):
    """Ends a row when its ids add up to a multiple of seven."""

    def __call__(self, input_ids, scores, **_):
        """Which rows [N] end."""
        return input_ids.sum(1) % 7 == 0


CONSTRAINTS: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.8},
    "ngrams": {"no_repeat_ngram_size": 2},
    "suppress": {"suppress_tokens": list(range(20, 50)), "begin_suppress_tokens": [3, 5, 7]},
    "bad words": {"bad_words_ids": [[5], [9, 4], [12, 13, 14]]},
    "forced": {"forced_bos_token_id": 3, "forced_eos_token_id": 9, "repetition_penalty": 1.3},
    "least length": {"min_new_tokens": 12, "eos_token_id": list(range(0, 60, 2))},
    "decay": {"exponential_decay_length_penalty": (4, 1.3), "eos_token_id": 8},
    "bias": {"sequence_bias": {(4, 9): 90.0, (7,): 40.0}},
}


@pytest.mark.parametrize(
    ("name", "drafter"),
    covered(sorted(CONSTRAINTS), ["prompt_lookup+token_recycling", "jacobi"]),
)
def test_what_a_generation_config_asks_for_acts_on_every_candidate(network, name, drafter):
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, **CONSTRAINTS[name]}
    inputs = padded([5, 9, 7])
    plain = network.generate(**inputs, **options)
    free = network.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert not torch.equal(plain, free)
    ours = network.generate(
        **inputs, **options, custom_generate=arvision.custom_generate, drafter=drafter
    )
    assert torch.equal(ours, plain)
    # `arvision.generate` reads the same from the model itself.
    network.generation_config.update(**CONSTRAINTS[name])
    try:
        for row in random_prompts([5, 9, 7]):
            expected = greedy_reference(network, row, 20)
            out = arvision.generate(network, [row], drafter=drafter, max_new_tokens=20)
            assert out.tokens[0] == expected
    finally:
        network.generation_config = tiny_llama().generation_config


@pytest.mark.parametrize(
    "given",
    [
        {"logits_processor": LogitsProcessorList([Rotating()])},
        {"logits_processor": LogitsProcessorList([TopPLogitsWarper()])},
        {"stopping_criteria": StoppingCriteriaList([SawSum()])},
        {
            "prefix_allowed_tokens_fn": lambda row, ids: [
                row,
                int(ids[-1]) // 2,
                int(ids.sum()) % 64,
            ]
        },
        {"eos_token_id": list(range(0, 64, 5))},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_the_caller_passes_acts(network, given):
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 1, **given}
    inputs = padded([5, 9, 7])
    plain = network.generate(**inputs, **options)
    assert not torch.equal(plain, network.generate(**inputs, max_new_tokens=20, do_sample=False))
    ours = network.generate(**inputs, **options, custom_generate=arvision.custom_generate)
    assert torch.equal(ours, plain)


def test_warpers_that_have_no_twin_here_act_on_draws(network):
    """min_p leaves so few tokens that the draws show it."""
    out = network.generate(
        **padded([6]),
        max_new_tokens=40,
        do_sample=True,
        top_k=0,
        temperature=1.5,
        min_p=1.0,
        custom_generate=arvision.custom_generate,
    )
    greedy = network.generate(**padded([6]), max_new_tokens=40, do_sample=False)
    assert torch.equal(out, greedy)


def test_an_assistant_drafts(network):
    inputs = {**padded([6]), "max_new_tokens": 12, "do_sample": False}
    assistant, calls = tiny_llama(seed=1), []
    assistant.register_forward_pre_hook(lambda *_: calls.append(1))
    ours = network.generate(
        **inputs, custom_generate=arvision.custom_generate, assistant_model=assistant
    )
    assert torch.equal(ours, network.generate(**inputs))
    assert calls


class Told:
    """A streamer that writes down what it is told."""

    def __init__(self):
        self.ids, self.ended = [], 0

    def put(self, value):
        """New ids."""
        self.ids += value.flatten().tolist()

    def end(self):
        """No more."""
        self.ended += 1


def test_a_streamer_is_told_everything_once_and_the_end(network):
    streamer = Told()
    out = network.generate(
        **padded([6]),
        max_new_tokens=12,
        do_sample=False,
        custom_generate=arvision.custom_generate,
        streamer=streamer,
    )
    assert streamer.ids == out[0].tolist()
    assert streamer.ended == 1

    def failing(logits):
        raise RuntimeError("a fault in the middle")

    streamer = Told()
    with pytest.raises(RuntimeError, match="a fault"):
        arvision.generate(network, [[1, 2]], streamer=streamer, logits_hook=failing)
    assert streamer.ended == 1


@pytest.mark.parametrize("name", ["pixel_values", "inputs_embeds", "image_sizes", "cache"])
def test_inputs_that_are_not_read_are_refused_by_name(network, name):
    from transformers import DynamicCache

    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    given: Any = {name: cache if name == "cache" else torch.zeros(1, 3, 4, 4)}
    with pytest.raises(InputError, match=name):
        arvision.custom_generate(
            network,
            torch.tensor([[1, 2, 3]]),
            generation_config=network.generation_config,
            **given,
        )
