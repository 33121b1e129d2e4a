"""Doors that must open: listed models, numbers of other libraries, names, threads."""

from __future__ import annotations

import json
import threading
import warnings
from typing import Any, cast

import diffusers
import numpy as np
import pytest
import torch

import arvision
from arvision import ARPipeline, InputError
from arvision.errors import StateError, check_count
from arvision.folders import ASSETS, parse_device
from arvision.models.conditions import resolve_class
from arvision.samplers import ARSampler, SJDSampler, get_sampler
from arvision.testing import tiny_llamagen


def stop_early(pipe, step, time, given):
    pipe._interrupt = step >= 4


@pytest.mark.parametrize("name", arvision.list_models())
def test_listed_models_draw_when_called_and_loaded_again(name, tmp_path):
    index = json.loads((ASSETS / name / "model_index.json").read_text())
    prompt = "bag" if index["class_names"] else "a dark bag"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe = arvision.load(name, device="cpu")
        kind = "pt" if pipe.tokenizer is not None else "latent"
        draw = {"seed": 1, "output_type": kind, "callback_on_step_end": stop_early}
        once = pipe(prompt, **draw)
        pipe.save_pretrained(tmp_path)
        again = arvision.load(tmp_path, device="cpu")(prompt, **draw)
    assert once.tokens.any()
    assert torch.equal(once.tokens, again.tokens)
    assert torch.equal(once.images, again.images)


@pytest.mark.parametrize(
    "stored", [{"guidance_schedule": "linear"}, {"order": "raster", "num_iter": 3}, {"tempo": 3}]
)
def test_stored_options_of_another_kind_or_version_are_dropped_once(
    stored, tmp_path, tiny_pipeline
):
    tiny_pipeline.save_pretrained(tmp_path)
    config = tmp_path / "sampler" / "sampler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | stored))
    with pytest.warns(UserWarning, match=f"dropped .*{next(iter(stored))}=") as told:
        pipe = arvision.load(tmp_path, device="cpu")
    assert len([one for one in told if "dropped" in str(one.message)]) == 1
    assert torch.equal(pipe(1, seed=2).tokens, tiny_pipeline(1, seed=2).tokens)
    pipe.save_pretrained(tmp_path)
    assert set(json.loads(config.read_text())).isdisjoint({"tempo"})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        arvision.load(tmp_path, device="cpu")
    with pytest.raises(InputError, match="guidance_schedule 'linear': a token model"):
        pipe(1, seed=0, sampler=ARSampler(guidance_schedule="linear"))


NUMBERS = [int, np.int64, np.uint8, np.asarray, torch.tensor]


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_of_other_libraries(kind, tiny_pipeline):
    plain = tiny_pipeline(1, seed=5, num_images_per_prompt=2, top_k=3, output_type="latent")
    given = tiny_pipeline(
        kind(1), seed=kind(5), num_images_per_prompt=kind(2), top_k=kind(3), output_type="latent"
    )
    assert torch.equal(given.tokens, plain.tokens)
    assert given.stats.seeds == [(5, 0), (5, 1)]
    assert all(type(part) is int for pair in given.stats.seeds for part in pair)
    assert check_count("n", kind(4)) == check_count("n", torch.tensor([4])) == 4


