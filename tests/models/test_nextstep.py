"""NextStep through files, prompts, samplers and pipelines."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from nextstep_models import FOLDER, SIZES, load, load_calm, official_folder, text_tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import arvision
from arvision import CheckpointError, InputError, get_sampler
from arvision.cli import app
from arvision.errors import StateError
from arvision.models import (
    FAMILIES,
    ImagePrompt,
    NextStep,
    NextStepAutoencoder,
    NextStepTransformer,
)
from arvision.pipeline import ARPipeline

PROMPTS = ["a cat", "dog on a mat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return official_folder(tmp_path_factory.mktemp("nextstep") / "official", shards=3)


@pytest.fixture(scope="module")
def model(folder):
    return NextStep.from_official(folder, **SIZES)


@pytest.fixture(scope="module")
def pipe(model):
    return ARPipeline.from_model(model, guidance_scale=3.0)


@pytest.fixture(scope="module")
def calm():
    return ARPipeline.from_model(load_calm(), guidance_scale=2.0)


def sample(pipe, sampler="ar", prompts=PROMPTS, seed: Any = 1, **options):
    return arvision.sample(
        pipe, prompts, sampler, seed=seed, progress=False, output_type="pt", **options
    )


def test_it_is_registered(pipe):
    assert FAMILIES["NextStepTransformer"] is NextStep
    assert pipe.kind == "continuous"


def test_shards_hold_what_one_file_does(model):
    one = load_file(FOLDER / "model.safetensors")
    ours = model.transformer.state_dict()
    assert ours.keys() == one.keys()
    assert all(torch.equal(ours[key], one[key].float()) for key in one)


def test_pictures_by_the_command_line_from_saved_files(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    again = arvision.load(tmp_path / "saved", device="cpu")
    first, second = sample(pipe), sample(again)
    assert torch.equal(first.tokens, second.tokens)
    assert first.images.shape == (2, 3, 24, 32)
    command = ["sample", "--model", str(tmp_path / "saved"), "--prompt", "a cat", "--seed", "1"]
    out = tmp_path / "cat.png"
    result = CliRunner().invoke(app, [*command, "--out", str(out), "--json", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert Image.open(out).size[0] >= 32
    for sampler in ("csjd", "ar"):
        result = CliRunner().invoke(app, [*command, "--sampler", sampler, "--quiet"])
        assert result.exit_code == 0, result.output


def test_conditions_and_chains_stay_precise_in_bfloat16(folder):
    model = NextStep.from_official(folder, dtype=torch.bfloat16, **SIZES)
    assert model.dtype == torch.bfloat16
    state = model.start(["a cat"], 2.0)
    assert state.condition(1).dtype == torch.float32
    out = get_sampler("ar")(model, ["a cat"], seeds=[1], guidance_scale=2.0)
    assert out.tokens.dtype == torch.float32
    # Numbers that bfloat16 does not have: the chain ran in float32.
    assert not torch.equal(out.tokens, out.tokens.bfloat16().float())
    assert model.decode(out.tokens).isfinite().all()


@pytest.mark.parametrize("sampler", ["ar", "csjd"])
def test_an_image_does_not_depend_on_its_batch(calm, sampler):
    both = sample(calm, sampler, seed=[(0, 0), (0, 1)])
    for index, prompt in enumerate(PROMPTS):
        alone = sample(calm, sampler, prompts=[prompt], seed=[(0, index)])
        torch.testing.assert_close(alone.tokens[0], both.tokens[index], rtol=1e-3, atol=1e-3)


def test_jacobi_iteration_without_tolerance_is_plain_sampling(calm):
    plain = sample(calm).tokens
    for window in (2, 4):
        out = sample(calm, "csjd", criterion="tolerance", tolerance=1e-6, window=window)
        torch.testing.assert_close(out.tokens, plain, rtol=1e-3, atol=1e-3)


def test_guesses_stand_where_latents_do_not_matter_to_each_other():
    free = ARPipeline.from_model(load_calm(0.0), guidance_scale=2.0)
    out = sample(free, "csjd", window=3)
    assert out.stats.lossless
    # A guess is refused once at most, by the first pass that sees its place.
    assert out.stats.acceptance_rate > 0.5
    assert out.stats.forward_passes < 10


def test_a_draft_that_is_the_target_is_never_refused(model, pipe):
    how = {"criterion": "trajectory", "context": "batched", "max_draft": 3, "prefill": 0.0}
    out = sample(pipe, "cspd", draft=model, drafting="sequential", **how)
    assert out.stats.lossless
    # Draft and target run the same numbers in other shapes: ratios are 1 up to rounding.
    assert out.stats.acceptance_rate > 0.9
    assert out.stats.forward_passes <= 4
    noisy = sample(pipe, "ar", last_noise=True)
    torch.testing.assert_close(out.tokens[:, :3], noisy.tokens[:, :3], rtol=1e-3, atol=1e-3)


def test_one_pass_reads_only_what_is_new(model, monkeypatch):
    """What was seen before, with the same latents before it, is not computed again."""
    state = model.start(PROMPTS, 3.0)
    widths = []
    run = type(state)._run
    monkeypatch.setattr(
        type(state), "_run", lambda self, e, s: widths.append(e.shape[1]) or run(self, e, s)
    )
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 12, 16, generator=generator)
    known = torch.arange(12) < 5
    images = torch.arange(2)
    state.contexts(latents, known.expand(2, -1), images)
    state.contexts(latents, (torch.arange(12) < 7).expand(2, -1), images)
    state.contexts(latents, known.expand(2, -1), images)
    latents[1, 6] += 1
    state.contexts(latents, (torch.arange(12) < 8).expand(2, -1), images)
    assert widths == [5, 2, 2]


def test_fewer_head_steps_late_in_the_image(model, pipe):
    out = sample(pipe, final_head_steps=2)
    assert not get_sampler("ar", final_head_steps=2).is_exact
    # 4 steps at first, 2 at the end, evenly: 4 4 4 3 3 3 3 3 2 2 2 2 with rounding to even.
    steps = [round(4 - 2 * place / 11) for place in range(12)]
    assert out.stats.head_steps == sum(steps) < 48
    plain = sample(pipe)
    torch.testing.assert_close(out.tokens[:, :3], plain.tokens[:, :3])
    assert not torch.allclose(out.tokens[:, -1], plain.tokens[:, -1])
    every = sample(pipe, final_head_steps=4)
    assert torch.equal(every.tokens, plain.tokens)


def test_prompt_format(model):
    rows = model._format.rows(ImagePrompt("ab"), [], True)
    size = [49, 29, 36, 30, 50]
    assert rows[0].tolist() == [0, 1, *size]
    assert rows[1].tolist() == size
    named = load(positive_prompt="c", negative_prompt="d")
    format_ = type(model._format)(named.transformer.config, text_tokenizer())
    rows = format_.rows(ImagePrompt("ab"), [], True)
    assert rows[0].tolist() == [0, 1, 37, 2, *size]
    assert rows[1].tolist() == [3, *size]
    rows = format_.rows(ImagePrompt("a<image>b", negative="e"), [(1, 2)], True)
    picture = [49, 27, 36, 28, 50, 52, 52, 51]
    assert rows[0].tolist() == [0, *picture, 1, 37, 2, *size]
    assert rows[1].tolist() == [*picture, 4, *size]
    assert rows[2].tolist() == [4, *size]
    assert len(format_.rows(ImagePrompt("ab"), [], False)) == 1
    plain = type(format_)(load(image_guidance_scale=1.0).transformer.config, text_tokenizer())
    rows = plain.rows(ImagePrompt("a<image>b"), [(1, 2)], True)
    assert [row.tolist() for row in rows] == [[0, *picture, 1, *size], size]


def test_edits_have_three_branches_and_see_their_images(model, pipe):
    red, blue = (Image.new("RGB", (19, 17), colour) for colour in ("red", "blue"))
    prompts = [ImagePrompt("<image> in a hat", images=[picture]) for picture in (red, blue)]
    state = model.start(prompts, 3.0)
    z = state.condition(1)
    assert z.shape == (2, 1, 3 * 64)
    assert not torch.allclose(z[0, :, :128], z[1, :, :128])
    assert torch.equal(z[0, :, 128:], z[1, :, 128:])
    assert sample(pipe, prompts=prompts).images.shape == (2, 3, 24, 32)


def test_what_a_state_refuses(model):
    state = model.start(PROMPTS, 1.0)
    with pytest.raises(StateError, match="2 latents asked for or fed: expected 1 of the 12 left"):
        state.condition(2)
    gap = torch.zeros(1, 12, dtype=torch.bool)
    gap[0, 3] = True
    with pytest.raises(StateError, match="a causal model's context is a prefix"):
        state.contexts(torch.zeros(1, 12, 16), gap, torch.tensor([0]))


@pytest.mark.parametrize(
    ("condition", "scale", "message"),
    [
        (" ", 3.0, "empty prompt"),
        (7, 3.0, "condition 7: expected a caption, token ids"),
        (torch.tensor([1, 50]), 3.0, "guidance with a prompt of token ids"),
        (torch.tensor([1, 2]), 1.0, "token ids that end in 2: expected 50, begin of image"),
        (torch.tensor([1, 56, 50]), 1.0, r"token ids 1\.\.56: expected 0\.\.55"),
        (torch.tensor([[50]]), 1.0, r"token ids \(1, 1\) of torch.int64"),
        (torch.tensor([0.5]), 1.0, "of torch.float32: expected integers"),
        ("a <image>", 3.0, "has 1 <image> for 0 images"),
        ("a" * 600, 1.0, "prompt of 605 tokens: expected at most 500 beside the image"),
    ],
)
def test_bad_prompts(model, condition, scale, message):
    with pytest.raises(InputError, match=message):
        model.start([condition], scale)


def test_bad_arguments(model, pipe):
    with pytest.raises(InputError, match="no conditions"):
        model.start([])
    with pytest.raises(InputError, match="-1"):
        model.start(PROMPTS, -1.0)
    with pytest.raises(InputError, match="draws row by row"):
        model.start(PROMPTS, 1.0, torch.arange(11, -1, -1).expand(2, -1))
    edit = ImagePrompt("<image>", images=[Image.new("RGB", (16, 16))])
    with pytest.raises(InputError, match="with and without images in one batch"):
        model.start([edit, "a cat"], 2.0)
    with pytest.raises(InputError, match="image of \\(4, 4\\) pixels: expected at least 8 a side"):
        model.start([ImagePrompt("<image>", images=[Image.new("RGB", (4, 4))])], 2.0)
    with pytest.raises(
        InputError, match="images of type str: expected PIL images, arrays or tensors"
    ):
        model.start([ImagePrompt("<image>", images=["cat.png"])], 2.0)
    bytes_ = np.random.default_rng(0).integers(0, 256, (17, 19, 3), dtype=np.uint8)
    for form in (bytes_, torch.from_numpy(bytes_).permute(2, 0, 1) / 127.5 - 1):
        (grid, tokens), wanted = model._encode(form), model._encode(Image.fromarray(bytes_))
        assert grid == wanted[0] == (2, 2)
        assert torch.allclose(tokens, wanted[1], atol=1e-5)
    plain = load()
    with pytest.raises(InputError, match="no text tokenizer, expected token ids"):
        plain.start(["a cat"], 1.0)
    with pytest.raises(
        InputError, match="num_iter 4: a causal model draws one latent after another"
    ):
        sample(pipe, num_iter=4)
    with pytest.raises(InputError, match="final_head_steps 5: expected 1 to 4"):
        sample(pipe, final_head_steps=5)
    with pytest.raises(InputError, match="refresh 2: this model keeps no features"):
        sample(pipe, refresh=2)
    with pytest.raises(InputError, match="draft with denoising steps 5: expected the target's 4"):
        sample(pipe, "cspd", draft=load(num_sampling_steps=5))


def test_bad_autoencoders(model, tmp_path):
    other = NextStepAutoencoder(ch=32, ch_mult=(1, 1), num_res_blocks=1, latent_channels=8)
    with pytest.raises(InputError, match="the autoencoder has 8 channels in squares of side 2"):
        NextStep(model.transformer, other)
    alone = NextStep(model.transformer)
    with pytest.raises(InputError, match="no autoencoder: expected one to decode"):
        alone.decode(torch.zeros(1, 12, 16))
    with pytest.raises(InputError, match="expected sides that 8 divides"):
        model.tokenizer.encode(torch.zeros(1, 3, 12, 16))
    tensors = dict(model.tokenizer.state_dict())
    with pytest.raises(CheckpointError, match="nothing says scaling_factor"):
        NextStepAutoencoder.from_official(tensors)
    sizes = {"scaling_factor": 0.5, "shift_factor": 0.0}
    with pytest.raises(CheckpointError, match="its tensors say latent_channels 4, not 16"):
        NextStepAutoencoder.from_official(tensors, z_channels=16, **sizes)
    tensors.pop("decoder.conv_out.bias")
    with pytest.raises(CheckpointError, match=r"key 'decoder\.conv_out\.bias' is missing"):
        NextStepAutoencoder.from_official(tensors, **sizes)
    with pytest.raises(CheckpointError, match="no such folder"):
        NextStepAutoencoder.from_official(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_heads": 8}, "its tensors say num_heads 4, not 8"),
        ({"hidden_size": 128}, "its tensors say hidden_size 64, not 128"),
        ({"latent_channels": 16}, "its tensors say latent_channels 4, not 16"),
        ({"head_width": 64}, "its tensors say head_width 48, not 64"),
        ({"latent_patch_size": 3}, "tokens of 16 values are no 3 x 3 squares"),
        ({"gird": (4, 4)}, "did you mean 'grid'"),
        ({"release": "2"}, "unknown release '2'"),
        ({"shift": 0.0}, "shift 0.0: expected a number > 0"),
        ({"num_sampling_steps": 1}, "num_sampling_steps 1: expected at least 2"),
    ],
)
def test_bad_sizes(sizes, message):
    with pytest.raises((InputError, CheckpointError), match=message):
        load(**sizes)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_bad_folders(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        NextStep.from_official(tmp_path / "nothing")
    folder = official_folder(tmp_path / "one", with_text=False)
    edit_config(folder, rope_scaling={"type": "yarn"})
    with pytest.raises(CheckpointError, match=r"rope_scaling .* is not supported"):
        NextStep.from_official(folder)
    edit_config(folder, rope_scaling=None, use_gen_pos_embed=True)
    with pytest.raises(CheckpointError, match="key 'gen_pos_embed' is missing"):
        NextStep.from_official(folder)
    with pytest.raises(InputError, match="gen_pos_embed has 1024 positions"):
        NextStep.from_official(folder, grid=(33, 32))
    edit_config(folder, use_gen_pos_embed=False, num_hidden_layers=4)
    with pytest.raises(CheckpointError, match="its tensors say num_layers 3, not 4"):
        NextStep.from_official(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object, found list"):
        NextStep.from_official(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        NextStep.from_official(folder)
    folder = official_folder(tmp_path / "two", with_text=False)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors or"):
        NextStep.from_official(folder)


def test_bad_weights(tmp_path):
    folder = official_folder(tmp_path / "one", with_text=False)
    tensors = load_file(folder / "model.safetensors")
    gate = tensors.pop("layers.1.mlp.gate_proj.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"key 'layers\.1\.mlp\.gate_proj\.weight' is missing"
    ):
        NextStep.from_official(folder)
    tensors |= {"layers.1.mlp.gate_proj.weight": gate, "image_head.ema": gate.clone()}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"key 'image_head\.ema' is unexpected"):
        NextStep.from_official(folder)
    # A fixed table that some files hold is not one.
    tensors.pop("image_head.ema")
    save_file(tensors | {"gen_pos_embed": gate.clone()}, folder / "model.safetensors")
    assert NextStepTransformer.from_official(folder, **SIZES).num_tokens == 12


def test_bad_shards(tmp_path):
    folder = official_folder(tmp_path / "shards", shards=3, with_text=False)
    index = folder / "model.safetensors.index.json"
    first, second = (folder / f"model-0000{n}-of-00003.safetensors" for n in (1, 2))
    kept = load_file(first)
    save_file(kept | {"stray": torch.zeros(1)}, first)
    with pytest.raises(CheckpointError, match=r"key 'stray' is not where model\.safetensors"):
        NextStep.from_official(folder)
    save_file(kept, first)
    second.unlink()
    with pytest.raises(CheckpointError, match=f"names {second.name}, which is missing"):
        NextStep.from_official(folder)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="expected an index of shards with a weight_map"):
        NextStep.from_official(folder)


def test_the_autoencoder_may_lie_elsewhere(tmp_path):
    folder = official_folder(tmp_path / "one", with_text=False)
    (folder / "vae").rename(tmp_path / "vae")
    assert NextStep.from_official(folder, **SIZES).tokenizer is None
    assert NextStep.from_official(folder, tmp_path / "vae", **SIZES).tokenizer is not None
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        NextStep.from_official(folder, tmp_path / "nowhere", **SIZES)


@torch.no_grad()
def test_a_table_of_positions_is_added_where_the_configuration_says_so(tmp_path):
    folder = official_folder(tmp_path / "one", with_text=False)
    table = torch.randn(1, 1024, 64, generator=torch.Generator().manual_seed(0))
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"gen_pos_embed": table}, folder / "model.safetensors")
    ids = torch.tensor([3, 1, 50])
    latents = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(1))
    z = []
    for is_used in (False, True):
        edit_config(folder, use_gen_pos_embed=is_used)
        state = NextStep.from_official(folder, **SIZES).start([ids], 1.0)
        z.append(state.contexts(latents, torch.ones(1, 12, dtype=torch.bool), torch.tensor([0])))
    weight = tensors["image_out_projector.weight"].float()
    torch.testing.assert_close(z[1] - z[0], table[:, :12] @ weight.T, rtol=1e-4, atol=1e-4)
