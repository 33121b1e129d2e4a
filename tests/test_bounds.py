"""Numbers without bounds are refused, large calls are split, and what is long or wild is shown tamely."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from forms import slow

import arvision
from arvision import InputError, batches, memory
from arvision.contracts import Stats
from arvision.errors import MOST_SHOWN, ArvisionError, CheckpointError, DiskError, as_integer
from arvision.eval.generate import GenerateConfig
from arvision.eval.shards import ShardFolder
from arvision.evaluation import read_captions
from arvision.training.distill import DistillSettings
from arvision.training.loop import FitConfig
from arvision.training.publish import run_recipe

HUGE = 10**12
WILD = "bad\x1b[31m\nname\r\u202e\x9b"


@pytest.fixture(scope="module")
def pipe():
    return arvision.load("llamagen-fashion", device="cpu")


def refused(message, call, *arguments, **options):
    with pytest.raises(ArvisionError, match=message) as caught:
        call(*arguments, **options)
    text = str(caught.value)
    assert len(text) <= MOST_SHOWN
    assert text.isprintable()
    return text


@pytest.mark.parametrize("kind", [ArvisionError, InputError, CheckpointError, DiskError])
def test_messages_are_one_bounded_line(kind):
    text = str(kind(f"unknown model {WILD}: {'x' * 1_000_000}: expected one of a, b"))
    assert text.isprintable()
    assert len(text) <= MOST_SHOWN
    assert text.startswith("unknown model bad\\x1b[31m\\nname\\r\\u202e\\x9b: xxx")
    assert text.endswith("x: expected one of a, b")
    assert "characters]" in text
    assert str(kind("kurz, aber nötig: 猫")) == "kurz, aber nötig: 猫"


@pytest.mark.parametrize("prompt", ["x" * 1_000_000, "bag " * 250_000, WILD])
def test_prompts_are_not_echoed(pipe, prompt):
    refused("unknown class", arvision.sample, pipe, prompt, progress=False)


@pytest.mark.parametrize(
    "name", ["a" * 5000, "a/" * 2500, f"org/{'a' * 5000}", "../" * 3000, WILD, "a\0b"]
)
def test_names_of_models_are_not_echoed(name):
    refused("unknown model", arvision.load, name)


@pytest.mark.parametrize("name", ["a" * 5000, WILD])
def test_names_of_samplers_are_not_echoed(name):
    refused("unknown sampler", arvision.get_sampler, name)


def test_integers_that_python_does_not_write(pipe):
    endless = 10**5000
    refused("bits", as_integer, endless)
    for options in ({"seed": endless}, {"num_images": endless}, {"top_k": endless}):
        refused("bits", arvision.sample, pipe, 1, progress=False, **options)
    refused("bits", arvision.sample, pipe, endless, progress=False)
    for name in ("temperature", "guidance_scale"):
        for value in (10**400, endless):
            refused(name, arvision.sample, pipe, 1, progress=False, **{name: value})
    with pytest.raises(InputError, match="window"):
        arvision.get_sampler(f"sjd:window={'9' * 5000}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": HUGE}, "from 1 to 1,000,000"),
        ({"prompt": [1] * 2000, "num_images": 1000}, "at most 1,000,000 images"),
        ({"prompt": range(HUGE)}, "at most 1,000,000 images"),
        ({"prompt": [1], "seed": range(HUGE)}, "1,000,000,000,000 seeds for 1 images"),
    ],
)
def test_images_of_a_call_are_bounded(pipe, options, message):
    refused(message, arvision.sample, pipe, **{"prompt": 1, "progress": False} | options)


def test_counts_of_runs_are_bounded(tmp_path):
    refused("num", GenerateConfig, model="m", sampler="ar", num=HUGE, num_classes=3)
    (tmp_path / "p.txt").write_text("a\nb\n")
    refused("at most 10,000,000", read_captions, tmp_path / "p.txt", 50_000_000)
    refused("per_prompt", read_captions, tmp_path / "p.txt", 0)
    refused("batch_size", FitConfig, steps=1, batch_size=HUGE)
    refused("steps", FitConfig, steps=10**15)
    for name in ("num_pairs", "num_held_out", "shard_size", "num_card"):
        refused(name, DistillSettings, **{name: HUGE})
    refused("card_samples", run_recipe, "fashion-classifier", tmp_path, card_samples=HUGE)
    for option in ({"max_tries": HUGE}, {"max_tries": 0}):
        refused("max_tries", arvision.get_sampler, "csjd", **option)
        refused("max_tries", arvision.get_sampler, "cspd", **option)


@pytest.mark.parametrize("num", [10**15, -3, 0, 2.5, "many", None, True, [1], float("nan")])
def test_the_number_in_a_strangers_run_is_checked(tmp_path, num):
    (tmp_path / "run.json").write_text(json.dumps({"config": {"num": num}}))
    refused(r"run\.json: (num is|.*NaN)", lambda: ShardFolder(tmp_path).num)
    refused(r"run\.json: (num is|.*NaN)", ShardFolder(tmp_path).repair)


def test_sizes_of_pictures_are_bounded():
    from arvision.models.transformers_image.chameleon import check_size
    from arvision.models.transformers_image.emu3 import grid_of
    from arvision.models.transformers_image.glm_image import grids_of
    from arvision.models.transformers_image.layout import Layout

    refused("height", grids_of, 32 * HUGE, 1024, False)
    refused("width", check_size, 512, 32 * HUGE, "lumina")
    refused("image_area", grid_of, "1:1", HUGE)
    refused("tokens of an image", Layout.raster, 10**6, 10**6, 5)
    refused("tokens of an image", Layout, HUGE)


def test_images_of_an_image_network_are_bounded():
    from image_networks import janus_prompts, tiny_janus

    from arvision.image_pipeline import ImageModelPipeline

    pipe = ImageModelPipeline(tiny_janus())
    [ids] = janus_prompts([5])
    refused("num_images", pipe, ids, num_images_per_prompt=HUGE, progress=False)
    refused("at most 1,000,000", pipe, [ids] * 3, num_images_per_prompt=10**6, progress=False)


def test_sizes_of_texts_are_bounded(monkeypatch):
    from text_models import random_prompts, tiny_llama

    network, prompts = tiny_llama(), random_prompts([5])

    def generate(**options: Any):
        given: dict[str, Any] = {"max_new_tokens": 3} | options
        return arvision.generate(network, prompts, **given)

    refused("256 positions", generate, max_new_tokens=HUGE)
    refused("num_draft", generate, drafter="prompt_lookup", num_draft=HUGE)
    for drafter, option in (
        ("token_recycling", "num_draft"),
        ("prompt_lookup", "max_ngram"),
        ("superposed", "num_paths"),
        ("jacobi", "num_draft"),
    ):
        refused(option, generate, drafter=drafter, drafter_options={option: HUGE})
    little(monkeypatch, 1000)
    refused("lower max_new_tokens", generate)


def little(monkeypatch, num_bytes):
    for module in (memory, batches):
        monkeypatch.setattr(module, "SHARE", 1.0, raising=False)
    monkeypatch.setattr(memory, "free_bytes", lambda device="cpu": num_bytes)


@pytest.mark.parametrize(
    ("name", "sampler", "output_type"),
    [
        ("llamagen-fashion", "sjd", "pil"),
        slow("llamagen-fashion", "sjd", "np"),
        ("llamagen-fashion-draft", "sjd", "latent"),
        ("var-fashion-small", "ar", "pt"),
        slow("mar-fashion-draft", "csjd", "latent"),
        ("mar-fashion-draft", "ar:num_iter=4", "latent"),
        ("llamagen-fashion-dd", "dd", "pil"),
    ],
)
def test_a_call_that_does_not_fit_is_split_and_draws_the_same(
    monkeypatch, name, sampler, output_type
):
    pipe = arvision.load(name, device="cpu")
    steps, parts = [], []

    def draw(told=None):
        return pipe(
            [1, 2, 3],
            num_images_per_prompt=2,
            seed=4,
            sampler=arvision.get_sampler(sampler),
            output_type=output_type,
            progress=False,
            callback_on_step_end=told,
        )

    whole = draw()
    need = batches.image_memory(pipe.model, pipe.tokenizer, True, output_type)
    little(monkeypatch, max(4.5 * need.working, 7 * need.kept))
    real = batches.split
    monkeypatch.setattr("arvision.drawing.split", lambda *a: parts.append(real(*a)) or parts[-1])
    again = draw(lambda _, step, __, figures: steps.append((step, dict(figures))))
    assert parts == [[slice(0, 3), slice(3, 6)]]
    assert torch.allclose(again.tokens, whole.tokens, atol=1e-4)
    assert len(again.images) == 6
    if output_type == "pil":
        pairs = zip(again.images, whole.images, strict=True)
        assert max(np.abs(np.int64(a) - np.int64(b)).max() for a, b in pairs) <= 1
    assert set(again.stats) == set(whole.stats)
    for key in ("passes_per_image", "lengths", "tokens", "lossless", "seeds", "interrupted"):
        assert again.stats[key] == whole.stats[key]
    assert again.stats.tokens_per_pass == pytest.approx(whole.stats.tokens_per_pass)
    assert [step for step, _ in steps] == list(range(1, again.stats.forward_passes + 1))
    finished = [figures["finished"] for _, figures in steps]
    assert finished == sorted(finished)
    assert finished[-1] == steps[-1][1]["total"] == whole.stats.tokens * 6


def test_an_interrupted_call_does_not_begin_later_parts(monkeypatch, pipe):
    need = batches.image_memory(pipe.model, pipe.tokenizer, True, "pil")
    little(monkeypatch, max(2.5 * need.working, 7 * need.kept))

    def stop(pipe, step, *_):
        pipe._interrupt = step == 3

    out = pipe([1] * 6, seed=0, progress=False, callback_on_step_end=stop)
    assert out.stats.interrupted
    assert out.stats.forward_passes == 3
    assert out.stats.lengths == [4, 4, 0, 0, 0, 0]
    assert out.stats.passes_per_image == [3, 3, 0, 0, 0, 0]
    assert not out.tokens[2:].any()
    assert len(out.images) == 6


def test_what_could_not_be_kept_is_refused_with_an_estimate(monkeypatch, pipe):
    little(monkeypatch, 2e6)
    text = refused("lower num_images", arvision.sample, pipe, 1, num_images=5000, progress=False)
    assert "5,000 images in one call would take about 39" in text
    assert "1.9 MiB are free" in text
    refused("lower num_images", arvision.compare, pipe, 1, ["ar", "sjd"], num_images=2000)


def test_estimates_are_from_above(pipe):
    """What a batch really takes, of a size that can be seen beside the process's own."""
    import psutil

    process = psutil.Process()
    for name, num in (("llamagen-fashion", 100), ("var-fashion", 100)):
        one = arvision.load(name, device="cpu")
        one([1], seed=0, progress=False)
        need = batches.image_memory(one.model, one.tokenizer, True, "pil")
        before, most = process.memory_info().rss, 0

        def watch(pipe, step, *_):
            nonlocal most
            pipe._interrupt = step >= 8  # later passes take no more
            most = max(most, process.memory_info().rss)

        one([1] * num, seed=0, progress=False, callback_on_step_end=watch)
        most = max(most, process.memory_info().rss)
        assert most - before <= 1.2 * num * (need.working + need.kept)


