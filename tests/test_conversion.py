"""Published checkpoints to folders, what a thing is, and the list of known models."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import arvision
from arvision import InputError
from arvision.catalog import list_known_models
from arvision.inspection import UNKNOWN, inspect
from arvision.known import RegistryError, known_models, parse
from arvision.models import MAR, VAR, Infinity, LlamaGen, LlamaGenTransformer, NextStep, VARStudent

CASES: dict[str, dict[str, Any]] = {
    "llamagen": {
        "files": ("llamagen/gpt_c2i.pt", "llamagen/vq16.pt"),
        "sizes": {"num_heads": 4, "grid": 4},
        "read": LlamaGen.from_official,
        "kind": "token",
    },
    "var": {
        "files": ("var/var_d2_shared_aln.pth", "var/var_d2_shared_aln_vae.pth"),
        "sizes": {},
        "read": VAR.from_official,
        "kind": "scale",
    },
    "mar": {
        "files": ("mar/mar.pth", "mar/mar_kl16.ckpt"),
        "sizes": {"num_heads": 4, "grid": 4, "num_sampling_steps": 4},
        "read": MAR.from_official,
        "kind": "continuous",
    },
    "infinity": {
        "files": ("infinity/infinity.pth", "infinity/infinity_vae.pth"),
        "sizes": {"pixels": "0.06M"},
        "read": Infinity.from_official,
        "kind": "scale",
    },
    "nextstep": {
        "files": ("nextstep/nextstep", None),
        "sizes": {"grid": 4, "num_sampling_steps": 3, "release": 1},
        "read": NextStep.from_official,
        "kind": "continuous",
    },
}
PROMPTS = {"infinity": torch.randn(5, 256), "nextstep": torch.tensor([3, 4, 50])}


def command(family, goldens, out, **more):
    case = CASES[family]
    transformer, tokenizer = case["files"]
    line = ["convert", "--from", family, "--transformer", str(goldens / transformer)]
    if tokenizer is not None:
        line += ["--tokenizer", str(goldens / tokenizer)]
    for name, value in {**case["sizes"], **more}.items():
        line += ["--size", f"{name}={value}"]
    return [*line, "--out", str(out)]


@pytest.mark.parametrize("family", CASES)
def test_a_converted_folder_is_the_checkpoint(family, goldens, tmp_path, cli):
    out = tmp_path / "pipe"
    done = cli(*command(family, goldens, out))
    assert done.returncode == 0, done.stderr
    assert f'arvision.load("{out}")' in done.stdout
    pipe = arvision.load(out, device="cpu")
    assert pipe.kind == CASES[family]["kind"]
    transformer, tokenizer = CASES[family]["files"]
    sizes = dict(CASES[family]["sizes"])
    if family == "nextstep":
        sizes["release"] = "1"
    if "grid" in sizes:
        sizes["grid"] = (4, 4)
    files = [goldens / transformer] + ([] if tokenizer is None else [goldens / tokenizer])
    model = CASES[family]["read"](*files, **sizes)
    for part in ("transformer", "tokenizer"):
        own, read = getattr(pipe, part).state_dict(), getattr(model, part).state_dict()
        assert own.keys() == read.keys()
        assert all(torch.equal(own[key], read[key]) for key in own)
    again = cli(*command(family, goldens, out))
    assert again.returncode == 2
    assert str(out) in again.stderr
    facts = inspect(out)
    assert facts["load"] == f'arvision.load("{out}")'
    assert "parameters" in facts["parts"]["transformer"]
    assert inspect(files[0])["family"] == family


def test_students(goldens, tmp_path, cli):
    out = tmp_path / "pipe"
    vae = goldens / "var" / "var_d2_shared_aln_vae.pth"
    student = goldens / "dd" / "var_dd_d2_shared_aln.pth"
    done = cli(
        "convert", "--from", "dd", "--transformer", student, "--tokenizer", vae, "--out", out
    )
    if done.returncode == 2:  # the small file says less than the published ones
        assert "timesteps" in done.stderr or "patch_nums" in done.stderr, done.stderr
        settings = json.loads((goldens / "dd" / "var_dd_d2_shared_aln.json").read_text())
        sizes = {"timesteps": settings["timesteps"], "split": settings["split"]}
        line = [f"--size={name}={json.dumps(value)}" for name, value in sizes.items()]
        done = cli(
            *("convert", "--from", "dd", "--transformer", student, "--tokenizer", vae),
            *(*line, "--out", out),
        )
    assert done.returncode == 0, done.stderr
    pipe = arvision.load(out, device="cpu")
    assert (pipe.kind, pipe.sampler.name) == ("student", "dd")
    assert isinstance(pipe.model, VARStudent)
    assert inspect(student)["family"] == "dd"
    wrong = cli("convert", "--from", "dd", "--transformer", vae, "--tokenizer", vae, "--out", out)
    assert wrong.returncode == 2


def test_the_authors_settings_go_by_the_files_name(goldens, tmp_path, cli):
    named = tmp_path / "c2i_B_256.pt"
    shutil.copy(goldens / "llamagen" / "gpt_c2i.pt", named)
    line = ["convert", "--from", "llamagen", "--transformer", str(named), "--size", "num_heads=4"]
    done = cli(*line, "--size", "grid=4", "--json", "--out", str(tmp_path / "pipe"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["settings"]["top_k"] == 2000
    pipe = arvision.load(tmp_path / "pipe", device="cpu")
    assert (pipe.config["guidance_scale"], pipe.config["top_k"]) == (4.0, 2000)
    with pytest.raises(InputError, match="no tokenizer"):
        pipe(1, seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "llamagn"], "did you mean 'llamagen'"),
        (["--from", "var"], "no tokenizer: var is read with one"),
        (["--from", "llamagen", "--size", "heads=4"], "unknown size of a LlamaGen transformer"),
        (["--from", "llamagen", "--dtype", "int8"], "dtype 'int8'"),
        (["--from", "mar"], "key"),
        (["--from", "infinity"], "key"),
        (["--from", "nextstep"], "no such folder"),
        (["--from", "llamagen", "--text-encoder", "/nowhere/t5"], "text encoder '/nowhere/t5'"),
    ],
)
def test_bad_conversions_are_one_line_and_write_nothing(arguments, message, goldens, tmp_path, cli):
    out = tmp_path / "pipe"
    file = goldens / "llamagen" / "gpt_c2i.pt"
    done = cli("convert", *arguments, "--transformer", str(file), "--out", str(out))
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_info_on_files(goldens, tmp_path):
    for file, what in (
        ("llamagen/vq16.pt", "LlamaGen tokenizer"),
        ("var/var_d2_shared_aln_vae.pth", "VAR tokenizer"),
        ("mar/mar_kl16.ckpt", "MAR autoencoder"),
        ("infinity/infinity_vae.pth", "Infinity tokenizer"),
        ("nextstep/nextstep/vae/checkpoint.pt", "NextStep autoencoder"),
    ):
        facts = inspect(goldens / file)
        assert facts["what"] == f"a {what}"
        assert "--tokenizer" in facts["load"]
        assert facts["parameters"] > 1000
    cut = tmp_path / "a.safetensors"
    save_file({"x.weight": torch.zeros(3)}, cut)
    assert inspect(cut)["what"] == f"{UNKNOWN}: 1 tensors (x.weight, ...)"
    cut.write_bytes(cut.read_bytes()[:-2])
    with pytest.raises(arvision.CheckpointError, match="not complete"):
        inspect(cut)
    evil = tmp_path / "evil.pt"
    evil.write_bytes(pickle.dumps(Path))
    torch.save({"x": pickle.PickleError("boo")}, tmp_path / "evil2.pt")
    for path in (evil, tmp_path / "evil2.pt"):
        assert inspect(path)["what"].startswith(UNKNOWN)
    (tmp_path / "a.gguf").write_bytes(b"GGUF1234")
    assert "GGUF" in inspect(tmp_path / "a.gguf")["what"]
    (tmp_path / "notes.txt").write_text("hello")
    assert inspect(tmp_path / "notes.txt")["what"].startswith(UNKNOWN)


def test_info_on_folders_and_names(tmp_path, cli, monkeypatch):
    def never(*_, **__):
        raise AssertionError("a network was built")

    monkeypatch.setattr(LlamaGenTransformer, "__init__", never)
    done = cli("info", "llamagen-fashion", "--json")
    assert json.loads(done.stdout)["kind"] == "token"
    assert "parameters" in json.loads(done.stdout)["parts"]["transformer"]
    for name, words in (
        ("var-d16", ("MIT", "FID 3.55", "arvision convert --from var")),
        ("glm-image", ("zai-org/GLM-Image", "temperature 0.9")),
    ):
        done = cli("info", name)
        assert done.returncode == 0
        assert all(word in done.stdout for word in words), done.stdout
    done = cli("info", "nothing-of-the-kind")
    assert done.returncode == 2
    assert "no known model" in done.stderr
    for config, what in (
        ({"architectures": ["JanusForConditionalGeneration"]}, "an image model of transformers"),
        ({"architectures": ["LlamaForCausalLM"]}, "a language model of transformers"),
        ({"architectures": ["BertModel"]}, f"{UNKNOWN}: a network (BertModel)"),
        ({"model_type": "x", "auto_map": {}}, f"{UNKNOWN}: a network (x), by code"),
        ({"fm_head_dim": 3}, "a NextStep model"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        facts = inspect(tmp_path)
        assert facts["what"].startswith(what)
        assert facts["load"]
    (tmp_path / "config.json").unlink()
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    assert inspect(tmp_path)["what"] == f"{UNKNOWN}: a pipeline of diffusers (FluxPipeline)"
    (tmp_path / "model_index.json").unlink()
    assert inspect(tmp_path)["what"] == f"{UNKNOWN}: a folder with nothing"


def test_the_list_of_known_models(cli):
    found = {one.name: one for one in known_models()}
    assert {one.family for one in found.values()} >= {
        *("LlamaGen", "VAR", "MAR", "LlamaGen-DD", "VAR-DD", "Infinity", "NextStep"),
        *("GLM-Image", "Janus", "Emu3", "Chameleon", "Lumina-mGPT"),
    }
    for one in found.values():
        assert one.source
        assert one.checked["hub"]
        assert not (one.quality or one.speed) or "README" in one.source or "20" in one.source
        assert one.load.startswith(("arvision convert --from ", "arvision.load("))
    assert found["var-d16"].size == "310M, 0.62 GB in bfloat16"
    listed = {str(one): one for one in list_known_models()}
    assert "zipar" not in listed["glm-image"].facts["samplers"]
    assert set(listed["llamagen-b-256"].facts["samplers"]) >= {"ar", "sjd", "zipar"}
    assert listed["var-d16-dd"].facts["samplers"] == ["dd"]
    done = cli("models", "--all")
    assert all(name in done.stdout for name in found)
    assert found["glm-image"].checked["licence"] is None
    assert "NOT looked up: licence" in done.stdout.split("\nglm-image")[1].split("\n\n")[0]
    assert "NOT looked up" not in done.stdout.split("\nvar-d16 ")[1].split("\n\n")[0]
    everything = json.loads(cli("models", "--all", "--json").stdout)
    assert {"licence", "settings", "samplers", "files"} <= set(everything[-1])
    lines = [one for one in cli("models").stdout.splitlines() if one]
    assert len(lines) == len(arvision.list_models())
    code = (
        "import sys, arvision; arvision.catalog.list_known_models(); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", "import arvision.catalog;" + code], capture_output=True, text=True
    )
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "tokens"}, "kind 'tokens'"),
        ({"hub": "x"}, "hub 'x'"),
        ({"settings": {"cfg": 1}}, "settings"),
        ({"files": {}}, "expected files and a source"),
        ({"checked": {"hub": "here"}}, "checked: expected hub, licence, size"),
        ({"parameters": "2B"}, "parameters"),
        ({"colour": "red"}, "unknown fields colour"),
    ],
)
def test_a_wrong_entry_is_named(change, message):
    entry = json.loads((Path(arvision.__file__).parent / "known_models.json").read_text())[0]
    parse([entry])
    with pytest.raises(RegistryError, match=message):
        parse([entry | change])
    with pytest.raises(RegistryError, match="stands twice"):
        parse([entry, entry])
