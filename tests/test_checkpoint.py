"""Files as trainers, wrappers and failed downloads leave them, read by every family's one reader."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from arvision import CheckpointError, InputError
from arvision.checkpoint import read_state_dict
from arvision.models import (
    VAR,
    Infinity,
    InfinityTokenizer,
    LlamaGen,
    LlamaGenTransformer,
    MARAutoencoder,
    VARTokenizer,
)
from arvision.testing import tiny_llamagen

WRAPPERS = ("model", "state_dict")


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    network = MARAutoencoder(ch=32, ch_mult=(1, 1), num_res_blocks=1, latent_dim=4)
    return {key: value.clone() for key, value in network.state_dict().items()}


def same(path, weights):
    loaded = MARAutoencoder.from_official(path).state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)


def renamed(weights, rule):
    return {rule(key): value for key, value in weights.items()}


WRAPPED = {
    "module": lambda k: f"module.{k}",
    "compiled": lambda k: f"_orig_mod.{k}",
    "compiled ddp": lambda k: f"module._orig_mod.{k}",
    "ddp compiled": lambda k: f"_orig_mod.module.{k}",
    "lightning": lambda k: f"model.{k}",
    "lightning ddp": lambda k: f"module.model.{k}",
    "model ddp": lambda k: f"model.module.{k}",
    "fsdp": lambda k: f"_fsdp_wrapped_module.{k}",
    "checkpointed": lambda k: k.replace(".block.", ".block._checkpoint_wrapped_module.", 1),
    "fsdp inside": lambda k: k.replace("encoder.", "encoder._fsdp_wrapped_module.", 1),
}


@pytest.mark.parametrize("rule", WRAPPED.values(), ids=WRAPPED)
def test_names_of_wrappers_are_taken_off(weights, rule, tmp_path):
    torch.save(renamed(weights, rule), tmp_path / "a.pt")
    same(tmp_path / "a.pt", weights)
    same(renamed(weights, rule), weights)


NESTS = [
    ("ema",),
    ("model_ema",),
    ("trainer", "model"),
    ("trainer", "ema"),
    ("model", "state_dict"),
    ("trainer", "model", "module"),
]


@pytest.mark.parametrize("nest", NESTS, ids=".".join)
def test_nests_of_trainers_are_opened(weights, nest, tmp_path):
    content = weights
    for name in reversed(nest):
        content = {name: content, "epoch": 3, "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "a.pth")
    same(tmp_path / "a.pth", weights)


def test_harmless_records_beside_the_weights(weights, tmp_path):
    records = {
        "args": argparse.Namespace(lr=np.float64(1e-4), out=pathlib.Path("runs"), size=(1, 2)),
        "step": np.int64(7),
        "flag": np.bool_(True),
        "name": np.str_("x"),
        "losses": np.arange(3.0),
        "epoch": 3,
    }
    torch.save({"model": weights} | records, tmp_path / "a.pth")
    same(tmp_path / "a.pth", weights)
    torch.save(
        {"model": weights} | records, tmp_path / "b.pth", _use_new_zipfile_serialization=False
    )
    same(tmp_path / "b.pth", weights)
    with pytest.raises(Exception, match="Weights only"):  # nothing stays allowed behind the reader
        torch.load(tmp_path / "a.pth", weights_only=True)


class Runs:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("kind", ["direct", "in args"])
def test_nothing_else_is_run(weights, kind, tmp_path):
    harm = Runs(f"touch {tmp_path / 'ran'}")
    torch.save(
        {"model": weights, "args": harm if kind == "direct" else argparse.Namespace(x=harm)},
        tmp_path / "a.pth",
    )
    with pytest.raises(CheckpointError, match="holds pickled code"):
        MARAutoencoder.from_official(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()
    torch.save({"model": weights, "x": types.SimpleNamespace(a=1)}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match="holds pickled code"):
        MARAutoencoder.from_official(tmp_path / "b.pth")


def test_buffers_without_weights_are_left_out(weights, tmp_path):
    stray = {
        "causal_mask": torch.ones(4, 4),
        "decoder.freqs_cis": torch.ones(4),
        "layers.0.attention.kv_cache.k_cache": torch.ones(4),
        "loss.discriminator.weight": torch.ones(4),
    }
    same(weights | stray, weights)
    same(renamed(weights, lambda k: f"module.{k}") | stray, weights)
    with pytest.raises(CheckpointError, match=r"'encoder\.extra' is unexpected"):
        MARAutoencoder.from_official(weights | {"encoder.extra": torch.ones(4)})
    network = tiny_llamagen().transformer
    buffers = {"freqs_cis": torch.ones(17, 4, 2), "causal_mask": torch.ones(2, 2)}
    sizes = {"num_heads": network.config["num_heads"], "grid": network.config["grid"]}
    again = LlamaGenTransformer.from_official(network.state_dict() | buffers, **sizes)
    assert again.state_dict().keys() == network.state_dict().keys()


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt", ".pth", ".ckpt"])
def test_folders_and_their_shards(weights, suffix, tmp_path):
    write = save_file if suffix == ".safetensors" else torch.save
    write(weights, str(tmp_path / f"weights{suffix}"))
    same(tmp_path, weights)
    (tmp_path / f"weights{suffix}").unlink()
    keys = sorted(weights)
    places = {key: f"part-{index % 2}{suffix}" for index, key in enumerate(keys)}
    for name in set(places.values()):
        write({key: weights[key] for key in keys if places[key] == name}, str(tmp_path / name))
    index = tmp_path / f"weights{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    same(tmp_path, weights)
    same(index, weights)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-lfs pointer"),
        ("\n<!DOCTYPE html><html></html>", "HTML page"),
        ("<html><body>403</body></html>", "HTML page"),
        ('{"error": "Repository not found"}', "JSON text"),
        ("", "is empty"),
    ],
)
def test_what_downloads_leave_is_called_by_its_name(content, message, suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=message) as told:
        read_state_dict(path, WRAPPERS)
    assert "\n" not in str(told.value)


def test_weights_are_placed_as_they_are_read(weights):
    half = {key: value.bfloat16() for key, value in weights.items()}
    read = MARAutoencoder.from_official(half, dtype=torch.bfloat16)
    for key, value in read.state_dict().items():
        assert value.data_ptr() == half[key].data_ptr()  # taken over, not doubled
    assert MARAutoencoder.from_official(half).dtype == torch.float32
    moved = MARAutoencoder.from_official(half, device="meta", dtype=torch.float16)
    assert (moved.device.type, moved.dtype) == ("meta", torch.float16)
    with pytest.raises(InputError, match="dtype"):
        MARAutoencoder.from_official(half, dtype="int8")
    network = tiny_llamagen()
    sizes = {"num_heads": network.transformer.config["num_heads"], "grid": network.grid}
    assert network.tokenizer is not None
    both = network.transformer.state_dict(), network.tokenizer.state_dict()
    model = LlamaGen.from_official(*both, dtype=torch.bfloat16, **sizes)
    assert model.tokenizer is not None
    assert model.transformer.dtype == model.tokenizer.dtype == torch.bfloat16
    small = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "z_channels": 8}
    var = VARTokenizer((1, 2, 8), codebook_size=16, **small).state_dict()
    for cls, tensors, more in ((VARTokenizer, var, {"patch_nums": (1, 2, 8)}),):
        assert cls.from_official(tensors, dtype=torch.float64, **more).dtype == torch.float64
    for cls in (VAR, Infinity, InfinityTokenizer):
        with pytest.raises(InputError, match="dtype"):
            cls.from_official(*({},) * (1 if cls is InfinityTokenizer else 2), dtype=torch.int8)


@pytest.mark.parametrize("grid", [(6,), [4, 4, 4], ()])
def test_a_grid_has_two_sides(grid):
    with pytest.raises(InputError, match=r"expected .rows, columns"):
        LlamaGenTransformer.from_official(tiny_llamagen().transformer.state_dict(), grid=grid)
