"""Every VAR golden: the official code's numbers, to 1e-5 of each tensor's largest value."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from arvision.models import VAR, VARTokenizer, VARTransformer
from arvision.models.var.quantizer import smoother_indices

TOLERANCE = 1e-5  # float32 rounding in another order of operations
CASES = ["var_d2", "var_d2_shared_aln"]
OFFICIAL = [  # (depth, hidden size, shared_aln, parameters)
    (16, 1024, False, 310_283_520),
    (20, 1280, False, 600_917_136),
    (24, 1536, False, 1_033_399_360),
    (30, 1920, False, 2_010_020_356),
    (36, 2304, True, 2_353_893_904),
]
SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


def relative_error(ours: torch.Tensor, official: torch.Tensor) -> float:
    assert ours.shape == official.shape
    return float((ours - official).abs().max() / official.abs().max())


@pytest.fixture(params=CASES)
def case(request, goldens):
    folder = goldens / "var"
    name = request.param
    sizes = json.loads((folder / f"{name}.json").read_text())
    model = VAR.from_official(folder / f"{name}.pth", folder / f"{name}_vae.pth")
    return model, load_file(folder / f"{name}.io.safetensors"), sizes


def scale_by_scale(model, classes, tokens, guidance_scale):
    state = model.start(classes, guidance_scale)
    rows = []
    for part in tokens.split([side * side for side in model.scales], dim=1):
        rows.append(state.next())
        state.feed(part)
    return torch.cat(rows, dim=1)


def test_sizes_are_read_off_the_tensors(case):
    model, _, sizes = case
    config = model.transformer.config
    assert list(model.scales) == sizes["patch_nums"]
    assert config["shared_aln"] == sizes["shared_aln"]
    assert (config["num_layers"], config["num_heads"]) == (sizes["depth"], sizes["num_heads"])
    assert list(model.tokenizer.config["ch_mult"]) == sizes["vae_ch_mult"]


@pytest.mark.parametrize("kind", ["cond", "null"])
def test_logits_teacher_forced_and_cached(case, kind):
    model, io, _ = case
    tokens = io["random_indices"]
    classes = io["class_ids"] if kind == "cond" else torch.full_like(io["class_ids"], 10)
    views = model.tokenizer.views(tokens)
    assert relative_error(views, io["teacher_input"]) < TOLERANCE
    with torch.no_grad():
        forced = model.transformer.teacher_forced(classes, views)
    assert relative_error(forced, io[f"logits_{kind}"]) < TOLERANCE
    scale = 1.0 if kind == "cond" else 0.0
    cached = scale_by_scale(model, io["class_ids"].tolist(), tokens, scale)
    assert relative_error(cached, io[f"logits_{kind}"]) < TOLERANCE


def test_tokens_drawn_elsewhere_are_read_in_one_pass(case):
    model, io, _ = case
    tokens, classes = io["random_indices"], io["class_ids"].tolist()
    state = model.start(classes, 2.5)
    for part in tokens.split([side * side for side in model.scales], dim=1)[:3]:
        state.next()
        state.feed(part)
    late = model.start(classes, 2.5)
    late.catch_up(tokens[:, :14])
    assert late.scale == 3
    assert relative_error(late.next(), state.next()) < TOLERANCE


def test_guidance_ramp_by_greedy_generation(case):
    model, io, _ = case
    state = model.start(io["class_ids"].tolist(), 1 + 1.5)  # the official cfg 1.5
    drawn = []
    for _ in model.scales:
        drawn.append(state.next().argmax(-1))
        state.feed(drawn[-1])
    tokens = torch.cat(drawn, dim=1)
    assert torch.equal(tokens, io["greedy_cfg_1.5_indices"])
    image = model.decode(tokens) / 2 + 0.5
    assert relative_error(image, io["greedy_cfg_1.5_image"]) < TOLERANCE


def test_tokenizer(case):
    model, io, _ = case
    tokenizer = model.tokenizer
    with torch.no_grad():
        assert relative_error(tokenizer.pre_quant(io["pixels"]), io["pre_quant"]) < TOLERANCE
        indices = tokenizer.encode(io["pixels"])
        assert torch.equal(indices, io["indices"])
        assert relative_error(tokenizer.decode(indices), io["reconstruction"]) < TOLERANCE
        codes = tokenizer.look_up(io["random_indices"])
        canvas, _ = tokenizer.quantize.canvas(codes)
        assert relative_error(canvas, io["random_f_hat"]) < TOLERANCE
        images = tokenizer.decode(io["random_indices"])
        assert torch.equal(images, tokenizer.decode(codes))  # vectors in the place of codes
        image = images if io["random_image"].min() < 0 else images / 2 + 0.5
        assert relative_error(image, io["random_image"]) < TOLERANCE


@pytest.mark.parametrize(("depth", "width", "shared", "count"), OFFICIAL)
def test_official_sizes(depth, width, shared, count):
    with torch.device("meta"):
        network = VARTransformer(
            patch_nums=SCALES_512 if shared else SCALES_256,
            hidden_size=width,
            num_layers=depth,
            num_heads=depth,
            shared_aln=shared,
        )
    assert sum(p.numel() for p in network.parameters()) == count


def test_official_tokenizer_sizes_and_smoothers():
    with torch.device("meta"):
        tokenizer = VARTokenizer()
    assert tokenizer.num_tokens == 680
    shapes = {key: tuple(value.shape) for key, value in tokenizer.state_dict().items()}
    assert shapes["encoder.down.4.block.0.conv1.weight"] == (640, 320, 3, 3)
    assert smoother_indices(10, 4) == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
