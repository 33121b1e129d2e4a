"""Files that do not fit are refused with the key's name."""

from __future__ import annotations

import pickle

import pytest
import torch

from arvision import CheckpointError, InputError
from arvision.models import LlamaGen, LlamaGenTokenizer, LlamaGenTransformer

SIZES = {"num_heads": 4, "grid": (4, 4)}


@pytest.fixture
def tensors(goldens):
    return torch.load(goldens / "llamagen" / "gpt_c2i.pt", weights_only=True)["model"]


def save(tmp_path, content, name="file.pt"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict", None])
def test_all_published_layouts_load(tmp_path, tensors, wrapper):
    path = save(tmp_path, {wrapper: tensors} if wrapper else tensors)
    network = LlamaGenTransformer.from_official(path, **SIZES)
    assert torch.equal(network.output.weight, tensors["output.weight"])


def test_state_dict_and_stray_rotary_table(tensors):
    with_table = tensors | {"freqs_cis": torch.zeros(17, 8, 2)}
    network = LlamaGenTransformer.from_official(with_table, num_heads=4)
    assert network.config["grid"] == (4, 4)


def test_grid_from_the_file_name(tmp_path, tensors):
    path = save(tmp_path, {"model": tensors}, "c2i_tiny_384.pt")
    assert LlamaGenTransformer.from_official(path, num_heads=4).num_tokens == 576


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.weight"), "key 'norm.weight' is missing"),
        (lambda t: t.update({"extra.weight": torch.zeros(1)}), "key 'extra.weight' is unexpected"),
        (
            lambda t: t.update({"norm.weight": torch.zeros(3)}),
            r"key 'norm.weight' has shape \[3\], expected \[64\]",
        ),
    ],
)
def test_missing_unexpected_and_misshapen_keys(tensors, change, message):
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        LlamaGenTransformer.from_official(tensors, **SIZES)


def test_truncated_file(tmp_path, tensors):
    path = save(tmp_path, {"model": tensors})
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(CheckpointError, match="is it complete"):
        LlamaGenTransformer.from_official(path, **SIZES)


class Payload:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_pickled_code_is_never_run(tmp_path, tensors, capsys):
    path = save(tmp_path, {"model": tensors, "args": Payload()})
    with pytest.raises(CheckpointError, match="pickled code"):
        LlamaGenTransformer.from_official(path, **SIZES)
    old_style = tmp_path / "old.pt"
    old_style.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(CheckpointError):
        LlamaGenTransformer.from_official(old_style, **SIZES)
    assert "never run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"grid": 4}, "pass num_heads"),
        ({"num_heads": 4}, "pass grid"),
        ({"num_heads": 4, "grid": 4, "num_layers": 5}, "num_layers 3, not 5"),
        ({"num_heads": 5, "grid": 4}, "does not divide"),
        ({"num_heads": 4, "gird": 4}, "did you mean 'grid'"),
    ],
)
def test_sizes_that_cannot_be_right(tensors, sizes, message):
    with pytest.raises((CheckpointError, InputError), match=message):
        LlamaGenTransformer.from_official(tensors, **sizes)


def test_no_such_file_and_no_tensors(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        LlamaGen.from_official(tmp_path / "nothing.pt")
    with pytest.raises(CheckpointError, match="expected tensors"):
        LlamaGenTokenizer.from_official(save(tmp_path, {"epoch": 3}))


def test_tokenizer_with_another_codebook(goldens):
    folder = goldens / "llamagen"
    tokenizer = LlamaGenTokenizer.from_official(folder / "vq16.pt")
    other = LlamaGenTransformer.from_official(folder / "gpt_c2i_gqa.pt", num_heads=8, grid=(3, 3))
    with pytest.raises(InputError, match=r"64 codes.*48"):
        LlamaGen(other, tokenizer)
