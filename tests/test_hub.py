"""Models from a hub on 127.0.0.1: what is fetched, what is kept, and what a failure says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from hub_server import COMMIT, TOKEN, Hub

import arvision
from arvision import CheckpointError, InputError
from arvision.needed import needed_files

NAME = "some-one/tiny-gen"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tiny_pipeline, tmp_path_factory) -> Path:
    """A pipeline's folder, with files beside it that nobody needs."""
    path = tmp_path_factory.mktemp("repo")
    tiny_pipeline.save_pretrained(path)
    tiny_pipeline.save_pretrained(path, variant="fp16")
    (path / "transformer" / "modeling.py").write_text("raise SystemExit('code was run')")
    (path / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (path / "huge.safetensors").write_bytes(b"x" * 1000)
    return path


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    served = Hub()
    served.repos[NAME] = folder
    # What the library makes of HF_ENDPOINT when it is imported.
    template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served.url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield served
    served.close()


@pytest.fixture
def load(hub, tmp_path):
    """`arvision.load` with a cache of its own, and the same cache every time."""

    def run(name=NAME, **options):
        return arvision.load(name, device="cpu", cache_dir=tmp_path / "cache", **options)

    return run


def weights(pipe):
    return next(iter(pipe.transformer.parameters()))


def test_first_download_then_the_cache(hub, load, tiny_pipeline, tmp_path):
    pipe = load()
    assert torch.equal(weights(pipe), weights(tiny_pipeline))
    drawn = pipe(1, seed=3, output_type="latent", progress=False).tokens
    assert torch.equal(drawn, tiny_pipeline(1, seed=3, output_type="latent", progress=False).tokens)
    fetched = {name.split(f"/{COMMIT}/")[-1] for name in hub.asked if COMMIT in name}
    assert WEIGHTS in fetched
    unwanted = (".py", ".bin", ".md", "fp16.safetensors", "huge.safetensors")
    assert not [name for name in fetched if name.endswith(unwanted)]
    hub.sent.clear()
    hub.asked.clear()
    load()
    assert not sum(hub.sent.values())
    load(force_download=True)
    assert hub.sent[WEIGHTS]
    hub.close()
    for options in ({}, {"local_files_only": True}):
        assert torch.equal(weights(load(**options)), weights(tiny_pipeline))
    assert [each.name for each in (tmp_path / "cache").glob("models--*")] == [
        "models--some-one--tiny-gen"
    ]


def test_options_of_two_values_are_no_parts(hub, load, tmp_path, tiny_pipeline):
    path = tmp_path / "two"
    tiny_pipeline.save_pretrained(path)
    index = json.loads((path / "model_index.json").read_text())
    index |= {"guidance_scale": [2.0, 3.0], "class_names": ["cat", "dog"]}
    (path / "model_index.json").write_text(json.dumps(index))
    hub.repos["some-one/two"] = path
    with pytest.raises(CheckpointError, match="class_names"):  # the model has three
        load("some-one/two")
    assert not [name for name in hub.asked if "class_names/" in name or "guidance_scale/" in name]


def test_revisions_and_variants(hub, load):
    load(revision="v1")
    load(variant="fp16", revision=COMMIT)
    variant = WEIGHTS.replace(".", ".fp16.")
    assert hub.asked[f"HEAD /{NAME}/resolve/{COMMIT}/{variant}"] == 1
    with pytest.raises(InputError, match=f"revision 'v2': {NAME} has none at {hub.url}"):
        load(revision="v2")
    with pytest.raises(
        InputError, match=r"variant 'int3': .*no such weights, expected one of fp16"
    ):
        load(variant="int3")
    with pytest.raises(CheckpointError, match="no such folder, the hub is not asked"):
        load(revision="v3", local_files_only=True)


def test_a_broken_connection_is_resumed(hub, load, tiny_pipeline, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 16)
    hub.cut[WEIGHTS] = 1
    pipe = load()
    assert torch.equal(weights(pipe), weights(tiny_pipeline))
    size = (hub.repos[NAME] / WEIGHTS).stat().st_size
    assert hub.sent[WEIGHTS] == size  # the second half was asked for, and nothing twice


def test_an_interrupted_download_goes_on_with_what_is_missing(hub, load, tiny_pipeline):
    hub.hidden.add(WEIGHTS)
    with pytest.raises(CheckpointError, match=f"{NAME}: file {WEIGHTS} is missing at {hub.url}"):
        load()
    with pytest.raises(CheckpointError, match=r"transformer/ has no weights"):
        load(local_files_only=True)
    hub.hidden.clear()
    hub.sent.clear()
    assert torch.equal(weights(load()), weights(tiny_pipeline))
    assert [name for name, sent in hub.sent.items() if sent] == [WEIGHTS]


def test_a_corrupt_file_is_found_and_not_kept(hub, load, tiny_pipeline):
    hub.spoiled[WEIGHTS] = b"\xff" * 8
    with pytest.raises(CheckpointError, match=rf"{NAME}: file {WEIGHTS} has sha256 .*load again"):
        load()
    hub.spoiled.clear()
    assert torch.equal(weights(load()), weights(tiny_pipeline))


def test_a_file_that_was_cut_on_this_machine(hub, load, tmp_path):
    load()
    (held,) = (tmp_path / "cache").glob(f"*/snapshots/*/{WEIGHTS}")
    whole = held.read_bytes()
    place = Path(os.path.realpath(held))
    place.write_bytes(whole[:-100])
    with pytest.raises(
        CheckpointError, match=rf"{WEIGHTS} has \d+ bytes, the hub says \d+: delete"
    ):
        load()
    hub.close()
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} is broken .*not complete"):
        load()


