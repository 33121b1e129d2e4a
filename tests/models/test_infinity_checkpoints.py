"""Official Infinity files in every layout, pipelines from them, and what bad input says."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel
from typer.testing import CliRunner

import arvision
from arvision import ARPipeline, CheckpointError, InputError, Prompt
from arvision.cli import app
from arvision.models import Infinity, InfinityTokenizer, InfinityTransformer
from arvision.models.infinity.schedules import scale_schedule

SMALL = scale_schedule("0.06M")
TINY = SMALL[:3]


@pytest.fixture(scope="module")
def folder(request):
    return request.config.rootpath / "tests" / "goldens" / "infinity"


@pytest.fixture(scope="module")
def flat(folder):
    tensors = torch.load(folder / "infinity.pth", weights_only=True)
    return {key: value.clone() for key, value in tensors.items()}


@pytest.fixture(scope="module")
def texts(folder):
    made = load_file(folder / "infinity_generation.io.safetensors")
    return list(made["text_features"].split(made["text_lengths"].tolist()))


def shards(flat, folder, num=3):
    """The layout of the 8B: shards and their index."""
    keys = sorted(flat)
    listed = {}
    for shard in range(num):
        name = f"model-{shard + 1:05d}-of-{num:05d}.safetensors"
        part = {key: flat[key] for key in keys[shard::num]}
        save_file(part, folder / name)
        listed |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return listed


def test_flat_nested_and_sharded_files_hold_the_same_model(flat, tmp_path):
    shards(flat, tmp_path)
    torch.save({"epoch": 1, "trainer": {"gpt_fsdp": flat}}, tmp_path / "nested.pth")
    want = InfinityTransformer.from_official(flat, pixels="0.06M").state_dict()
    sources = (tmp_path, tmp_path / "model.safetensors.index.json", tmp_path / "nested.pth")
    for source in sources:
        got = InfinityTransformer.from_official(source, pixels="0.06M").state_dict()
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want)


def test_shards_are_read_strictly(flat, tmp_path):
    listed = shards(flat, tmp_path)
    name = listed["cfg_uncond"]
    kept = load_file(tmp_path / name)
    kept.pop("cfg_uncond")
    save_file(kept, tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: key 'cfg_uncond' is not where"):
        InfinityTransformer.from_official(tmp_path)
    save_file(kept | {"cfg_uncond": flat["cfg_uncond"], "stray": torch.ones(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: key 'stray' is not where"):
        InfinityTransformer.from_official(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=f"names {name}, which is missing"):
        InfinityTransformer.from_official(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="expected an index of shards"):
        InfinityTransformer.from_official(tmp_path)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="expected an index of shards"):
        InfinityTransformer.from_official(index)
    index.unlink()
    with pytest.raises(CheckpointError, match="expected one"):
        InfinityTransformer.from_official(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match="a folder without"):
        InfinityTransformer.from_official(tmp_path)


def test_keys_are_read_strictly(flat):
    for key in ("cfg_uncond", "block_chunks.1.module.0.ca_norm.weight", "head.bias"):
        without = {name: value for name, value in flat.items() if name != key}
        with pytest.raises(CheckpointError, match=f"key '{key}' is missing"):
            InfinityTransformer.from_official(without)
    with pytest.raises(CheckpointError, match=r"key 'head.extra' is unexpected"):
        InfinityTransformer.from_official(flat | {"head.extra": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"key 'pos_start' has shape \[1, 1, 7\]"):
        InfinityTransformer.from_official(flat | {"pos_start": torch.ones(1, 1, 7)})
    with pytest.raises(CheckpointError, match="its tensors say num_heads 2, not 16"):
        InfinityTransformer.from_official(flat, num_heads=16)
    with pytest.raises(CheckpointError, match="its tensors say num_layers 4, not 32"):
        InfinityTransformer.from_official(flat, depth=32)


def test_tokenizer_files(folder, tmp_path):
    path = folder / "infinity_vae.pth"
    whole = torch.load(path, weights_only=True)["vae"]
    want = InfinityTokenizer.from_official(path).state_dict()
    renamed = {}
    for key, value in whole.items():
        *layer, inner, kind = key.split(".")  # "conv1.conv.weight"; some releases lack the "conv"
        plain = ".".join([*layer, kind])
        if plain in want and inner in ("conv", "norm"):
            renamed[plain] = value
    assert len(renamed) == len(want)
    got = InfinityTokenizer.from_official(renamed).state_dict()
    assert all(torch.equal(got[key], want[key]) for key in want)
    with pytest.raises(CheckpointError, match=r"key 'decoder.conv_in.bias' is missing"):
        InfinityTokenizer.from_official(
            {k: v for k, v in renamed.items() if "decoder.conv_in.b" not in k}
        )
    with pytest.raises(CheckpointError, match="its tensors say patch_size 4, not 16"):
        InfinityTokenizer.from_official(path, patch_size=16)
    with pytest.raises(CheckpointError, match=r"under one of trainer.gpt_fsdp.*; found vae"):
        InfinityTransformer.from_official(path)
    with pytest.raises(CheckpointError, match=r"key 'word_embed.weight' is missing"):
        InfinityTransformer.from_official(whole)


def test_networks_that_do_not_fit_each_other(folder):
    with pytest.raises(InputError, match=r"the tokenizer has 3 channels: expected 8, the bits"):
        Infinity.from_official(folder / "infinity.pth", folder / "infinity_patchify_vae.pth")
    network = InfinityTransformer.from_official(folder / "infinity.pth", scale_schedule=SMALL)
    vae = InfinityTokenizer.from_official(folder / "infinity_vae.pth", pixels="0.25M")
    with pytest.raises(InputError, match="the tokenizer has scales"):
        Infinity(network, vae)
    with pytest.raises(InputError, match="patchify"):
        Infinity.from_official(folder / "infinity.pth", folder / "infinity_vae.pth", patchify=True)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"aspect_ratio": 1.1}, r"aspect_ratio 1.1 \(height/width\): expected one of 0.333, 0.4"),
        ({"pixels": "2M"}, "pixels '2M': expected one of 0.06M, 0.25M, 0.60M, 1M"),
        ({"scale_schedule": [(1, 1), (3, 3)]}, "not one of the official schedules begins so"),
        ({"scale_schedule": [(1, 1), (2, 2), (2, 2)]}, "2x2 after 2x2, expected growing maps"),
        ({"scale_schedule": [1, 2, 3]}, r"expected pairs \(height, width\)"),
        ({"scale_schedule": []}, r"expected pairs \(height, width\)"),
        ({"scale_schedule": SMALL, "pixels": "1M"}, "scale_schedule beside pixels"),
        (
            {"scale_schedule": [(k, k) for k in range(1, 17)], "rope_grid": (16, 16)},
            "scale_schedule of 16 scales: expected at most 15",
        ),
        ({"guidance_layer": -4}, r"guidance_layer -4: expected 0 \(logits\) or -3..-1"),
        ({"nonsense": 1}, "unknown size of a Infinity model: 'nonsense'"),
    ],
)
def test_bad_sizes(folder, sizes, message):
    with pytest.raises(InputError, match=message):
        Infinity.from_official(folder / "infinity.pth", **sizes)


@pytest.fixture(scope="module")
def tiny(folder):
    """With a text encoder of random weights; 3 scales, 16 x 16 pixels."""
    torch.manual_seed(0)
    words = arvision.load("llamagen-fashion-t2i", device="cpu").text_tokenizer
    config = T5Config(
        vocab_size=len(words), d_model=256, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    return Infinity.from_official(
        folder / "infinity.pth",
        folder / "infinity_vae.pth",
        text_encoder=T5EncoderModel(config).eval(),
        text_tokenizer=words,
        scale_schedule=TINY,
    )


def test_pictures_of_another_size(folder, texts):
    model = Infinity.from_official(folder / "infinity.pth", folder / "infinity_vae.pth")
    assert model.scales[-1] == (64, 64)
    pipe = ARPipeline.from_model(model)
    pipe.model.set_scales(pixels="0.06M", aspect_ratio=0.5)
    out = pipe(texts[0], seed=0, guidance_scale=3.0, temperature=0.5, output_type="pt")
    assert out.images.shape == (1, 3, 4 * 11, 4 * 22)
    with pytest.raises(InputError, match=r"aspect_ratio 7 \(height"):
        pipe.model.set_scales(aspect_ratio=7)


def test_captions_are_encoded_as_transformers_does(tiny):
    words = tiny.captions.text_tokenizer("a dark ankle boot", return_tensors="pt")
    with torch.no_grad():
        features = tiny.captions.text_encoder(**words).last_hidden_state[0]
    run = {"seeds": [(0, 0)], "guidance_scale": 3.0}
    sampler = arvision.get_sampler("ar", temperature=0)
    by_text = sampler(tiny, ["a dark ankle boot"], **run)
    assert torch.equal(by_text.tokens, sampler(tiny, [features], **run).tokens)
    named = sampler(tiny, [Prompt("a dark ankle boot", negative="a bag")], **run)
    assert not torch.equal(by_text.tokens, named.tokens)


def test_a_pipeline_is_saved_loaded_and_sampled_from(tiny, tmp_path):
    pipe = ARPipeline.from_model(tiny, guidance_scale=[1.0, 2.0, 3.0], temperature=0.5)
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = arvision.load(tmp_path / "pipe", device="cpu")
    assert loaded.model.scales == TINY
    run = {"seed": 3, "progress": False, "num_images": 2}
    want = arvision.sample(pipe, "a dark boot", **run)
    got = arvision.sample(loaded, "a dark boot", **run)
    assert torch.equal(want.tokens, got.tokens)
    assert got.tokens.shape == (2, 21, 8)
    assert got.images[0].size == (16, 16)
    assert (got.stats.forward_passes, got.stats.tokens) == (3, 21)
    assert list(arvision.list_samplers(loaded)) == ["ar", "code"]
    picture = tmp_path / "boot.png"
    command = ["sample", "--model", str(tmp_path / "pipe"), "--prompt", "a dark boot", "--quiet"]
    command += ["--negative", "a bag", "--guidance-scale", "1,2,3", "--temperature", "1,0.5,0.5"]
    result = CliRunner().invoke(app, [*command, "--out", str(picture), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["forward_passes"] == 3
    assert picture.exists()


def test_bad_conditions(tiny, texts, folder):
    with pytest.raises(InputError, match=r"text features \(5, 7\): expected \[T, 256\] with T in"):
        tiny.start([torch.zeros(5, 7)])
    with pytest.raises(
        InputError, match=r"text features \(17, 256\): expected \[T, 256\] with T in 1..16"
    ):
        tiny.start([torch.zeros(17, 256)])
    with pytest.raises(InputError, match=r"text features \(5, 7\)"):
        tiny.start([Prompt(texts[0], negative=torch.zeros(5, 7))], 2.0)
    with pytest.raises(InputError, match="condition 3: expected a caption, text features"):
        tiny.start([3])
    with pytest.raises(InputError, match="1 images beside the prompt: this model takes text"):
        tiny.start([Prompt(texts[0], images=[object()])])
    with pytest.raises(InputError, match="no conditions"):
        tiny.start([])
    without = Infinity.from_official(folder / "infinity.pth", scale_schedule=TINY)
    with pytest.raises(InputError, match="caption 'boot': this model has no text encoder"):
        without.start(["boot"])
    with pytest.raises(InputError, match="no image tokenizer"):
        without.decode(torch.zeros(1, 21, 8))
    with pytest.raises(InputError, match=r"bits \(1, 20, 8\): expected \[B, 21, 8\]"):
        tiny.decode(torch.zeros(1, 20, 8))
    with pytest.raises(InputError, match=r"pixels \(1, 3, 8, 8\): expected \[B, 3, 16, 16\]"):
        tiny.tokenizer.encode(torch.zeros(1, 3, 8, 8))
