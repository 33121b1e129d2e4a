"""Folders that strangers made: read whole or refused in one line, nothing run, nothing overwritten."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from text_models import tiny_llama

import arvision
from arvision import ARPipeline, CheckpointError, InputError
from arvision.checkpoint import read_state_dict
from arvision.cli import output
from arvision.cli.output import expanded
from arvision.eval.classifier import load_classifier
from arvision.eval.coco import choose_captions
from arvision.eval.shards import ShardFolder
from arvision.eval.writers import read_prompts
from arvision.file_kinds import STARTS
from arvision.files import check_out, write_bytes
from arvision.folders import ASSETS
from arvision.models import FAMILIES, LlamaGenTransformer
from arvision.samplers import SAMPLERS, SJDSampler, get_sampler
from arvision.testing import tiny_llamagen
from arvision.text import load_text_model
from arvision.text.drafters.heads import load_heads, make_heads, save_heads
from arvision.text.drafters.papers.pseudo import load_pseudo, make_pseudo, save_pseudo


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    ARPipeline.from_model(tiny_llamagen()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def store_sampler(folder, name, **options):
    """Put a sampler into a saved pipeline as its author would, options and all."""
    cls = SAMPLERS[name]
    edit(folder / "model_index.json", sampler=[cls.__module__, cls.__name__])
    config = {"_class_name": cls.__name__, "_diffusers_version": "0.42.1", **options}
    (folder / "sampler" / "sampler_config.json").write_text(json.dumps(config))


# What stays on the machine.


def test_a_stored_sampler_names_no_file_to_write(folder, tmp_path):
    notes = tmp_path / "notes" / "notes.txt"
    store_sampler(folder, "sjd", window="auto", cost_file=str(notes))
    with pytest.warns(UserWarning, match="left out cost_file='"):
        pipe = arvision.load(folder, device="cpu")
    assert pipe.sampler.config["window"] == "auto"
    assert pipe.sampler.config["cost_file"] is None
    assert not notes.parent.exists()


@pytest.mark.parametrize("name", ["load_config", "from_config", "from_pretrained"])
def test_no_door_takes_the_file(tmp_path, name):
    stored = {"_class_name": "SJDSampler", "window": "auto", "cost_file": "notes.txt"}
    (tmp_path / "sampler_config.json").write_text(json.dumps(stored))
    doors = {
        "load_config": lambda: SJDSampler.from_config(SJDSampler.load_config(tmp_path)),
        "from_config": lambda: SJDSampler.from_config(stored),
        "from_pretrained": lambda: SJDSampler.from_pretrained(tmp_path),
    }
    with pytest.warns(UserWarning, match="left out cost_file"):
        sampler = doors[name]()
    assert sampler.config["cost_file"] is None


def test_places_are_not_saved_and_what_a_caller_says_stays(tmp_path):
    sampler = get_sampler("sjd", window="auto", cost_file="costs.json")
    sampler.save_pretrained(tmp_path)
    assert "cost_file" not in json.loads((tmp_path / "sampler_config.json").read_text())
    again = SJDSampler.from_config(sampler.config, coupling="maximal")
    assert again.config["cost_file"] == "costs.json"
    given = SJDSampler.from_config(SJDSampler.load_config(tmp_path), cost_file="mine.json")
    assert given.config["cost_file"] == "mine.json"


@pytest.mark.parametrize(
    ("value", "stays"),
    [
        ("llamagen-fashion-draft", False),
        ("somebody/llamagen-draft", False),
        ("/home/me/model", True),
        ("../model", True),
        ("./llamagen-fashion-draft", True),
        ("~/model", True),
        ("here/model", True),
        ("a/b/c", True),
        (["llamagen-fashion-draft"], True),
    ],
)
def test_drafts_and_teachers_travel_by_name_only(tmp_path, monkeypatch, value, stays):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    for name, option in (("draft", "draft"), ("cspd", "draft"), ("code", "draft")):
        config = {"_class_name": SAMPLERS[name].__name__, option: value}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            sampler: Any = SAMPLERS[name].from_config(config)
        assert sampler.config[option] == (None if stays else value)
        assert len(said) == stays
    if isinstance(value, str):
        get_sampler("draft", draft=value).save_pretrained(tmp_path / "saved")
        written = json.loads((tmp_path / "saved" / "sampler_config.json").read_text())
        assert written.get("draft") == (None if stays else value)


def test_a_pipeline_recommends_no_folder(folder):
    edit(folder / "model_index.json", draft="/home/me/model")
    with pytest.warns(UserWarning, match="left out draft='/home/me/model'"):
        assert arvision.load(folder, device="cpu").config["draft"] is None
    own = ARPipeline.from_model(tiny_llamagen(), draft=str(folder))
    own.save_pretrained(folder / "again")
    assert "draft" not in json.loads((folder / "again" / "model_index.json").read_text())


def test_every_option_that_names_a_place_is_declared():
    for entry in SAMPLERS:
        known = set(entry.value.needs) | set(entry.value.local_files)
        options = set(get_sampler(entry.name).config)
        named = {name for name in options if any(w in name for w in ("file", "path", "folder"))}
        assert named <= known
        assert set(entry.value.local_files) <= options


def test_a_home_is_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    pipe = ARPipeline.from_model(tiny_llamagen())
    pipe.save_pretrained(tmp_path / "model")
    assert arvision.load("~/model", device="cpu").kind == "token"
    with pytest.raises(InputError, match="no-such-user"):
        arvision.load("~no-such-user/model", device="cpu")


# What a folder may not make us run.


def code(path, mark):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"open({str(mark)!r}, 'w').close()\nclass Foo:\n    pass\n")


def strangers(folder, mark, kind):
    """Let a folder ask for its own code to be run, which would leave a mark."""
    index = folder / "model_index.json"
    if kind == "component":
        code(folder / "transformer" / "my_mod.py", mark)
        edit(index, transformer=["my_mod", "Foo"])
    elif kind == "module on the path":
        code(folder.parent / "path" / "my_mod.py", mark)
        edit(index, transformer=["my_mod", "LlamaGenTransformer"])
    elif kind == "sampler":
        code(folder / "sampler" / "samp.py", mark)
        edit(index, sampler=["samp", "Foo"])
    elif kind == "pipeline":
        code(folder / "pipeline.py", mark)
        edit(index, _class_name=["pipeline", "Foo"])
    elif kind == "pipeline beside":
        code(folder / "pipeline.py", mark)
    elif kind == "custom_pipeline":
        code(folder / "pipeline.py", mark)
        edit(index, custom_pipeline=str(folder))
    elif kind == "auto_map":
        edit(folder / "transformer" / "config.json", auto_map={"AutoModel": "my_mod.Foo"})
    elif kind == "auto class":
        edit(index, transformer=["diffusers", "AutoModel"])
    elif kind == "text encoder":
        edit(index, text_encoder=["transformers", "AutoModel"])
    elif kind == "any function":
        edit(index, text_encoder=["subprocess", "run"])
    elif kind == "other part":
        edit(index, helper=["my_mod", "Foo"])


@pytest.mark.parametrize(
    "kind",
    [
        *("component", "module on the path", "sampler", "pipeline", "pipeline beside"),
        *("custom_pipeline", "auto_map", "auto class", "text encoder", "any function"),
        "other part",
    ],
)
def test_nothing_of_a_folder_is_run(folder, tmp_path, monkeypatch, kind):
    mark = tmp_path / "mark"
    strangers(folder, mark, kind)
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    monkeypatch.syspath_prepend(str(folder))
    refused(folder)
    with pytest.raises(CheckpointError):
        ARPipeline.from_pretrained(folder)
    assert not mark.exists()


@pytest.mark.parametrize("option", ["custom_pipeline", "trust_remote_code"])
def test_nobody_can_ask_for_code(folder, option):
    with pytest.raises(InputError, match=option):
        ARPipeline.from_pretrained(folder, **{option: str(folder)})


# What does not fit.


def refused(folder, *words):
    """Refused at once, in one line that holds these words."""
    started = time.perf_counter()
    with pytest.raises(CheckpointError) as found:
        arvision.load(folder, device="cpu")
    said = str(found.value)
    assert "\n" not in said
    assert str(folder) in said
    assert len(said) < 500
    for word in words:
        assert word in said
    assert time.perf_counter() - started < 60, "seconds on a loaded machine, not minutes"


TRANSFORMER = [
    ("num_layers", 1, "unexpected"),
    ("num_layers", 3, "layers.2.attention.wqkv.weight' is missing"),
    ("num_layers", 0, "num_layers 0: expected"),
    ("num_layers", 10**6, "num_layers 1000000"),
    ("num_layers", "2", "num_layers '2': expected an integer"),
    ("num_layers", None, "num_layers None"),
    ("num_layers", 2.5, "num_layers 2.5"),
    ("num_layers", True, "num_layers True"),
    ("num_layers", [2], "num_layers [2]"),
    ("num_layers", 10**400, "bits"),
    ("hidden_size", 10**9, "hidden_size 1000000000"),
    ("hidden_size", 128, "has shape [4, 32], expected [4, 128]"),
    ("vocab_size", -1, "vocab_size -1"),
    ("num_heads", 0, "num_heads 0"),
    ("rope_theta", float("nan"), "NaN"),
    ("rope_theta", -1.0, "rope_theta -1.0: expected"),
    ("norm_eps", 0, "norm_eps 0: expected a finite number > 0"),
    ("grid", [0, 6], "grid[0] 0"),
    ("grid", 6, "grid 6: expected a list of 2"),
    ("grid", [6, 6, 6], "grid [6, 6, 6]"),
    ("num_layer", 2, "unknown name 'num_layer'"),
    ("_class_name", "VARTransformer", "a saved 'VARTransformer'"),
    ("_class_name", ["my_mod", "LlamaGenTransformer"], "expected 'LlamaGenTransformer'"),
]
TOKENIZER = [
    ("num_res_blocks", 10**8, "num_res_blocks 100000000"),
    ("num_res_blocks", 10**5, "num_res_blocks 100000"),
    ("num_recorded", 10**8, "num_recorded 100000000"),
    ("num_recorded", 10**7, "codebook_used"),
    ("ch_mult", [1] * 10**5, "ch_mult a list of 100000"),
    ("ch_mult", [1, "x"], "ch_mult[1] 'x'"),
    ("ch", 33, "ch 33"),
    ("codebook_size", 7, "'quantize.embedding.weight' has shape"),
]


@pytest.mark.parametrize(
    ("part", "option", "value", "words"),
    [("transformer", *row) for row in TRANSFORMER] + [("tokenizer", *row) for row in TOKENIZER],
)
def test_sizes_are_those_of_the_weights(folder, part, option, value, words):
    edit(folder / part / "config.json", **{option: value})
    refused(folder, words)


def other_weights(path, kind):
    weights = load_file(path)
    key = "layers.0.attention.wo.weight"
    if kind == "extra":
        weights["layers.0.attention.more.weight"] = torch.zeros(2)
    elif kind == "missing":
        del weights[key]
    elif kind == "misshapen":
        weights[key] = weights[key][:-1].clone()
    elif kind == "integers":
        weights = {k: v.to(torch.int32) for k, v in weights.items()}
    path.unlink()
    save_file(weights, path)


WEIGHTS = {
    "extra": "'layers.0.attention.more.weight' is unexpected",
    "missing": "'layers.0.attention.wo.weight' is missing",
    "misshapen": "'layers.0.attention.wo.weight' has shape",
    "integers": "holds I32, expected floating-point numbers",
    "empty": "is empty",
    "truncated": "not complete",
    "pointer": "git-lfs pointer",
    "page": "HTML page",
    "text": "JSON",
    "pickle": "may hold code",
    "none": "transformer: ",
    "pipe": "a pipe or a device",
    "tokenizer's": "is missing",
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_are_those_of_the_network(folder, kind):
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    contents = {
        "empty": b"",
        "truncated": path.read_bytes()[:-100],
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        "page": b"<!DOCTYPE html><html>404</html>",
        "text": b'{"error": "not found"}',
    }
    if kind in contents:
        path.write_bytes(contents[kind])
    elif kind == "pickle":
        path.rename(path.with_suffix(".bin"))
    elif kind == "none":
        path.unlink()
    elif kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif kind == "tokenizer's":
        shutil.copy(folder / "tokenizer" / path.name, path)
    else:
        other_weights(path, kind)
    refused(folder, WEIGHTS[kind])


def shrunk(name, folder):
    """A copy of an embedded model whose configurations may be written and whose weights are links."""

    def take(source, goal):
        return (
            os.symlink(source, goal)
            if source.endswith(".safetensors")
            else shutil.copy(source, goal)
        )

    return shutil.copytree(ASSETS / name, folder / name, copy_function=take)


EMBEDDED = [
    ("var-fashion", "transformer", "num_layers", 10**6),
    ("var-fashion", "transformer", "patch_nums", [1, 2, 3]),
    ("var-fashion", "tokenizer", "num_shared", 10**6),
    ("var-fashion", "tokenizer", "num_res_blocks", 10**8),
    ("var-fashion-dd", "transformer", "num_layers", 1),
    ("var-fashion-dd", "transformer", "timesteps", [0, "1"]),
    ("mar-fashion", "transformer", "encoder_depth", 10**6),
    ("mar-fashion", "transformer", "head_depth", 10**6),
    ("mar-fashion", "tokenizer", "scaling_factor", 0),
    ("mar-fashion", "tokenizer", "num_res_blocks", 10**6),
    ("mar-fashion-draft", "transformer", "num_buffer", 10**6),
    ("llamagen-fashion-dd", "transformer", "num_layers", 10**6),
    ("llamagen-fashion-t2i", "text_encoder", "num_layers", 10**6),
    ("llamagen-fashion-t2i", "text_encoder", "num_layers", 1),
    ("llamagen-fashion-t2i", "text_encoder", "d_ff", 7),
]


@pytest.mark.parametrize(("name", "part", "option", "value"), EMBEDDED)
def test_every_family_and_part_is_checked(tmp_path, name, part, option, value):
    folder = shrunk(name, tmp_path)
    edit(folder / part / "config.json", **{option: value})
    refused(folder)


def test_a_network_alone_is_checked(folder):
    edit(folder / "transformer" / "config.json", num_layers=3)
    with pytest.raises(CheckpointError, match="layers"):
        LlamaGenTransformer.from_pretrained(folder / "transformer")
    with pytest.raises(CheckpointError, match="layers"):
        LlamaGenTransformer.from_pretrained(folder, subfolder="transformer")


def test_shards_are_checked(folder):
    network = arvision.load(folder, device="cpu").transformer
    shutil.rmtree(folder / "transformer")
    network.save_pretrained(folder / "transformer", max_shard_size="10KB")
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    again = arvision.load(folder, device="cpu").transformer
    assert torch.equal(again.output.weight, network.output.weight)
    places = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=places | {"norm.weight": "../../elsewhere.safetensors"})
    refused(folder, "elsewhere.safetensors")
    edit(index, weight_map={k: v for k, v in places.items() if k != "norm.weight"})
    refused(folder, "'norm.weight'")


# What stands where an object should.

WRONG = {
    "list": "[]",
    "null": "null",
    "number": "3",
    "text": '"x"',
    "not a number": "NaN",
    "deep": "[" * 100_000,
    "twice": '{"_class_name": "ARPipeline", "_class_name": "ARPipeline"}',
    "torn": '{"_class_name": ',
    "empty": "",
}


@pytest.mark.parametrize(
    "kind", [*WRONG, "mark", "utf-16", "bytes", "large", "pipe", "folder", "link"]
)
@pytest.mark.parametrize(
    "file",
    ["model_index.json", "card.json", "transformer/config.json", "sampler/sampler_config.json"],
)
def test_configurations_are_objects(folder, file, kind):
    path = folder / file
    content = path.read_bytes() if path.exists() else b"["
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("/dev/zero")
    elif kind == "large":
        with path.open("wb") as out:
            out.truncate(1 << 30)
    elif kind == "mark":
        path.write_bytes(b"\xef\xbb\xbf" + content)
    elif kind == "utf-16":
        path.write_text("{}", encoding="utf-16")
    elif kind == "bytes":
        path.write_bytes(b'{"a": "\xff"}')
    else:
        path.write_text(WRONG[kind])
    refused(folder)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("class_names", "abc", "class_names 'abc'"),
        ("class_names", [1, 2], "class_names[0] 1"),
        ("guidance_scale", "3", "guidance_scale '3'"),
        ("guidance_scale", [1, None], "guidance_scale"),
        ("temperature", {"a": 1}, "temperature an object of 1"),
        ("top_k", [], "top_k []"),
        ("top_p", None, "top_p None"),
        ("num_threads", -1, "num_threads -1"),
        ("num_threads", 10**12, "num_threads"),
        ("draft", 3, "draft 3"),
        ("calibration", [1], "calibration [1]"),
        ("calibration", {"a": "x"}, "calibration['a'] 'x'"),
        ("transformer", None, "transformer None"),
        ("transformer", [None, None], "transformer [None, None]"),
        ("transformer", "LlamaGenTransformer", "expected [library, class]"),
        ("tokenizer", ["arvision.samplers.ar", "ARSampler"], "tokenizer"),
        ("sampler", ["arvision.samplers.ar", "TokenSampler"], "a registered sampler"),
        ("more", 1, "unknown name 'more'"),
        ("_class_name", 3, "a saved 3"),
    ],
)
def test_values_of_an_index(folder, option, value, words):
    edit(folder / "model_index.json", **{option: value})
    refused(folder, words)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sjd", {"window": []}),
        ("sjd", {"window": "all"}),
        ("sjd", {"window": "auto", "cost_table": [["x"]]}),
        ("sjd", {"coupling": 3}),
        ("ar", {"temperature": "hot"}),
        ("ar", {"top_p": -1}),
        ("ar", {"top_k": None}),
        ("draft", {"max_draft": None}),
    ],
)
def test_values_of_a_stored_sampler(folder, name, options):
    store_sampler(folder, name, **options)
    refused(folder)


@pytest.mark.parametrize(
    "shared",
    [
        {"tokenizer": "/etc"},
        {"tokenizer": "../llamagen-fashion"},
        {"tokenizer": "llamagen-fashion/../llamagen-fashion"},
        {"tokenizer": "somebody/model"},
        {"tokenizer": 3},
        {"../tokenizer": "llamagen-fashion"},
        {"transformer": "llamagen-fashion"},
        ["llamagen-fashion"],
        "llamagen-fashion",
    ],
)
def test_parts_are_shared_with_embedded_models_only(folder, shared):
    shutil.rmtree(folder / "tokenizer")
    (folder / "card.json").write_text(json.dumps({"shared": shared}))
    refused(folder, "card.json")


# Other files that a class reads its sizes from.


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("kind", "medusas", "did you mean 'medusa'"),
        ("kind", 3, "kind 3"),
        ("num_heads", 10**8, "num_heads 100000000"),
        ("num_heads", 10**6, "num_heads 1000000"),
        ("num_heads", 1, "is unexpected"),
        ("num_heads", 4, "is missing"),
        ("num_heads", "3", "num_heads '3'"),
        ("hidden_size", None, "hidden_size None"),
        ("hidden_size", 16, "has shape"),
    ],
)
def test_heads_of_text_models(tmp_path, option, value, words):
    save_heads(make_heads("medusa", 8, 3), torch.arange(5), tmp_path)
    assert load_heads(tmp_path)[0].num_heads == 3
    edit(tmp_path / "heads.json", **{option: value})
    with pytest.raises(CheckpointError, match=re.escape(words)):
        load_heads(tmp_path)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("num_guesses", 10**6, "num_guesses 1000000"),
        ("num_guesses", 2.5, "num_guesses 2.5"),
        ("num_guesses", 3, "expected 3, one for each guess"),
        ("layers", [1, -1], "-1"),
        ("layers", [1], "expected 2, one for each guess"),
        ("kind", [], "kind []"),
    ],
)
def test_pseudo_tokens_of_text_models(tmp_path, option, value, words):
    save_pseudo(make_pseudo("hidden_transfer", 8, 2, layers=(1, 2)), tmp_path)
    assert load_pseudo(tmp_path).num_guesses == 2
    edit(tmp_path / "pseudo.json", **{option: value})
    with pytest.raises(CheckpointError, match=re.escape(words)):
        load_pseudo(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"width": 16, "feature_dim": 128}, "has shape"),
        ({"width": "x"}, "'x'"),
        ({"widths": 16}, "unknown name 'widths'"),
        ([], "architecture []"),
        ({"width": 10**9}, "width 1000000000"),
    ],
)
def test_classifiers(tmp_path, sizes, words):
    shutil.copytree(ASSETS / "fashion-classifier", tmp_path, dirs_exist_ok=True)
    load_classifier(tmp_path)
    edit(tmp_path / "config.json", architecture=sizes)
    with pytest.raises(CheckpointError, match=re.escape(words)):
        load_classifier(tmp_path)


def test_shards_of_the_authors_lie_beside_their_index(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    (tmp_path / "in").mkdir()
    index = tmp_path / "in" / "model.safetensors.index.json"
    for content in (
        '{"weight_map": {"a": "../one.safetensors"}}',
        '{"weight_map": ["a"]}',
        "[]",
        "NaN",
    ):
        index.write_text(content)
        with pytest.raises(CheckpointError, match="index"):
            read_state_dict(tmp_path / "in", ())


# Prompts and runs.


PROMPTS = {
    "list.json": "[1, 2]",
    "null.json": "null",
    "records.json": '[{"prompt": 3}]',
    "none.json": '[{"text": "a dog"}]',
    "blank.json": '[{"prompt": " "}]',
    "styles.json": '{"anime": "a dog"}',
    "style.json": '{"anime": [3]}',
    "nan.json": '[{"prompt": "a", "seed": NaN}]',
    "deep.json": "[" * 100_000,
    "lines.jsonl": '{"prompt": "a"}\n[]\n',
    "torn.jsonl": '{"prompt": "a"}\n{"prompt"\n',
    "twice.jsonl": '{"prompt": "a", "prompt": "b"}',
    "empty.txt": "\n",
}


@pytest.mark.parametrize("name", [*PROMPTS, "utf-16.txt", "latin.txt", "large.txt", "pipe.txt"])
def test_prompt_files_are_checked(tmp_path, name):
    path = tmp_path / name
    if name == "utf-16.txt":
        path.write_text("a dog", encoding="utf-16")
    elif name == "latin.txt":
        path.write_bytes("ein Hündchen".encode("latin-1"))
    elif name == "large.txt":
        with path.open("wb") as out:
            out.truncate(1 << 30)
    elif name == "pipe.txt":
        os.mkfifo(path)
    else:
        path.write_text(PROMPTS[name])
    with pytest.raises(InputError) as found:
        read_prompts(path)
    assert str(path) in str(found.value)
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 300


def test_prompt_files_as_people_write_them(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa dog\r\n\r\na cat \u2028 asleep\n".encode())
    assert [r["prompt"] for r in read_prompts(path)] == ["a dog", "a cat \u2028 asleep"]
    lines = tmp_path / "prompts.jsonl"
    lines.write_bytes('\ufeff{"prompt": "a\u2028b", "n": 1}\n'.encode())
    assert read_prompts(lines) == [{"prompt": "a\u2028b", "n": 1}]


@pytest.fixture
def run(tmp_path):
    shards = ShardFolder(tmp_path / "run")
    shards.open({"num": 2, "model": "m"})
    shards.write(0, np.zeros((2, 4, 4, 3), np.uint8), None, 0, {"seconds": 1.0})
    return tmp_path / "run"


@pytest.mark.parametrize("kind", [*WRONG, "pipe", "large"])
def test_settings_of_a_run_are_checked(run, kind):
    path = run / "run.json"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "large":
        with path.open("wb") as out:
            out.truncate(1 << 30)
    else:
        path.write_text(WRONG[kind].replace("_class_name", "config"))
    with pytest.raises(InputError, match=r"run\.json"):
        ShardFolder(run).check_complete()


@pytest.mark.parametrize(
    "change",
    [
        *({"block": []}, {"block": "0"}, {"block": -1}, {"block": 1.5}, {"sha256": None}),
        *({"config": 3}, {"facts": []}, {"more": 1}, {"tokens_sha256": 4}, {"block": None}),
    ],
)
def test_entries_of_a_manifest_are_checked(run, change):
    path = run / "manifest-0000.jsonl"
    entry = json.loads(path.read_text())
    path.write_text(json.dumps(entry | change) + "\n")
    with pytest.raises(InputError, match=r"manifest-0000\.jsonl, line 1.*arvision eval repair"):
        ShardFolder(run).check_complete()
    ShardFolder(run).repair()
    assert ShardFolder(run).entries() == {}


def test_manifests_are_regular_files(run):
    os.mkfifo(run / "manifest-0001.jsonl")
    with pytest.raises(InputError, match="manifest-0001"):
        ShardFolder(run).check_complete()


def test_captions_of_coco_are_checked(tmp_path):
    path = tmp_path / "captions.json"
    image, caption = {"id": 1, "file_name": "a"}, {"id": 1, "image_id": 1, "caption": "a"}
    for content in (
        *(
            {},
            [],
            {"images": [image]},
            {"images": [image], "annotations": [caption | {"caption": 3}]},
        ),
        {"images": [image], "annotations": [caption | {"image_id": []}]},
        {"images": {"id": 1}, "annotations": []},
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(InputError, match="expected COCO captions"):
            choose_captions(path)


# What lies where we write.


@pytest.mark.parametrize("name", ["a.png", "a.json", "a.jsonl", "a.npz", "a.npy", "a.pt", "A.PNG"])
def test_files_of_another_kind_are_left_alone(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"My notes of ten years")
    for write in (lambda: write_bytes(path, b"{}"), lambda: check_out(path)):
        with pytest.raises(InputError, match="left as it is"):
            write()
    assert path.read_bytes() == b"My notes of ten years"
    path.write_bytes(b"")
    write_bytes(path, STARTS[path.suffix.lower()][0] + b" ours")
    write_bytes(path, b"again")


def test_pipes_and_devices_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="a pipe or a device"):
        write_bytes(tmp_path / "pipe", b"x")
    with pytest.raises(InputError, match="a pipe or a device"):
        write_bytes("/dev/null", b"x")


def test_every_path_of_the_command_line_knows_the_home(monkeypatch, tmp_path):
    option = re.compile(
        r"Annotated\[\s*Path(?: \| None)?,\s*typer\.Option\((.*?)\)\s*,?\s*\]", re.S
    )
    sources = [path.read_text() for path in Path(output.__file__).parent.glob("*.py")]
    found = [each for source in sources for each in option.findall(source)]
    assert len(found) > 20
    assert all("callback=" in each for each in found)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded(Path("~/out/a.png")) == tmp_path / "out" / "a.png"


def test_a_picture_in_the_home(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    ended = cli(
        "sample", "--model", "llamagen-fashion", "--prompt", "bag", "--quiet", "--out=~/a/b.png"
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "a" / "b.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "~").exists()


# Who may come in.


def test_a_registered_plug_in_is_known(tmp_path, monkeypatch):
    tiny = tiny_llamagen()
    network = PluginTransformer(**{k: v for k, v in tiny.transformer.config.items() if k[0] != "_"})
    monkeypatch.setitem(
        FAMILIES._entries, "PluginTransformer", FAMILIES.entry("LlamaGenTransformer")
    )
    ARPipeline(network, tiny.tokenizer).save_pretrained(tmp_path)
    assert type(arvision.load(tmp_path, device="cpu").transformer) is PluginTransformer
    edit(tmp_path / "transformer" / "config.json", num_layers=10**6)
    refused(tmp_path, "num_layers 1000000")
    monkeypatch.delitem(FAMILIES._entries, "PluginTransformer")
    refused(tmp_path, "no class that arvision loads")


class PluginTransformer(LlamaGenTransformer):
    """A network of a package outside."""


def test_a_list_of_samplers_needs_a_network_that_we_know(folder):
    for entry in (["a", ["b"]], 3, None, ["arvision.models", "Nothing"], ["a"]):
        edit(folder / "model_index.json", transformer=entry)
        with pytest.raises((CheckpointError, InputError)) as found:
            arvision.list_samplers(folder)
        assert "\n" not in str(found.value)


def test_weights_of_integers_are_no_weights():
    weights = {k: v.to(torch.int32) for k, v in tiny_llamagen().transformer.state_dict().items()}
    with pytest.raises(CheckpointError, match="holds int32, expected floating-point numbers"):
        LlamaGenTransformer.from_official(weights, num_heads=2, grid=(6, 6))


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("num_hidden_layers", 1, "layers.1"),
        ("num_hidden_layers", 3, "layers.3"),
        ("num_hidden_layers", 5, "layers.4"),
        ("num_hidden_layers", 10**6, "num_hidden_layers 1000000"),
        ("num_hidden_layers", 0, "num_hidden_layers 0"),
        ("num_hidden_layers", "2", "num_hidden_layers '2'"),
        ("vocab_size", 7, ""),
    ],
)
def test_text_models_are_those_of_their_weights(tmp_path, option, value, words):
    tiny_llama().save_pretrained(tmp_path)
    arvision.load("llamagen-fashion-t2i", device="cpu").text_tokenizer.save_pretrained(tmp_path)
    load_text_model(tmp_path)
    edit(tmp_path / "config.json", **{option: value})
    with pytest.raises(CheckpointError) as found:
        load_text_model(tmp_path)
    assert words in str(found.value)
    assert "\n" not in str(found.value)