def test_access(hub, load):
    hub.private.add(NAME)
    with pytest.raises(InputError, match=rf"{NAME}: .*refuses access \(401\): expected token="):
        load()
    with pytest.raises(InputError, match="refuses access"):
        load(token="hf_wrong")
    load(token=TOKEN)
    hub.private.clear()
    hub.gated.add(NAME)
    with pytest.raises(InputError, match="after its terms were accepted at"):
        load()


def test_what_is_not_there(hub, load):
    with pytest.raises(
        InputError, match=r"'no/body': no such folder, and no such repository .*404"
    ):
        load("no/body")
    with pytest.raises(InputError, match=r"model 'x/bad--name..'"):
        load("x/bad--name..")
    with pytest.raises(InputError, match=r"token: .* is a folder"):
        arvision.load("llamagen-fashion", token="hf_x")
    hub.is_ill = True
    with pytest.raises(CheckpointError, match=r"answers with 500.*does not hold it"):
        load()
    hub.close()
    with pytest.raises(CheckpointError, match=r"cannot be reached \(ConnectError\).*does not hold"):
        load()


def test_a_repository_that_is_no_pipeline(hub, load, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    hub.repos["some-one/other"] = other
    (other / "weights.pth").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"neither model_index.json nor config.json.*weights"):
        load("some-one/other")
    shutil.copytree(hub.repos[NAME], other, dirs_exist_ok=True)
    for path in (other / "transformer").glob("*.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"transformer/ has no weights.*may hold code"):
        load("some-one/other")
    shutil.rmtree(other / "transformer")
    with pytest.raises(CheckpointError, match="part transformer/ is missing"):
        load("some-one/other")
    (other / "model_index.json").write_text("<html>")
    hub.repos["some-one/page"] = other
    with pytest.raises(CheckpointError, match=r"file model_index.json cannot be read as JSON"):
        load("some-one/page")


def test_shards_are_those_that_the_index_names():
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-2.safetensors"}}
    files: dict[str, Any] = dict.fromkeys(
        ("config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors")
    )
    contents = {"config.json": {}, "model.safetensors.index.json": index}
    with pytest.raises(CheckpointError, match=r"r: file model-2.safetensors is missing, which"):
        needed_files("r", files, contents.__getitem__)
    files["model-2.safetensors"] = files["consolidated.safetensors"] = files["x.py"] = None
    assert needed_files("r", files, contents.__getitem__) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-2.safetensors",
        "model.safetensors.index.json",
    ]


def test_the_command_line_and_the_samplers_of_a_repository(hub, tmp_path, monkeypatch):
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    environment.pop("HF_HUB_CACHE", None)
    line = [sys.executable, "-m", "arvision.cli", "sample", "--model", NAME, "--prompt", "1"]
    line += ["--seed", "0", "--quiet", "--json", "--out", str(tmp_path / "a.png")]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] > 0
    with monkeypatch.context() as patched:
        patched.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        hub.asked.clear()
        pipe = arvision.load(NAME, device="cpu", cache_dir=tmp_path / "home" / "hub")
        assert not hub.asked
    assert arvision.list_samplers(NAME) == arvision.list_samplers(pipe)
    assert set(arvision.list_samplers(NAME)) >= {"ar", "sjd"}
