"""Folders that strangers made: read whole or refused in one line, nothing run, nothing overwritten."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest

import arvision
from arvision import ARPipeline, InputError
from arvision.samplers import SAMPLERS, SJDSampler, get_sampler
from arvision.testing import tiny_llamagen


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
            sampler = SAMPLERS[name].from_config(config)
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