def test_arrays_of_prompts_seeds_and_numbers(tiny_pipeline):
    plain = tiny_pipeline([0, 2], seed=[4, 5], top_k=2, guidance_scale=1.5, temperature=0.5)
    for ids, seeds in (
        (np.array([0, 2]), np.array([4, 5])),
        (torch.tensor([0, 2]), torch.tensor([[4, 0], [5, 0]])),
        ([np.int64(0), torch.tensor(2)], (np.int64(4), torch.tensor(5))),
        (np.array(["cat", "boot"]), [(np.int64(4), 0), 5]),
    ):
        given = tiny_pipeline(
            ids,
            seed=seeds,
            top_k=2.0,
            guidance_scale=np.float32(1.5),
            temperature=torch.tensor([0.5]),
        )
        assert torch.equal(given.tokens, plain.tokens)
    sampler = get_sampler("ar", temperature=np.float64(0.5), top_k=torch.tensor(2))
    assert json.loads(sampler.to_json_string())["top_k"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": "7"}, "seed '7'"),
        ({"seed": 1.5}, "seed 1.5"),
        ({"seed": [1.5]}, "seed 1.5"),
        ({"seed": True}, "seed True"),
        ({"seed": -1}, "seed"),
        ({"seed": float("inf")}, "seed inf"),
        ({"seed": {}}, "seed {}"),
        ({"seed": np.array([1.5])}, "seed 1.5"),
        ({"num_images_per_prompt": "2"}, "num_images '2'"),
        ({"num_images_per_prompt": [2]}, "num_images"),
        ({"num_images_per_prompt": 1.5}, "num_images 1.5"),
        ({"num_images_per_prompt": float("inf")}, "num_images inf"),
        ({"top_k": "3"}, "top_k '3'"),
        ({"top_k": 2.5}, "top_k 2.5"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_k": [3, 3]}, "top_k"),
        ({"top_k": float("nan")}, "top_k nan"),
        ({"top_p": "1"}, "top_p '1'"),
        ({"top_p": [0.5, 0.5]}, "top_p"),
        ({"temperature": "hot"}, "temperature 'hot'"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"temperature": True}, "temperature True"),
        ({"guidance_scale": "3"}, "guidance_scale '3'"),
        ({"guidance_scale": float("nan")}, "guidance_scale nan"),
        ({"guidance_scale": np.array([1.0, 2.0])}, "guidance_scale"),
        ({"callback_on_step_end_tensor_inputs": ["latents"]}, "'latents'"),
    ],
)
def test_what_is_no_number_is_refused_before_the_model_runs(tiny_pipeline, arguments, message):
    pipe = ARPipeline.from_model(tiny_llamagen())
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(InputError, match=message) as told:
        pipe(1, **arguments)
    assert "\n" not in str(told.value)


def test_pictures_without_a_tokenizer_and_devices_that_are_not_there(tiny_pipeline):
    model = tiny_llamagen()
    pipe = ARPipeline(model.transformer)
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(InputError, match="no tokenizer"):
        pipe(1, seed=0)
    devices: tuple[Any, ...] = ("cuda:99", "abacus", 1.5, ["cpu"])
    for device in devices:
        with pytest.raises(InputError, match="device"):
            parse_device(device)


def test_from_model_takes_what_the_class_takes(tiny_pipeline):
    model = tiny_llamagen()
    pipe = ARPipeline.from_model(model, class_names=["ape", "bee", "cow"], text_encoder=None)
    assert torch.equal(pipe("cow", seed=0).tokens, pipe(2, seed=0).tokens)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["ape"], "1 class_names: expected 3"),
        (["ape", "", "cow"], r"class_names\[1\] ''"),
        (["ape", 2, "cow"], r"class_names\[1\] 2"),
        ("ape", "expected a list"),
    ],
)
def test_class_names_are_checked(names, message):
    with pytest.raises(InputError, match=message):
        ARPipeline.from_model(tiny_llamagen(), class_names=names)


def test_names_that_stand_twice_synonyms_and_digits():
    names = ["crane", "tench, Tinca tinca", "great grey owl", "crane", "1", "5"]
    assert resolve_class("Tinca Tinca", 6, names) == 1
    assert resolve_class("tench", 6, names) == 1
    assert resolve_class("owl", 6, names) == 2
    assert resolve_class("5", 6, names) == 5
    with pytest.raises(InputError, match="name of classes 0, 3"):
        resolve_class("crane", 6, names)
    with pytest.raises(InputError, match="id and the name of class 4"):
        resolve_class("1", 6, names)


