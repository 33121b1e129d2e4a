"""`accelerate`: the user's own call, the same picture under greedy settings, fewer passes."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from image_networks import (
    CHAMELEON,
    EMU,
    GLM,
    chameleon_prompts,
    emu3_prompts,
    emu3_sequence,
    forced_generate,
    glm_generate,
    glm_prompts,
    janus_generate,
    janus_prompts,
    tiny_chameleon,
    tiny_emu3,
    tiny_glm,
    tiny_glm_pipeline,
    tiny_janus,
)
from PIL import Image
from text_models import tiny_llama

import arvision
from arvision import InputError
from arvision.text import HFCausalLM

LENGTHS = [4, 9, 2]


def glm_call(network):
    prompts = glm_prompts(LENGTHS)
    return lambda: glm_generate(network, prompts, [(3, 2), (4, 5)])


def editing_call(network):
    sources = [(2, 3), (2, 2)]
    prompts = glm_prompts(LENGTHS, 1, sources)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(3 * 10, 768, generator=generator, dtype=torch.float64)
    return lambda: glm_generate(network, prompts, [(4, 3)], sources, pixels)


def emu3_call(network, scale=3.0):
    prompts, negatives = emu3_prompts(LENGTHS), emu3_prompts([5, 1, 2], 1)
    codes = list(range(EMU["first"], EMU["first"] + EMU["codes"]))
    used = None if scale == 1 else negatives
    return lambda: forced_generate(
        network, prompts, emu3_sequence(4, 5), codes, EMU["pad"], scale, used
    )


CALLS = {
    "glm": (tiny_glm, glm_call),
    "glm-editing": (tiny_glm, editing_call),
    "janus": (tiny_janus, lambda n: lambda: janus_generate(n, janus_prompts(LENGTHS), 3.0)),
    "emu3": (tiny_emu3, emu3_call),
    "emu3-plain": (tiny_emu3, lambda n: emu3_call(n, 1.0)),
}


@pytest.mark.parametrize("name", CALLS)
def test_greedy_calls_give_what_they_gave(name):
    make, call = CALLS[name]
    network = make()
    run = call(network)
    expected = run()
    assert arvision.accelerate(network, window=7) is network
    assert torch.equal(run(), expected)
    stats = network.arvision_stats
    assert min(stats.passes_per_image) < stats.tokens - 1
    arvision.accelerate(network, "ar")
    assert torch.equal(run(), expected)
    assert arvision.restore(network) is network
    assert "generate" not in vars(network)
    assert not hasattr(network, "arvision_stats")
    assert torch.equal(run(), expected)


class Streamer:
    def __init__(self):
        self.ids, self.ended = [], False

    def put(self, value):
        self.ids.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_seeds_and_streamers_are_the_callers():
    network = arvision.accelerate(tiny_glm())
    prompt = glm_prompts([4])[0][None]
    grids = torch.tensor([[1, 4, 5], [1, 3, 2]])

    def run(seed, **extra):
        torch.manual_seed(seed)
        return network.generate(prompt, image_grid_thw=grids, max_new_tokens=27, **extra)

    first, again, other = (run(seed, do_sample=True) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first[0, -1] == GLM["end"]
    streamer = Streamer()
    assert torch.equal(run(1, do_sample=True, streamer=streamer), first)
    assert streamer.ended
    assert list(chain(*streamer.ids)) == first[0].tolist()
    whole = run(1, do_sample=True, return_dict_in_generate=True)
    assert torch.equal(whole.sequences, first)


def test_text_models_and_their_options():
    network: Any = tiny_llama()
    ids = torch.randint(64, (2, 6))
    run = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    expected = network.generate(ids, **run)
    arvision.accelerate(network, drafter="prompt_lookup")
    assert torch.equal(network.generate(ids, **run), expected)
    assert network.arvision_stats.forward_passes > 0
    one = {**run, "attention_mask": run["attention_mask"][:1]}
    streamer = Streamer()
    answer = network.generate(ids[:1], streamer=streamer, **one)
    assert list(chain(*streamer.ids)) == answer[0].tolist()
    arvision.restore(network)


def test_what_cannot_be_kept_is_refused_by_name():
    glm = tiny_glm()
    for sampler, options, message in (
        ("code", {}, "draws no tokens"),
        ("sjd", {"temperature": 0.5}, "the call's own generation configuration"),
        ("sjd", {"windw": 3}, "windw"),
        ("sdj", {}, "unknown sampler 'sdj'"),
    ):
        with pytest.raises(InputError, match=message):
            arvision.accelerate(glm, sampler, **options)
    with pytest.raises(InputError, match=r"arvision.models.Chameleon"):
        arvision.accelerate(tiny_chameleon())
    with pytest.raises(InputError, match="causal language model"):
        arvision.accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="str: expected a causal language model"):
        arvision.accelerate("zai-org/GLM-Image")
    with pytest.raises(InputError, match="drafter"):
        arvision.accelerate(tiny_llama(), "ar")
    for spread in (tiny_janus(), tiny_emu3()):
        spread.hf_device_map = {"model": 0, "lm_head": 1}
        with pytest.raises(InputError, match="spread over 0, 1: expected one device"):
            arvision.accelerate(spread)
    arvision.accelerate(glm)
    prompt = glm_prompts([4])[0][None]
    grids = torch.tensor([[1, 4, 5], [1, 3, 2]])
    run = {"image_grid_thw": grids, "max_new_tokens": 26}
    for extra, message in (
        ({"num_beams": 2}, "num_beams 2"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences 2"),
        ({"repetition_penalty": 1.5}, "RepetitionPenaltyLogitsProcessor"),
        ({"output_scores": True}, "output_scores"),
        ({"suppress_tokens": [3]}, "image code 3"),
    ):
        with pytest.raises(InputError, match=message):
            glm.generate(prompt, **run, **extra)


def test_calls_that_draw_no_image_go_to_the_original():
    janus, emu = tiny_janus(), tiny_emu3()
    ids = torch.tensor([[1, 5, 6, 7]])
    run = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    expected = [network.generate(ids, **run) for network in (janus, emu)]
    for network, own in zip((janus, emu), expected, strict=True):
        arvision.accelerate(network)
        assert torch.equal(network.generate(ids, **run), own)
        assert network.arvision_stats is None


def draw(pipe, prompt, **extra):
    return pipe(
        prompt,
        height=64,
        width=96,
        num_inference_steps=2,
        guidance_scale=1.5,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
        **extra,
    ).images


def test_a_pipeline_draws_the_same_picture():
    pipe = tiny_glm_pipeline()
    for prompt in ("a red cat", ["a dog", "two grey owls"]):
        expected = draw(pipe, prompt)
        assert arvision.accelerate(pipe) is pipe
        torch.testing.assert_close(draw(pipe, prompt), expected, rtol=0.0, atol=0.0)
        assert pipe.arvision_stats.forward_passes < pipe.arvision_stats.tokens
        arvision.restore(pipe)
        assert not hasattr(pipe, "arvision_stats")
    arvision.accelerate(pipe)
    with pytest.raises(InputError, match="width 100: expected a multiple of 32"):
        pipe.generate_prior_tokens("a cat", 64, 100)


def test_a_pipeline_edits():
    pipe = arvision.accelerate(tiny_glm_pipeline())
    network = pipe.vision_language_encoder
    pictures = [
        [Image.effect_noise((64, 32), 60).convert("RGB"), Image.new("RGB", (32, 32), "red")],
        [Image.new("RGB", (32, 64), "blue"), Image.effect_noise((32, 32), 90).convert("RGB")],
    ]
    prompts = ["make it red", "no"]
    codes, sources, grids = pipe.generate_prior_tokens(prompts, 64, 96, image=pictures)
    assert codes.shape == (2, 4 * 6)
    model = arvision.models.GlmImage(network, pipe.processor, 64, 96, editing=True)
    conditions = [
        arvision.models.ImagePrompt(text, images=images)
        for text, images in zip(prompts, pictures, strict=True)
    ]
    ar = arvision.get_sampler("ar", temperature=0.0)
    tokens = ar(model, conditions, seeds=[0, 1]).tokens.view(2, 2, 3)
    assert torch.equal(codes.view(2, 4, 6)[:, ::2, ::2], tokens)
    for place in range(2):
        own = model.source_codes(pictures[place])
        sides = [(2 * one.shape[0], 2 * one.shape[1]) for one in own]
        assert grids[place][:, 1:].tolist() == [list(side) for side in sides]
        assert len(sources[place]) == sum(h * w for h, w in sides)
    assert draw(pipe, prompts, image=pictures).shape[0] == 2
    assert draw(pipe, prompts[0], image=pictures[0]).shape[-2:] == (64, 96)


def test_text_entries_refuse_images():
    with pytest.raises(InputError, match=r"expected arvision.models.GlmImage"):
        HFCausalLM(tiny_glm())
    for network, prompt in (
        (tiny_janus(), janus_prompts([3])[0]),
        (tiny_emu3(), emu3_prompts([3])[0]),
        (tiny_chameleon(), chameleon_prompts([3])[0]),
    ):
        model = HFCausalLM(network, 4)
        model.start([prompt[:-1]])
        with pytest.raises(InputError, match="ends where an image starts"):
            model.start([prompt])
    network = tiny_chameleon()
    del network.model.vocabulary_mapping.__dict__["image_tokens"]
    ids = torch.tensor([[0, 5, CHAMELEON["place"], 6]])
    with pytest.raises(InputError, match=r"mm_encoder_outputs|pixel_values"):
        network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.randn(1, 3, 16, 16, dtype=torch.float64),
            max_new_tokens=3,
            custom_generate=arvision.custom_generate,
        )
