"""Fine-tuning on a person's own pictures: whole and by LoRA, out of official files and folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import arvision
from arvision import ARPipeline, CheckpointError, InputError
from arvision.models import (
    LlamaGen,
    LlamaGenTokenizer,
    LlamaGenTransformer,
    MARAutoencoder,
    MARTransformer,
    VARTokenizer,
    VARTransformer,
)
from arvision.training.finetune import FAMILIES, FinetuneSettings, finetune
from arvision.training.llamagen_text import build_text_encoder, build_text_tokenizer, words_of
from arvision.training.own_data import open_pictures
from arvision.training.own_watch import held_out_loss

WEIGHTS = "diffusion_pytorch_model.safetensors"
NAMES = ["dark", "light", "else"]
CODED = {"ch": 32, "ch_mult": (1, 1, 1), "num_res_blocks": 1, "codebook_size": 16}
SIZES: dict[str, Any] = {"hidden_size": 32, "num_heads": 2}


def llamagen_parts(**kind):
    torch.manual_seed(0)
    tokenizer = LlamaGenTokenizer(**CODED, z_channels=32, num_recorded=0)
    sizes = {"vocab_size": 16, "grid": (4, 4), "num_layers": 2, "intermediate_size": 32, **SIZES}
    return LlamaGenTransformer(**sizes, **(kind or {"num_classes": 3})), tokenizer


def var_parts():
    torch.manual_seed(0)
    shared: dict[str, Any] = {"patch_nums": (1, 2, 4), "z_channels": 8, "codebook_size": 16}
    tokenizer = VARTokenizer(**{**CODED, **shared})
    return VARTransformer(**shared, **SIZES, num_layers=2, num_classes=3), tokenizer


def mar_parts():
    torch.manual_seed(0)
    tokenizer = MARAutoencoder(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, latent_dim=4)
    sizes = {"latent_dim": 4, "grid": (4, 4), "encoder_depth": 1, "decoder_depth": 1, **SIZES}
    head: dict[str, Any] = {
        "head_width": 32,
        "head_depth": 1,
        "num_buffer": 2,
        "num_sampling_steps": 4,
    }
    return MARTransformer(**sizes, **head, num_classes=3), tokenizer


PARTS = {"llamagen": llamagen_parts, "var": var_parts, "mar": mar_parts}


def pipe_of(kind):
    transformer, tokenizer = PARTS[kind]()
    return ARPipeline(transformer, tokenizer, class_names=NAMES)


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    """Dark and light pictures in subfolders called like classes, and captions of them."""
    folder = tmp_path_factory.mktemp("tones")
    generator, lines = np.random.default_rng(0), []
    for index in range(24):
        name, low = [("dark", 20), ("light", 180)][index % 2]
        (folder / name).mkdir(exist_ok=True)
        levels = np.full((16, 16, 3), low + generator.integers(0, 60), dtype=np.uint8)
        Image.fromarray(levels).save(folder / name / f"{index}.png")
        lines.append(f"{name}/{index}.png,a {name} picture\n")
    captions = folder.parent / "captions.csv"
    captions.write_text("file,text\n" + "".join(lines))
    return folder, captions


@pytest.fixture
def official(tmp_path):
    """The files of a tiny LlamaGen in the layout of the authors, the transformer in half precision."""
    transformer, tokenizer = llamagen_parts()
    weights = {key: value.half() for key, value in transformer.state_dict().items()}
    weights["freqs_cis"] = transformer.rotary()
    torch.save({"model": weights, "steps": 7}, tmp_path / "c2i.pt")
    torch.save({"model": tokenizer.state_dict()}, tmp_path / "vq.pt")
    return tmp_path / "c2i.pt", tmp_path / "vq.pt"


def check_falls(figures):
    assert figures["held_out_loss"]["best"] < figures["held_out_loss"]["first"]


@pytest.mark.parametrize("kind", ["llamagen", "var", "mar"])
def test_a_pipeline_is_tuned_whole(kind, tones, tmp_path):
    settings = FinetuneSettings(steps=12, batch_size=8, learning_rate=3e-3, sample_every=6)
    pipe = pipe_of(kind)
    pipe.save_pretrained(tmp_path / "before")
    before = {key: value.clone() for key, value in pipe.tokenizer.state_dict().items()}
    figures = finetune(pipe, tones[0], tmp_path / "run", settings, name="tiny", progress=False)
    check_falls(figures)
    assert figures["trained"] == sum(part.numel() for part in pipe.transformer.parameters())
    tuned = arvision.load(tmp_path / "run", device="cpu")
    assert tuned.config["class_names"] == NAMES
    for key, value in tuned.tokenizer.state_dict().items():
        assert torch.equal(value, before[key])
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 2


def test_an_official_file_keeps_its_layout(official, tones, tmp_path, cli):
    out = tmp_path / "run"
    given = ["finetune", official[0], "--tokenizer", official[1], "--data", tones[0], "--out", out]
    given += [
        "--size",
        "num_heads=2",
        "--size",
        "grid=[4,4]",
        "--steps",
        12,
        "--sample-every",
        12,
        "--batch-size",
        8,
    ]
    done = cli(*map(str, given), "--learning-rate", "0.003", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    check_falls(json.loads(done.stdout))
    old, new = (torch.load(path, weights_only=True) for path in (official[0], out / "c2i.pt"))
    assert new.keys() == {"model"}
    assert {k: (v.shape, v.dtype) for k, v in new["model"].items()} == {
        k: (v.shape, v.dtype) for k, v in old["model"].items()
    }
    assert not torch.equal(new["model"]["output.weight"], old["model"]["output.weight"])
    assert torch.equal(new["model"]["freqs_cis"], old["model"]["freqs_cis"])
    model = LlamaGen.from_official(out / "c2i.pt", official[1], num_heads=2, grid=(4, 4))
    assert model.start([0, 1])[1].shape == (2, 16)
    names = json.loads((out / "classes.json").read_text())["class_names"]
    assert names == ["dark", "light", "2"]  # the file names no classes


@pytest.mark.parametrize("kind", ["llamagen", "var", "mar"])
def test_lora_changes_nothing_but_its_adapter(kind, tones, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    settings = FinetuneSettings(
        steps=12, batch_size=8, learning_rate=1e-2, sample_every=12, lora_rank=4, merge=True
    )
    pipe = pipe_of(kind)
    pipe.save_pretrained(tmp_path / "base")
    pipe = arvision.load(tmp_path / "base", device="cpu")
    before = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    figures = finetune(pipe, tones[0], tmp_path / "run", settings, name="tiny", progress=False)
    check_falls(figures)
    assert figures["trained"] < 0.6 * sum(value.numel() for value in before.values())
    state = torch.load(tmp_path / "run/work/transformer/checkpoint.pt", weights_only=True)
    assert all("lora_" in key for key in state["model"])
    # In peft's layout: peft reads it, and leaves the weights beside it as they are.
    adapter = tmp_path / "run" / "adapter"
    base: torch.nn.Module = arvision.load(tmp_path / "base", device="cpu").transformer
    wrapped: torch.nn.Module = peft.PeftModel.from_pretrained(base, str(adapter))
    kept = {
        key.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for key, value in wrapped.state_dict().items()
        if "lora_" not in key
    }
    assert kept.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in kept.items())
    # Merged by `load`, it is what was trained, and that is another model than the base.
    merged = arvision.load(tmp_path / "base", device="cpu", adapter=adapter)
    written = arvision.load(tmp_path / "run", device="cpu")
    assert merged.transformer.state_dict().keys() == before.keys()
    for key, value in written.transformer.state_dict().items():
        torch.testing.assert_close(merged.transformer.state_dict()[key], value)
    changed = [
        k for k, v in merged.transformer.state_dict().items() if not torch.equal(v, before[k])
    ]
    assert changed
    pictures = open_pictures(tmp_path / "run" / "work" / "pictures")
    whole = FAMILIES[type(merged.transformer).__name__].objective(merged, pictures)
    loss = held_out_loss(whole.eval(), pictures.held_out)["loss"]
    assert loss == pytest.approx(figures["held_out_loss"]["best"], abs=2e-5)


@pytest.mark.parametrize("rank", [None, 4])
def test_interrupted_and_resumed_equals_uninterrupted(rank, tones, tmp_path):
    if rank is not None:
        pytest.importorskip("peft", reason="peft is not installed")
    settings = FinetuneSettings(steps=9, batch_size=4, sample_every=3, lora_rank=rank)
    part, whole = tmp_path / "part", tmp_path / "whole"
    given = {"name": "tiny", "progress": False}
    finetune(pipe_of("llamagen"), tones[0], whole, settings, **given)
    shutil.copytree(whole / "work" / "pictures", part / "work" / "pictures")
    # A folder in the place of a sheet ends the run behind a checkpoint and before the next.
    (part / "samples" / "000006.png").mkdir(parents=True)
    with pytest.raises(InputError, match="is a folder"):
        finetune(pipe_of("llamagen"), tones[0], part, settings, **given)
    state = torch.load(part / "work/transformer/checkpoint.pt", weights_only=True)
    assert state["step"] == 3
    (part / "samples" / "000006.png").rmdir()
    finetune(pipe_of("llamagen"), tones[0], part, settings, **given)
    file = f"transformer/{WEIGHTS}" if rank is None else "adapter/adapter_model.safetensors"
    assert (part / file).read_bytes() == (whole / file).read_bytes()
    assert (part / "held_out.jsonl").read_text() == (whole / "held_out.jsonl").read_text()


def test_captions_tune_a_model_of_texts(tones, tmp_path):
    folder, captions = tones
    words = build_text_tokenizer(words_of(["a dark light picture"]))
    encoder = build_text_encoder(len(words), 16, 0)
    kind = {"num_classes": None, "caption_dim": 16, "caption_length": 6}
    parts = dict(zip(("transformer", "tokenizer"), llamagen_parts(**kind), strict=True))
    pipe = ARPipeline(**parts, text_encoder=encoder, text_tokenizer=words)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    settings = FinetuneSettings(steps=12, batch_size=8, learning_rate=3e-3, sample_every=12)
    with pytest.raises(InputError, match="takes captions: expected a file"):
        finetune(pipe, folder, tmp_path / "run", settings, progress=False)
    run = {"name": "tiny", "progress": False, "captions": captions}
    check_falls(finetune(pipe, folder, tmp_path / "run", settings, **run))
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    tuned = arvision.load(tmp_path / "run", device="cpu")
    assert tuned("a light picture", seed=0).images[0].size == (16, 16)


def one_folder(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(folder / name)
    return folder


def test_classes_are_found_by_name_and_id_or_taken_over(tmp_path):
    settings = FinetuneSettings(steps=1, batch_size=2)
    run = {"name": "tiny", "progress": False}
    strange = one_folder(tmp_path / "strange", "cats/1.png", "cats/2.png", "dogs/1.png")
    figures = finetune(pipe_of("llamagen"), strange, tmp_path / "a", settings, **run)
    assert figures["pictures"] == 2
    tuned = arvision.load(tmp_path / "a", device="cpu")
    assert tuned.config["class_names"] == ["cats", "dogs", "else"]
    flat = one_folder(tmp_path / "flat", "1.png", "2.png")
    with pytest.raises(InputError, match="a subfolder for each class, or a label"):
        finetune(pipe_of("llamagen"), flat, tmp_path / "b", settings, **run)
    labelled = FinetuneSettings(steps=1, batch_size=2, label="light")
    finetune(pipe_of("llamagen"), flat, tmp_path / "c", labelled, **run)
    with pytest.raises(InputError, match="the subfolders say the classes"):
        finetune(pipe_of("llamagen"), strange, tmp_path / "d", labelled, **run)
    mixed = one_folder(tmp_path / "mixed", "light/1.png", "dogs/1.png")
    with pytest.raises(InputError, match="class 'dogs': the model knows other subfolders"):
        finetune(pipe_of("llamagen"), mixed, tmp_path / "e", settings, **run)
    many = one_folder(tmp_path / "many", *(f"kind{index}/1.png" for index in range(4)))
    with pytest.raises(InputError, match="4 classes: the model has 3"):
        finetune(pipe_of("llamagen"), many, tmp_path / "f", settings, **run)
    other = FinetuneSettings(steps=2, batch_size=2)
    with pytest.raises(InputError, match="holds a run with steps 1, not 2"):
        finetune(pipe_of("llamagen"), strange, tmp_path / "a", other, **run)


def test_bad_input_is_one_line(tones, tmp_path, cli):
    with pytest.raises(InputError, match="merge without lora_rank"):
        FinetuneSettings(merge=True)
    with pytest.raises(InputError, match="takes classes and no text"):
        finetune(pipe_of("var"), tones[0], tmp_path / "run", captions=tones[1])
    pipe = arvision.load("llamagen-fashion-draft", device="cpu")
    with pytest.raises(InputError, match="without a tokenizer cannot be fine-tuned"):
        finetune(pipe, tones[0], tmp_path / "run")
    given = ("--data", str(tones[0]), "--out", str(tmp_path / "run"))
    done = cli("finetune", "llamagen-fashion", *given, "--tokenizer", "vq.pt")
    assert done.returncode == 2
    assert "--tokenizer with llamagen-fashion" in done.stderr
    done = cli("finetune", str(tones[1]), *given)
    assert done.returncode == 2
    assert "expected a checkpoint of LlamaGen, VAR or MAR" in done.stderr


def test_adapters_that_do_not_fit_are_named(tones, tmp_path):
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is missing"):
        arvision.load("llamagen-fashion", device="cpu", adapter=tmp_path)
    pytest.importorskip("peft", reason="peft is not installed")
    settings = FinetuneSettings(steps=1, batch_size=2, lora_rank=2)
    finetune(pipe_of("llamagen"), tones[0], tmp_path / "run", settings, name="t", progress=False)
    adapter = tmp_path / "run" / "adapter"
    with pytest.raises(CheckpointError, match=r"key .* is missing|has shape|does not fit"):
        arvision.load("llamagen-fashion", device="cpu", adapter=adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises(InputError, match="kind 'IA3', expected LORA"):
        arvision.load("llamagen-fashion", device="cpu", adapter=adapter)
