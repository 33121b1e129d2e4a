"""Strangers' folders in the layouts of transformers and diffusers: read whole, or refused in one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import threading
import warnings
from typing import Any

import pytest
import torch
from image_folders import glm_folder, janus_folder
from text_models import tiny_llama
from torch import nn

import arvision
from arvision import ARPipeline, CheckpointError, InputError
from arvision.foreign import few_modules
from arvision.text import load_text_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("foreign")
    for name, make in (("glm", glm_folder), ("janus", janus_folder)):
        (place / name).mkdir()
        make(place / name)
    arvision.load(place / "janus", device="cpu").save_pretrained(place / "saved")
    tiny_llama().save_pretrained(place / "text")
    return place


def edit(path, inner, **changes):
    content: Any = json.loads(path.read_text())
    (content[inner] if inner else content).update(changes)
    path.write_text(json.dumps(content))


def refusal(folder):
    load = load_text_model if folder.name == "text" else arvision.load
    with pytest.raises((CheckpointError, InputError)) as caught:
        load(folder, device="cpu")
    said = str(caught.value)
    assert "\n" not in said
    assert str(folder) in said
    return said


CHANGES: list[tuple[str, str, dict[str, Any], str]] = [
    ("glm", "", {"scheduler": ["strangers_code", "X"]}, "expected a SchedulerMixin of diffusers"),
    ("glm", "", {"vae": ["transformers", "T5EncoderModel"]}, "expected a ModelMixin"),
    ("glm", "", {"vae": ["os", "system"]}, "expected a ModelMixin"),
    ("glm", "", {"text_encoder": [None, None]}, r"text_encoder \[None, None\]: expected a"),
    ("glm", "", {"processor": 5}, "processor 5: expected a ProcessorMixin"),
    ("glm", "", {"further": ["strangers_code", "X"]}, "part further/ is missing"),
    ("glm", "vae", {"layers_per_block": 10**8}, "more than .* modules"),
    ("glm", "transformer", {"num_layers": 10**8}, "more than .* modules"),
    ("glm", "text_encoder", {"num_layers": 10**8}, "more than .* modules"),
    ("glm", "transformer", {"num_layers": 2}, "key 'transformer_blocks.1.* is missing"),
    ("glm", "transformer", {"num_layers": 0}, "key 'transformer_blocks.0.* is unexpected"),
    ("glm", "transformer", {"num_layers": "two"}, "no network has these values"),
    ("glm", "text_encoder", {"num_layers": 0}, "key 'encoder.block.* is unexpected"),
    ("glm", "text_encoder", {"attn_implementation": "a/b"}, "asks for code of a repository"),
    ("glm", "scheduler", {"num_train_timesteps": 10**12}, "expected an integer in 1..1000000"),
    ("janus", ".vq_config", {"num_res_blocks": 10**8}, "more than .* modules"),
    ("janus", ".text_config", {"_attn_implementation": "a/b"}, "asks for code of a repository"),
    ("janus", "", {"_attn_implementation": {"text_config": "a/b:c"}}, "asks for code"),
    ("janus", "", {"architectures": 5}, "unknown class of an image network '5'"),
    ("saved", "", {"guidance_scale": "abc"}, "guidance_scale 'abc': expected a finite number"),
    ("saved", "", {"num_threads": 10**9}, "num_threads 1000000000: expected"),
    ("saved", "", {"options": [1]}, r"options \[1\]: expected an object"),
    ("saved", "", {"sampler": 7}, r"sampler 7: expected \[library, class\]"),
    ("saved", "", {"sampler": ["os", "system"]}, "is no class that arvision loads"),
    ("saved", "", {"wiggle": 1}, "unknown name 'wiggle'"),
    ("text", "", {"attn_implementation": "a/b"}, "asks for code of a repository"),
    ("text", "", {"_experts_implementation": "a/b"}, "asks for code of a repository"),
]


@pytest.mark.parametrize(("name", "part", "changes", "words"), CHANGES)
def test_what_a_folder_says_is_checked(folders, tmp_path, monkeypatch, name, part, changes, words):
    folder = shutil.copytree(folders / name, tmp_path / name)
    part, _, inner = part.partition(".")
    files = (
        ("scheduler_config.json", "config.json") if part else ("model_index.json", "config.json")
    )
    path = next(folder / part / file for file in files if (folder / part / file).exists())
    edit(path, inner, **changes)
    # A module of the working directory, which an index may name.
    (tmp_path / "strangers_code.py").write_text("open('ran', 'w')\nclass X: pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    said = refusal(folder)
    assert re.search(words, said), said
    assert not (tmp_path / "ran").exists()
    assert "strangers_code" not in sys.modules


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("glm", "scheduler/scheduler_config.json"),
        ("glm", "processor/tokenizer_config.json"),
        ("janus", "generation_config.json"),
        ("janus", "tokenizer_config.json"),
        ("text", "tokenizer_config.json"),
        ("text", "generation_config.json"),
    ],
)
def test_pipes_do_not_hang(folders, tmp_path, name, file):
    folder = shutil.copytree(folders / name, tmp_path / name)
    (folder / file).unlink(missing_ok=True)
    os.mkfifo(folder / file)
    assert "is a FIFO: expected a regular file" in refusal(folder)


def test_code_beside_weights_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders / "glm", tmp_path / "glm")
    shutil.copytree(folder / "vae", folder / "further")
    edit(folder / "model_index.json", None, further=["strangers_code", "X"])
    assert "unknown part 'further'" in refusal(folder)
    edit(folder / "model_index.json", None, further=None)
    (folder / "vae" / "strangers_code.py").write_text("open('ran', 'w')\n")
    assert "code of a stranger" in refusal(folder)


def test_a_saved_draft_of_another_machine_is_left_out(folders, tmp_path):
    folder = shutil.copytree(folders / "saved", tmp_path / "saved")
    edit(folder / "model_index.json", None, draft="/etc/passwd")
    edit(folder / "sampler" / "sampler_config.json", None, temperature=0.5)
    with pytest.warns(UserWarning, match="left out draft='/etc/passwd'"):
        pipe = arvision.load(folder, device="cpu")
    assert pipe.config["draft"] is None
    assert pipe.sampler.config["temperature"] == 0.5


@pytest.mark.parametrize("name", ["glm", "janus", "saved"])
def test_what_is_in_order_loads(folders, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert isinstance(arvision.load(folders / name, device="cpu"), ARPipeline)


def test_modules_are_counted_for_one_thread_only():
    def build(num):
        with torch.device("meta"):
            return nn.Sequential(*(nn.Sequential(nn.Identity()) for _ in range(num)))

    with few_modules(1, "folder"):
        build(200)
        other = threading.Thread(target=build, args=(700,))
        other.start()
        other.join()
        with pytest.raises(CheckpointError, match="more than 508 modules"):
            build(700)
    build(700)
