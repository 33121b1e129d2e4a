"""Nothing that a user says is dropped without a word: options, captions, interrupted draws."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
from tiny_pipelines import tiny

import arvision
from arvision import InputError
from arvision.errors import warn_once
from arvision.portable import options_of
from arvision.samplers import SAMPLERS, DDSampler, get_sampler
from arvision.samplers.base import parse_sampler

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


IDLE = [
    ("ar:prune_scales=1", "prune_scales 1 with prune 0.0", "prune=0.5"),
    ("ar:prune_whole=[1,1]", "prune_whole [1, 1] with prune 0.0", "prune=0.5"),
    ("ar:reuse_guidance=true", "reuse_guidance True with refresh 1", "refresh=2"),
    ("ar:refresh_first=2", "refresh_first 2 with refresh 1", "refresh=2"),
    ("ar:refresh_share=published", "refresh_share 'published' with refresh 1", "refresh=2"),
    ("sjd:cost_file=costs", "cost_file 'costs' with window 16", "window=auto"),
    ("sjd:min_share=0.1", "min_share 0.1 with tree None", "tree=drift"),
    ("csjd:tolerance=0.2", "tolerance 0.2 with criterion 'trajectory'", "criterion=tolerance"),
    ("cspd:inner_temperature=2:criterion=trajectory", "inner_temperature 2 with criterion", None),
    ("csjd:max_tries=5:criterion=tolerance", "max_tries 5 with criterion 'tolerance'", None),
    ("lantern:tv=0.2:bound=factor", "tv 0.2 with bound 'factor'", None),
    ("lantern:factor=2", "factor 2 with bound 'step'", "bound=factor"),
]
"""A sampler, the message's beginning, and what lends the option its meaning (None: the other's
default)."""


def test_the_table_has_all_options_that_need_another():
    declared = {
        (entry.name, option)
        for entry in SAMPLERS
        for row in entry.value.only_with
        for option in row.options
    }
    assert declared == {(each[0].split(":")[0], each[1].split()[0]) for each in IDLE}


@pytest.mark.parametrize(("spec", "message", "needs"), IDLE, ids=[each[0] for each in IDLE])
def test_an_option_that_means_nothing_without_another_is_refused(spec, message, needs):
    match = f"^{re.escape(message)}.*: it would have no effect, expected "
    with pytest.raises(InputError, match=match):
        get_sampler(spec)
    name, option = spec.split(":")[:2]
    key = option.partition("=")[0]
    made = get_sampler(f"{name}:{option}" if needs is None else f"{spec}:{needs}")
    with pytest.raises(InputError, match="it would have no effect"):
        type(made)(**parse_sampler(spec)[1])
    defaults = get_sampler(name).config
    get_sampler(name, **{key: defaults[key]})  # a default asks for nothing
    # Who takes the other option back says nothing against this one.
    other = (needs or spec.split(":")[-1]).split("=")[0]
    change = {other: defaults[other] if needs else parse_sampler(spec)[1][other]}
    assert made.with_options(**change).config[key] == defaults[key]


def test_stored_samplers_of_earlier_releases_with_idle_options_open(tmp_path):
    stored = {"_class_name": "ARSampler", "prune": 0.0, "prune_scales": 1, "prune_whole": [1, 1]}
    (tmp_path / "sampler_config.json").write_text(json.dumps(stored))
    opened = SAMPLERS["ar"].from_pretrained(tmp_path)
    assert (opened.config["prune_scales"], opened.config["prune_whole"]) == (2, (0, 0))


def test_a_file_of_costs_beside_their_table_is_refused():
    given = {"window": "auto", "cost_table": {1: 1.0, 4: 1.0}}
    with pytest.raises(InputError, match=r"cost_file 'c' with cost_table .*no effect, expected"):
        get_sampler("sjd", cost_file="c", **given)


def test_top_k_and_top_p_of_greedy_drawing_are_told_once():
    pipe, prompt = tiny("llamagen")
    warn_once.cache_clear()
    draw = {"seed": 0, "output_type": "latent", "temperature": 0}
    with pytest.warns(UserWarning, match="top_k 3 at temperature 0: it has no effect"):
        found = pipe(prompt, top_k=3, **draw).tokens
    with pytest.warns(UserWarning, match=r"top_p 0\.5 at temperature 0"):
        get_sampler("sjd:temperature=0:top_p=0.5")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(pipe(prompt, top_k=3, **draw).tokens, found)
        warn_once.cache_clear()
        pipe(prompt, top_k=0, top_p=1.0, **draw)
        # What the pipeline recommends is no word of the caller.
        own = get_sampler("ar", top_k=3)
        assert torch.equal(pipe(prompt, sampler=own, **draw).tokens, found)
        get_sampler("ar", top_k=3, top_p=0.5)


LAWFUL = [entry.name for entry in SAMPLERS if "top_k" in options_of(entry.value)]


@pytest.mark.parametrize("name", LAWFUL)
def test_a_sampler_that_is_built_directly_tells_it_too(tmp_path, name):
    cls = SAMPLERS[name]
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match="top_k 3 at temperature 0: it has no effect"):
        made = cls(temperature=0, top_k=3)
    made.save_pretrained(tmp_path)
    warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cls.from_pretrained(tmp_path).config["top_k"] == 0
        assert made.with_options(temperature=0).config["top_k"] == 0
        assert cls(top_k=3).with_options(temperature=0.5).config["top_k"] == 3


@pytest.mark.parametrize("given", [{"num_draft": 4}, {"drafter_options": {"max_depth": 3}}])
def test_drafts_without_a_drafter_are_refused(given):
    with pytest.raises(
        InputError, match=r"(num_draft 4|max_depth) without a drafter: it would have"
    ):
        arvision.generate("no-such-model", "text", **given)


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
