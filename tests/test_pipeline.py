"""The pipeline, as users of diffusers know pipelines."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import arvision
from arvision import ARPipeline, CheckpointError, InputError
from arvision.samplers import ARSampler, SJDSampler
from arvision.testing import tiny_llamagen


def test_save_and_reload_draws_the_same_picture(tmp_path, tiny_pipeline):
    tiny_pipeline.sampler = SJDSampler(window=5, coupling="maximal")
    try:
        tiny_pipeline.save_pretrained(tmp_path)
        before = tiny_pipeline("cat", seed=3, num_images_per_prompt=2, output_type="np")
    finally:
        tiny_pipeline.sampler = ARSampler()
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "ARPipeline"
    assert index["sampler"][1] == "SJDSampler"
    assert list(tmp_path.glob("transformer/*.safetensors"))
    again = ARPipeline.from_pretrained(tmp_path)
    assert again.sampler.config["window"] == 5
    after = again("cat", seed=3, num_images_per_prompt=2, output_type="np")
    np.testing.assert_array_equal(before.images, after.images)
    assert arvision.load(tmp_path)("cat", seed=3).tokens.equal(before.tokens[:1])


def test_a_text_model_saves_its_encoder(tmp_path):
    from arvision.training.llamagen_text import build_text_encoder, build_text_tokenizer

    text_tokenizer = build_text_tokenizer()
    text_encoder = build_text_encoder(len(text_tokenizer), 16, seed=0).eval()
    model = tiny_llamagen(caption_dim=16, caption_length=6, num_classes=None)
    pipe = ARPipeline(
        model.transformer, model.tokenizer, text_encoder=text_encoder, text_tokenizer=text_tokenizer
    )
    pipe.save_pretrained(tmp_path)
    again = ARPipeline.from_pretrained(tmp_path)
    prompts = ["a dark boot", "dress"]
    out = pipe(prompts, seed=1, guidance_scale=2.0)
    assert torch.equal(out.tokens, again(prompts, seed=1, guidance_scale=2.0).tokens)
    alone = pipe(prompts[1], seed=[(1, 1)], guidance_scale=2.0)
    assert torch.equal(alone.tokens[0], out.tokens[1])
    with pytest.warns(UserWarning, match="does not know shiny"):
        pipe("a shiny boot", seed=0)
    with pytest.raises(InputError, match="knows none of its words"):
        pipe("zebra crossing", seed=0)
    with pytest.raises(InputError, match="expected a caption"):
        pipe(3, seed=0)


def test_swapping_the_sampler_as_a_scheduler(tiny_pipeline):
    plain = tiny_pipeline([0, 1], seed=5)
    assert plain.stats.forward_passes == 15
    tiny_pipeline.sampler = SJDSampler.from_config(tiny_pipeline.sampler.config)
    try:
        fast = tiny_pipeline([0, 1], seed=5)
    finally:
        tiny_pipeline.sampler = ARSampler()
    assert torch.equal(fast.tokens, plain.tokens)
    assert fast.stats.candidates > plain.stats.candidates


def test_seeds_and_generators(tiny_pipeline):
    whole = tiny_pipeline("dog", num_images_per_prompt=4, seed=9)
    last = tiny_pipeline("dog", seed=[(9, 3)])
    assert torch.equal(last.tokens[0], whole.tokens[3])
    first, second = (
        tiny_pipeline("dog", generator=torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert torch.equal(first.tokens, second.tokens)
    generator = torch.Generator().manual_seed(1)
    tiny_pipeline("dog", generator=generator)
    assert not torch.equal(tiny_pipeline("dog", generator=generator).tokens, first.tokens)
    pair = tiny_pipeline(
        "dog",
        num_images_per_prompt=2,
        generator=[torch.Generator().manual_seed(s) for s in (2, 1)],
    )
    assert torch.equal(pair.tokens[1], first.tokens[0])
    free = tiny_pipeline("dog")
    assert torch.equal(tiny_pipeline("dog", seed=free.stats.seeds).tokens, free.tokens)


def test_output_types(tiny_pipeline):
    images = tiny_pipeline(1, seed=0, num_images_per_prompt=2).images
    assert isinstance(images[0], Image.Image)
    assert images[0].size == (16, 16)
    array = tiny_pipeline(1, seed=0, output_type="np").images
    assert array.shape == (1, 16, 16, 3)
    assert 0 <= array.min() <= array.max() <= 1
    tensor = tiny_pipeline(1, seed=0, output_type="pt").images
    np.testing.assert_allclose(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert tiny_pipeline(1, seed=0, output_type="latent").images.shape == (1, 16)
    assert isinstance(tiny_pipeline(1, seed=0, return_dict=False), tuple)


def test_dtype_and_device(tiny_pipeline):
    half = ARPipeline.from_model(tiny_llamagen()).to(torch.bfloat16)
    assert half(1, seed=0).tokens.shape == (1, 16)
    assert half.transformer.dtype == torch.bfloat16
    assert tiny_pipeline.device.type == "cpu"


def test_callback_sees_progress_and_can_stop(tiny_pipeline):
    seen = []

    def callback(pipe, step, timestep, kwargs):
        seen.append(kwargs["finished"])
        pipe._interrupt = step == 6

    out = tiny_pipeline(1, seed=0, callback_on_step_end=callback)
    assert out.stats.forward_passes == 6
    assert seen == [2, 3, 4, 5, 6, 7]
    assert tiny_pipeline(1, seed=0).stats.forward_passes == 15


def test_progress_bar_can_be_switched_off(tiny_pipeline, capsys):
    tiny_pipeline.set_progress_bar_config(disable=True)
    tiny_pipeline(1, seed=0)
    assert capsys.readouterr().err == ""
    tiny_pipeline.set_progress_bar_config()
    tiny_pipeline(1, seed=0)
    assert "16/16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "empty prompt"),
        ({"prompt": []}, "no prompt"),
        ({"prompt": 3}, r"class 3: expected 0\.\.2"),
        ({"prompt": -1}, r"class -1: expected 0\.\.2"),
        ({"prompt": "cow"}, r"unknown class 'cow'.*ankle boot, cat, dog"),
        ({"prompt": 1.5}, "expected a class id or a class name"),
        ({"prompt": 1, "num_images_per_prompt": 0}, "num_images 0"),
        ({"prompt": 1, "guidance_scale": -0.5}, "guidance_scale -0.5"),
        ({"prompt": 1, "top_p": 1.5}, "top_p 1.5"),
        ({"prompt": 1, "output_type": "jpg"}, "output_type 'jpg'"),
        ({"prompt": 1, "seed": [1, 2]}, "2 seeds for 1 image"),
        ({"prompt": 1, "seed": -1}, "seed"),
        ({"prompt": 1, "seed": 1, "generator": torch.Generator()}, "both seed and generator"),
    ],
)
def test_bad_input(tiny_pipeline, arguments, message):
    with pytest.raises(InputError, match=message):
        tiny_pipeline(**arguments)


def test_class_names(tiny_pipeline):
    by_id = tiny_pipeline(2, seed=0).tokens
    for prompt in ("ankle boot", "Ankle Boot", "boot", "2"):
        assert torch.equal(tiny_pipeline(prompt, seed=0).tokens, by_id)


def test_models_that_do_not_exist(tmp_path):
    with pytest.raises(InputError, match=r"unknown model 'llamagen-fashio': did you mean"):
        arvision.load("llamagen-fashio")
    with pytest.raises(CheckpointError, match=r"model_index\.json is missing"):
        arvision.load(tmp_path)
    with pytest.raises(InputError, match="device 'abacus'"):
        arvision.load("llamagen-fashion", device="abacus")
    with pytest.raises(InputError, match="dtype 'int8'"):
        arvision.load("llamagen-fashion", dtype="int8")


def test_a_damaged_pipeline_folder(tmp_path, tiny_pipeline):
    tiny_pipeline.save_pretrained(tmp_path)
    weights = next(tmp_path.glob("transformer/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cut off"):
        arvision.load(tmp_path)