def test_diffusers_own_ways_to_load(tmp_path, tiny_pipeline):
    tiny_pipeline.save_pretrained(tmp_path, variant="fp16")
    pipe = arvision.load(tmp_path, device="cpu", variant="fp16")
    plain = tiny_pipeline(1, seed=3).tokens
    assert torch.equal(pipe(1, seed=3).tokens, plain)
    general = cast(Any, diffusers).DiffusionPipeline.from_pretrained(tmp_path, variant="fp16")
    assert isinstance(general, ARPipeline)
    assert torch.equal(general(1, seed=3).tokens, plain)
    again = ARPipeline.from_pipe(general, guidance_scale=1.0)
    assert again.transformer is general.transformer
    assert again.config["class_names"] == general.config["class_names"]
    assert torch.equal(again("cat", seed=3).tokens, tiny_pipeline("cat", seed=3).tokens)


def test_a_callback_is_given_what_it_asks_for(tiny_pipeline):
    seen = []
    tiny_pipeline(
        1,
        seed=0,
        callback_on_step_end=lambda pipe, step, time, given: seen.append(set(given)),
        callback_on_step_end_tensor_inputs=["finished"],
    )
    assert seen
    assert all(each == {"finished"} for each in seen)


def test_stopping_one_call_leaves_the_others(tiny_pipeline):
    """Both draws are inside their first pass when one of them is stopped."""
    pipe, both, out = ARPipeline.from_model(tiny_llamagen()), threading.Barrier(2), {}

    def draw(name):
        def callback(pipe, step, _, __):
            if step == 1:
                both.wait(30)
                if name == "stopped":
                    pipe._interrupt = True
                both.wait(30)

        out[name] = pipe(1, seed=0, callback_on_step_end=callback)

    threads = [threading.Thread(target=draw, args=(name,)) for name in ("stopped", "whole")]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert out["stopped"].stats.interrupted
    assert not out["whole"].stats.interrupted
    assert torch.equal(out["whole"].tokens, tiny_pipeline(1, seed=0).tokens)


def test_a_flag_from_outside_stops_what_is_going_on(tiny_pipeline):
    def callback(pipe, step, _, __):
        if step == 2:
            other = threading.Thread(target=setattr, args=(pipe, "_interrupt", True))
            other.start()
            other.join()

    out = tiny_pipeline(1, seed=0, callback_on_step_end=callback)
    assert out.stats.interrupted
    assert out.stats.forward_passes == 2
    assert not tiny_pipeline(1, seed=0).stats.interrupted


def test_no_global_is_changed_by_draws_at_once():
    pipe, both = ARPipeline.from_model(tiny_llamagen(), num_threads=1), threading.Barrier(2)
    pipe.set_progress_bar_config(desc="mine", disable=True)

    def callback(pipe, step, _, __):
        if step in (1, 2):
            both.wait(30)

    def draw(progress):
        arvision.sample(pipe, 1, progress=progress, output_type="latent")
        pipe(1, seed=0, callback_on_step_end=callback)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        threads = [threading.Thread(target=draw, args=(flag,)) for flag in (False, True)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        found = []
        late = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        late.start()
        late.join()
        assert found == [2]
    finally:
        torch.set_num_threads(before)
    assert pipe._progress_bar_config == {"desc": "mine", "disable": True}


def test_a_pipeline_is_not_moved_while_it_draws(tiny_pipeline):
    def callback(pipe, step, _, __):
        pipe.to(torch.float64)

    with pytest.raises(StateError, match="draws are going on"):
        tiny_pipeline(1, seed=0, callback_on_step_end=callback)
    assert tiny_pipeline.to("cpu") is tiny_pipeline


@pytest.mark.parametrize(
    "own", [SJDSampler(window=3, top_k=2), ARSampler(top_k=2), ARSampler(temperature=0.0)]
)
def test_sample_takes_the_pipelines_own_sampler(own):
    pipe = ARPipeline.from_model(tiny_llamagen())
    pipe.sampler = own
    ours = arvision.sample(pipe, [0, 1, 2], seed=3, progress=False)
    assert torch.equal(ours.tokens, pipe([0, 1, 2], seed=3).tokens)
    other = arvision.sample(pipe, [0, 1, 2], "ar", seed=3, progress=False)
    assert not torch.equal(ours.tokens, other.tokens)