def test_statistics_of_parts_are_joined():
    parts = [
        Stats(
            forward_passes=3,
            tokens=8,
            tokens_per_pass=8 / 3,
            passes_per_image=[3],
            drafted=4,
            accepted=1,
            acceptance_rate=0.25,
            interrupted=False,
        ),
        Stats(
            forward_passes=5,
            tokens=8,
            tokens_per_pass=8 / 5,
            passes_per_image=[5],
            drafted=6,
            accepted=4,
            acceptance_rate=2 / 3,
            interrupted=True,
        ),
    ]
    assert batches.joined(parts) == {
        "forward_passes": 8,
        "tokens": 8,
        "tokens_per_pass": 2.0,
        "passes_per_image": [3, 5],
        "drafted": 10,
        "accepted": 5,
        "acceptance_rate": 0.5,
        "interrupted": True,
    }


def test_free_memory_obeys_the_limits_of_the_process(monkeypatch):
    resource = pytest.importorskip("resource")
    free = memory.free_bytes()
    assert 0 < free < 1 << 50
    monkeypatch.setattr(
        resource, "getrlimit", lambda _: (psutil_vms() + 10_000_000, resource.RLIM_INFINITY)
    )
    assert memory.free_bytes() <= 10_000_000


def psutil_vms():
    import psutil

    return psutil.Process().memory_info().vms


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "--quiet", "--model", WILD, "--prompt", "7"],
        ["sample", "--quiet", "--model", "llamagen-fashion", "--prompt", WILD],
        ["sample", "--quiet", "--model", "llamagen-fashion", "--prompt", "7", "--option", WILD],
        ["sample", "--quiet", "--model", "llamagen-fashion", "--prompt", "7", "--seed", "9" * 5000],
        [
            "sample",
            "--quiet",
            "--model",
            "llamagen-fashion",
            "--prompt",
            "7",
            "--num-images",
            str(HUGE),
        ],
        ["sample", "--quiet", "--model", "a" * 5000, "--prompt", "7"],
        ["eval", "fid", "--samples", WILD, "--reference", "fashion-test", "--extractor", "lite0"],
        ["eval", "repair", "--samples", WILD],
        ["train", "--recipe", "fashion-classifier", "--out", "o", "--threads", str(HUGE)],
        ["train", "--recipe", "x" * 5000, "--out", "o"],
    ],
)
def test_commands_refuse_in_one_tame_line(arguments, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cli(*arguments)
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.removesuffix("\n").split("\n")
    assert line.isprintable()
    assert len(line) <= MOST_SHOWN + 20


def test_out_of_memory_is_one_line(cli, monkeypatch):
    def fail(*_, **__):
        torch.empty(1 << 60)

    monkeypatch.setattr("arvision.api.sample", fail)
    done = cli("sample", "--model", "llamagen-fashion", "--prompt", "7", "--quiet")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "out of memory: lower" in done.stderr
