"""Nothing that a user says is dropped without a word: options, captions, interrupted draws."""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny_pipelines import tiny

import arvision
from arvision import InputError
from arvision.samplers import DDSampler

STUDENTS = ["student", "var student"]


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize(
    "given",
    [{"guidance_scale": 3.0}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.9}],
    ids=lambda given: next(iter(given)),
)
def test_students_refuse_what_they_do_not_look_at(name, given):
    pipe, prompt = tiny(name)
    option = next(iter(given))
    for steps in (1, 2):
        with pytest.raises(InputError, match=rf"{option} .*'?dd'? with {steps} steps"):
            pipe(prompt, seed=0, sampler=DDSampler(steps=steps), **given)
    with pytest.raises(InputError, match=option):
        arvision.sample(pipe, prompt, progress=False, **given)


def test_students_take_what_asks_for_nothing_and_what_their_teacher_takes():
    pipe, prompt = tiny("student")
    neutral = {"guidance_scale": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    wanted = pipe(prompt, seed=0, output_type="latent").tokens
    assert torch.equal(pipe(prompt, seed=0, output_type="latent", **neutral).tokens, wanted)
    teacher = tiny("llamagen")[0]
    mixed = DDSampler(steps=4).bind(teacher=teacher)
    plain = pipe(prompt, seed=0, sampler=mixed, output_type="latent").tokens
    shaped = pipe(prompt, seed=0, sampler=mixed, output_type="latent", top_k=1, guidance_scale=4.0)
    assert not torch.equal(shaped.tokens, plain)


def test_a_sampler_with_idle_options_says_so_once():
    pipe, prompt = tiny("student")
    pipe.sampler = DDSampler(steps=1, temperature=0.625, num_evaluations=7)
    with pytest.warns(UserWarning, match=r"look at temperature=0\.625, num_evaluations=7"):
        pipe(prompt, seed=0, output_type="latent")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(prompt, seed=0, output_type="latent")
        arvision.load("llamagen-fashion-dd", device="cpu")("bag", seed=0, output_type="latent")


@pytest.mark.parametrize("name", ["captioned", "infinity"])
def test_what_is_cut_from_a_caption_is_quoted(name):
    pipe, _ = tiny(name)
    caption = "a dark boot a dark bag a boot"  # 8 words and an end; 6 are read
    with pytest.warns(UserWarning, match=r"the 6 text tokens.*'bag a boot' \(3 of 8\)") as told:
        pipe([caption, caption, "a boot"], seed=0, output_type="latent")
    assert len([one for one in told if "not read" in str(one.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe("a dark boot a dark", seed=0, output_type="latent")


@pytest.mark.parametrize("name", ["llamagen", "var", "mar", "student"])
def test_an_interrupted_draw_says_which_images_it_left(name):
    pipe, prompt = tiny(name)

    def stop(pipe, step, timestep, figures):
        pipe._interrupt = True

    out = pipe(prompt, seed=0, num_images_per_prompt=2, callback_on_step_end=stop)
    assert out.stats.interrupted
    assert out.stats.complete == [length == out.stats.tokens for length in out.stats.lengths]
    for image, is_complete, length in zip(
        out.images, out.stats.complete, out.stats.lengths, strict=True
    ):
        told = None if is_complete else f"{length} of {out.stats.tokens} tokens drawn"
        assert image.info.get("incomplete") == told
    assert all(out.stats.complete) == (name == "student")  # its first pass draws everything
    whole = pipe(prompt, seed=0, num_images_per_prompt=2)
    assert whole.stats.complete == [True, True]
    assert not whole.stats.interrupted
    assert all("incomplete" not in image.info for image in whole.images)


def test_rows_that_were_finished_before_the_end_are_complete():
    pipe, prompt = tiny("llamagen")
    sampler = arvision.get_sampler("sjd", window=6)
    seen = []

    def stop(pipe, step, timestep, figures):
        seen.append(figures["finished"])
        pipe._interrupt = figures["finished"] > 4 * 16 - 8

    out = pipe(prompt, seed=1, num_images_per_prompt=4, sampler=sampler, callback_on_step_end=stop)
    assert out.stats.interrupted
    assert sum(out.stats.lengths) == seen[-1]
    assert out.stats.complete == [length == 16 for length in out.stats.lengths]
