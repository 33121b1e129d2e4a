"""What files record beside weights: read where it tells, refused where it contradicts the caller."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import arvision
from arvision import ARPipeline, CheckpointError, InputError
from arvision.models import (
    MAR,
    ChameleonDecoder,
    LlamaGenStudent,
    LlamaGenStudentTransformer,
    LlamaGenTokenizer,
    LlamaGenTransformer,
    MARAutoencoder,
    MARTransformer,
    VARStudent,
    VARStudentTransformer,
    VARTokenizer,
    VARTransformer,
)
from arvision.models.llamagen.transformer import rotary_table
from arvision.models.mar.diffusers_vae import to_diffusers

LLAMAGEN = {"vocab_size": 12, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_classes": 3}


def llamagen(grid, num_conditions=1):
    weights = dict(LlamaGenTransformer(**LLAMAGEN, grid=grid).state_dict())
    return weights | {"freqs_cis": rotary_table(grid, 16, num_conditions).bfloat16()}


@pytest.mark.parametrize("grid", [(4, 4), (2, 5), (5, 2), (1, 7), (24, 24), (48, 32)])
def test_a_rotary_table_tells_grid_and_heads(grid):
    network = LlamaGenTransformer.from_official(llamagen(grid))
    assert network.config["grid"] == grid
    assert network.config["num_heads"] == 2


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"grid": (6, 6)}, r"grid \(4, 4\), not \(6, 6\)"),
        ({"grid": (2, 8)}, r"grid \(4, 4\), not \(2, 8\)"),
        ({"grid_size": 6}, r"grid \(4, 4\), not \(6, 6\)"),
        ({"num_tokens": 36}, "num_tokens 16, not 36"),
        ({"block_size": 36}, "num_tokens 16, not 36"),
        ({"num_heads": 4}, "num_heads 2, not 4"),
    ],
)
def test_a_rotary_table_contradicts(sizes, words):
    with pytest.raises(CheckpointError, match=words):
        LlamaGenTransformer.from_official(llamagen((4, 4)), **sizes)


def test_the_length_of_an_unreadable_table_counts():
    weights = dict(LlamaGenTransformer(**LLAMAGEN, grid=(4, 4)).state_dict())
    weights["freqs_cis"] = torch.zeros(17, 8, 2)
    assert LlamaGenTransformer.from_official(weights, grid=(2, 8)).config["grid"] == (2, 8)
    with pytest.raises(CheckpointError, match="17 rows"):
        LlamaGenTransformer.from_official(weights, grid=(6, 6))


def test_a_grid_and_a_number_of_tokens_agree():
    weights = LlamaGenTransformer(**LLAMAGEN, grid=(4, 4)).state_dict()
    with pytest.raises(CheckpointError, match="has not the 15 tokens"):
        LlamaGenTransformer.from_official(weights, num_heads=2, grid=(4, 4), num_tokens=15)


def test_a_students_table_counts_too():
    student = LlamaGenStudentTransformer(
        vocab_size=12,
        grid=(2, 5),
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        num_classes=3,
        timesteps=(0,),
    )
    weights = dict(student.state_dict()) | {"freqs_cis": rotary_table((2, 5), 16, 1)}
    assert LlamaGenStudentTransformer.from_official(weights).config["grid"] == (2, 5)
    with pytest.raises(CheckpointError, match="freqs_cis"):
        LlamaGenStudentTransformer.from_official(weights, grid=(5, 5))


# Placement.


def test_students_are_placed_as_they_are_read():
    network = LlamaGenStudentTransformer(
        vocab_size=12,
        grid=(4, 4),
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        num_classes=3,
        code_dim=4,
        timesteps=(0,),
    )
    vq = LlamaGenTokenizer(
        ch=32,
        ch_mult=(1, 1),
        num_res_blocks=1,
        z_channels=8,
        codebook_size=12,
        code_dim=4,
        num_recorded=0,
    )
    student = LlamaGenStudent.from_official(
        network.state_dict(),
        vq.state_dict(),
        grid=(4, 4),
        num_heads=2,
        dtype=torch.bfloat16,
        device="cpu",
    )
    assert {student.transformer.dtype, student.tokenizer.dtype} == {torch.bfloat16}
    with pytest.raises(InputError, match="dtype"):
        LlamaGenStudent.from_official(network.state_dict(), vq.state_dict(), dtype="bf16")


def test_students_of_var_are_placed_as_they_are_read():
    sides = (1, 2)
    network = VARStudentTransformer(
        patch_nums=sides,
        codebook_size=12,
        z_channels=8,
        hidden_size=64,
        num_layers=1,
        num_heads=1,
        num_classes=3,
        timesteps=(0,),
    )
    vq = VARTokenizer(
        patch_nums=sides,
        ch=32,
        ch_mult=(1, 1),
        num_res_blocks=1,
        z_channels=8,
        codebook_size=12,
        num_shared=1,
    )
    student = VARStudent.from_official(
        network.state_dict(), vq.state_dict(), patch_nums=sides, dtype=torch.float64, device="cpu"
    )
    assert {student.transformer.dtype, student.tokenizer.dtype} == {torch.float64}


def test_a_chameleon_decoder_is_placed_as_it_is_read():
    weights = ChameleonDecoder(ch=32, ch_mult=(1, 1), num_blocks=1, latent_dim=4).state_dict()
    decoder = ChameleonDecoder.from_official(weights, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}
    with pytest.raises(InputError, match="dtype"):
        ChameleonDecoder.from_official(weights, dtype=torch.int8)


# MAR with KL-8.

KL8: dict[str, Any] = {
    "ch": 32,
    "ch_mult": (1, 2),
    "num_res_blocks": 1,
    "latent_dim": 4,
    "level_attention": False,
}
MODEL: dict[str, Any] = {
    "latent_dim": 16,
    "grid": (2, 3),
    "hidden_size": 16,
    "encoder_depth": 1,
    "decoder_depth": 1,
    "num_heads": 2,
    "head_width": 16,
    "head_depth": 1,
    "num_classes": 3,
    "num_buffer": 2,
}


@pytest.fixture(scope="module")
def files():
    torch.manual_seed(0)
    return MARTransformer(**MODEL).state_dict(), MARAutoencoder(**KL8).state_dict()


def test_kl8_is_read_with_its_squares(files):
    model = MAR.from_official(*files, num_heads=2, grid=(2, 3))
    assert model.tokenizer is not None
    config = model.tokenizer.config
    assert (config["patch_size"], config["scaling_factor"]) == (2, 0.18215)
    assert config["level_attention"] is False
    given = MAR.from_official(*files, num_heads=2, grid=(2, 3), patch_size=2, scaling_factor=0.5)
    assert given.tokenizer is not None
    assert given.tokenizer.config["scaling_factor"] == 0.5
    for wrong in (1, 4):
        with pytest.raises(InputError, match="expected tokens of 16"):
            MAR.from_official(*files, num_heads=2, grid=(2, 3), patch_size=wrong)


def test_tokens_are_squares_channel_by_channel(files):
    """As the authors' `patchify` has them: einsum "nchpwq->nhwcpq"."""
    vae = MARAutoencoder.from_official(files[1], patch_size=2)
    pixels = torch.rand(2, 3, 8, 12) * 2 - 1
    assert vae.downsample_factor == 4
    means = vae.moments(pixels)[0] * vae.config["scaling_factor"]
    squares = means.reshape(2, 4, 2, 2, 3, 2)
    expected = torch.einsum("nchpwq->nhwcpq", squares).reshape(2, 6, 16)
    tokens = vae.encode(pixels)
    assert torch.equal(tokens, expected)
    plain = vae.decode_map(means / vae.config["scaling_factor"])
    assert torch.allclose(vae.decode(tokens, (2, 3)), plain, atol=1e-5)
    with pytest.raises(InputError, match="4 divides"):
        vae.encode(torch.zeros(1, 3, 6, 8))


def test_kl8_draws_and_is_saved(files, tmp_path):
    pipe = ARPipeline.from_model(MAR.from_official(*files, num_heads=2, grid=(2, 3)))
    out = pipe(1, seed=0, output_type="pt", progress=False)
    assert out.images.shape == (1, 3, 8, 12)
    pipe.save_pretrained(tmp_path)
    again = arvision.load(tmp_path, device="cpu")(1, seed=0, output_type="pt", progress=False)
    assert torch.equal(out.images, again.images)


@pytest.mark.parametrize("num_groups", [32, 8])
def test_kl8_as_an_autoencoder_of_diffusers(files, num_groups):
    official = MARAutoencoder.from_official(files[1])
    vae = MARAutoencoder(**dict(official.config) | {"norm_num_groups": num_groups}).eval()
    vae.load_state_dict(official.state_dict())
    pixels = torch.rand(1, 3, 8, 8) * 2 - 1
    ours = vae.moments(pixels)[0]
    encoded: Any = to_diffusers(vae).encode(pixels)
    theirs = encoded.latent_dist.mean
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_other_widths_are_no_squares(files):
    sizes: Any = KL8 | {"latent_dim": 3}
    vae = MARAutoencoder(**sizes).state_dict()
    with pytest.raises(InputError, match="latents of width 3"):
        MAR.from_official(files[0], vae, num_heads=2, grid=(2, 3))


@pytest.mark.parametrize("grid", [(2, 2), (6, 2)])
def test_positions_of_mar_contradict_a_grid(files, grid):
    with pytest.raises(CheckpointError, match="6 positions"):
        MAR.from_official(files[0], num_heads=2, grid=grid)


def test_levels_of_var_contradict_its_scales():
    sizes: dict[str, Any] = {
        "codebook_size": 12,
        "z_channels": 8,
        "hidden_size": 64,
        "num_layers": 1,
    }
    network = VARTransformer(patch_nums=(1, 2, 3), num_heads=1, num_classes=3, **sizes)
    levels = torch.tensor([0] + [1] * 4 + [2] * 9)[None]
    weights = dict(network.state_dict()) | {"lvl_1L": levels}
    assert VARTransformer.from_official(weights).scales == (1, 2, 3)
    with pytest.raises(CheckpointError, match=r"patch_nums \(1, 2, 3\), not \(1, 3, 2\)"):
        VARTransformer.from_official(weights, patch_nums=(1, 3, 2))


# Files without an index.


def split(weights, folder, names):
    keys = sorted(weights)
    for number, name in enumerate(names):
        part = {key: weights[key].clone() for key in keys[number :: len(names)]}
        save_file(part, folder / name)


def test_safetensors_without_an_index(tmp_path):
    weights = MARAutoencoder(**KL8).state_dict()
    split(
        weights, tmp_path, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    )
    network = MARAutoencoder.from_official(tmp_path)
    assert all(torch.equal(network.state_dict()[key], weights[key]) for key in weights)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        MARAutoencoder.from_official(tmp_path)


def test_shards_are_all_there(tmp_path):
    weights = MARAutoencoder(**KL8).state_dict()
    split(weights, tmp_path, [f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)])
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00001-of-00003.* in all 2"):
        MARAutoencoder.from_official(tmp_path)


def test_variants_are_no_shards(tmp_path):
    weights = {key: value.clone() for key, value in MARAutoencoder(**KL8).state_dict().items()}
    for name in ("model.safetensors", "model.fp16.safetensors"):
        save_file(weights, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"is in two of model\.fp16\.safetensors"):
        MARAutoencoder.from_official(tmp_path)
