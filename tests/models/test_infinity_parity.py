"""Every Infinity golden: the official code's numbers, to 1e-5 of each tensor's largest value."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from arvision import Prompt
from arvision.decoding.logits import Shaping
from arvision.models import Infinity, InfinityTokenizer, InfinityTransformer
from arvision.models.infinity.schedules import NUM_SCALES, RATIOS, rotary_grid, scale_schedule

TOLERANCE = 1e-5  # float32 rounding in another order of operations
TRACE = 1e-4  # probabilities behind a temperature of 0.5
CASES = ["infinity", "infinity_patchify"]


def relative_error(ours: torch.Tensor, official: torch.Tensor) -> float:
    assert ours.shape == official.shape
    return float((ours - official).abs().max() / official.abs().max())


class Case:
    """A tiny model in the official layout and what the official code made of it."""

    def __init__(self, folder, name):
        self.sizes = json.loads((folder / f"{name}.json").read_text())
        self.model = Infinity.from_official(
            folder / f"{name}.pth",
            folder / f"{name}_vae.pth",
            scale_schedule=self.sizes["scale_schedule"],
            patch_size=self.sizes["patch_size"],
            num_heads=self.sizes["num_heads"],
        )
        self.io = load_file(folder / f"{name}.io.safetensors")
        self.vae = load_file(folder / f"{name}_vae.io.safetensors")
        self.made = load_file(folder / f"{name}_generation.io.safetensors")

    def parts(self, kind):
        lengths = self.made[f"{kind}_lengths"].tolist()
        return list(self.made[f"{kind}_features"].split(lengths))

    def folded(self, latent_bits):
        """Bits per latent [B, M, D] as bits per token [B, L, d]."""
        pyramid = self.model.transformer.pyramid
        sizes = [pyramid.latent_size(scale) for scale in range(len(pyramid.scales))]
        parts = latent_bits.float().split([h * w for h, w in sizes], dim=1)
        maps = [p.mT.unflatten(2, size) for p, size in zip(parts, sizes, strict=True)]
        return torch.cat([pyramid.fold(one) for one in maps], dim=1).long()


@pytest.fixture(scope="module", params=CASES)
def case(request, goldens):
    return Case(goldens / "infinity", request.param)


@pytest.fixture(scope="module")
def plain(goldens):
    return Case(goldens / "infinity", "infinity")


def scale_by_scale(model, conditions, bits, guidance_scale):
    state, rows = model.start(conditions, guidance_scale), []
    for part in bits.split(model.transformer.pyramid.counts, dim=1):
        rows.append(state.next())
        state.feed(part)
    return torch.cat(rows, dim=1).flatten(2)


def greedy(model, conditions, guidance_scale):
    state, drawn = model.start(conditions, guidance_scale), []
    for _ in model.scales:
        drawn.append(state.next().argmax(-1))
        state.feed(drawn[-1])
    return torch.cat(drawn, dim=1), state.canvas


def test_sizes_are_read_off_the_tensors(case):
    config, sizes = case.model.transformer.config, case.sizes
    assert [list(size) for size in case.model.scales] == sizes["scale_schedule"]
    assert (config["num_layers"], config["num_chunks"]) == (sizes["depth"], sizes["block_chunks"])
    assert config["hidden_size"] == sizes["embed_dim"]
    assert config["patchify"] == bool(sizes["apply_spatial_patchify"])
    tokenizer = case.model.tokenizer
    assert list(tokenizer.config["ch_mult"]) == sizes["encoder_ch_mult"]
    assert list(tokenizer.config["decoder_ch_mult"]) == sizes["decoder_ch_mult"]
    assert tokenizer.downsample_factor == sizes["patch_size"]
    assert case.model.scales == scale_schedule(sizes["pn"], sizes["h_div_w"])


@pytest.mark.parametrize("kind", ["cond", "null"])
def test_logits_teacher_forced_and_cached(case, kind):
    model, io = case.model, case.io
    text, bits = io["text_features"], io["teacher_bits"].long()
    _, views = model.transformer.pyramid.canvas(bits, torch.float32)
    assert relative_error(views, io["teacher_input"]) < TOLERANCE
    rows = text if kind == "cond" else model.transformer.cfg_uncond[: len(text)]
    with torch.no_grad():
        forced = model.transformer.teacher_forced([rows], views).flatten(2)
    assert relative_error(forced, io[f"logits_{kind}"]) < TOLERANCE
    cached = scale_by_scale(model, [text], bits, 1.0 if kind == "cond" else 0.0)
    assert relative_error(cached, io[f"logits_{kind}"]) < TOLERANCE


def test_captions_of_different_lengths_share_a_batch(case):
    model, bits = case.model, case.made["greedy_cfg_3"].long()
    both = scale_by_scale(model, case.parts("text"), bits, 3.0)
    for row, text in enumerate(case.parts("text")):
        alone = scale_by_scale(model, [text], bits[row : row + 1], 3.0)
        assert relative_error(both[row : row + 1], alone) < TOLERANCE


def test_bits_drawn_elsewhere_are_read_in_one_pass(case):
    model, bits = case.model, case.io["teacher_bits"].long()
    counts = model.transformer.pyramid.counts
    state = model.start([case.io["text_features"]], 3.0)
    for part in bits.split(counts, dim=1)[:4]:
        state.next()
        state.feed(part)
    late = model.start([case.io["text_features"]], 3.0)
    late.catch_up(bits[:, : sum(counts[:4])])
    assert late.scale == 4
    assert relative_error(late.next(), state.next()) < TOLERANCE


def test_greedy_generation(case):
    bits, canvas = greedy(case.model, case.parts("text"), 3.0)
    assert torch.equal(bits, case.made["greedy_cfg_3"].long())
    assert relative_error(canvas[:1], case.made["greedy_cfg_3_f_hat"]) < TOLERANCE
    image = ((case.model.decode(bits[:1]) + 1) / 2 * 255).to(torch.uint8)
    official = case.made["greedy_cfg_3_image"].flip(-1).permute(0, 3, 1, 2)  # BGR
    assert int((image.int() - official.int()).abs().max()) <= 1


def test_guidance_of_each_scale(case):
    bits, _ = greedy(case.model, case.parts("text"), case.sizes["cfg_list"])
    assert torch.equal(bits, case.made["greedy_cfg_list"].long())
    assert not torch.equal(bits, case.made["greedy_cfg_3"].long())


def test_negative_prompts(case):
    pairs = zip(case.parts("text"), case.parts("negative"), strict=True)
    prompts = [Prompt(text, negative=negative) for text, negative in pairs]
    bits, _ = greedy(case.model, prompts, 3.0)
    assert torch.equal(bits, case.made["greedy_negative_cfg_3"].long())


def test_no_guidance_and_guided_logits(plain):
    bits, _ = greedy(plain.model, plain.parts("text"), 1.0)
    assert torch.equal(bits, plain.made["greedy_cfg_1"].long())
    bits = plain.made["greedy_cfg_3"][:1].long()
    logits = scale_by_scale(plain.model, plain.parts("text")[:1], bits, 3.0)
    assert relative_error(logits / 0.5, plain.made["greedy_cfg_3_logits"]) < TOLERANCE


def test_guidance_within_the_network(goldens, plain):
    folder, sizes = goldens / "infinity", plain.sizes
    scales = sizes["scale_schedule"]
    model = Infinity.from_official(
        folder / "infinity.pth", scale_schedule=scales, guidance_layer=-2
    )
    bits, _ = greedy(model, plain.parts("text"), 3.0)
    assert torch.equal(bits, plain.made["greedy_layer_cfg_3"].long())
    counts = model.transformer.pyramid.counts
    guidance = sizes["cfg_list"]
    state = model.start(plain.parts("text"), guidance)
    for part in bits.split(counts, dim=1)[:4]:
        state.next()
        state.feed(part)
    late = model.start(plain.parts("text"), guidance)
    late.catch_up(bits[:, : sum(counts[:4])])
    assert relative_error(late.next(), state.next()) < TOLERANCE


def test_laws_of_the_official_draw(case):
    bits = case.made["sampled_cfg_4"][:1].long()
    logits = scale_by_scale(case.model, case.parts("text")[:1], bits, 4.0)
    laws = Shaping(temperature=0.5, top_k=900, top_p=0.97)(logits.unflatten(-1, (-1, 2)))
    ones = laws[..., 1].exp()
    assert float((ones - case.made["sampled_cfg_4_prob_one"]).abs().max()) < TRACE


def test_tokenizer(case):
    tokenizer, io = case.model.tokenizer, case.vae
    with torch.no_grad():
        assert relative_error(tokenizer.features(io["pixels"]), io["features"]) < TOLERANCE
        bits = tokenizer.encode(io["pixels"])
        assert torch.equal(bits, case.folded(io["bits"]))
        assert relative_error(tokenizer.decode(bits), io["reconstruction"]) < TOLERANCE
        for given, wanted in (("bits", "f_hat"), ("random_bits", "random_f_hat")):
            canvas, _ = tokenizer.pyramid.canvas(case.folded(io[given]), torch.float32)
            assert relative_error(canvas, io[wanted]) < TOLERANCE


def test_a_tokenizer_alone_counts_latents(case, goldens, request):
    sizes = case.sizes
    side = 2 if sizes["apply_spatial_patchify"] else 1
    scales = [(side * h, side * w) for h, w in sizes["scale_schedule"]]
    name = request.node.callspec.params["case"]
    path = goldens / "infinity" / f"{name}_vae.pth"
    tokenizer = InfinityTokenizer.from_official(path, scale_schedule=scales)
    with torch.no_grad():
        assert torch.equal(tokenizer.encode(case.vae["pixels"]), case.vae["bits"].long())


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        ({}, 2_204_564_032),
        (
            {
                "num_bits": 56,
                "patchify": True,
                "hidden_size": 3584,
                "num_layers": 40,
                "num_heads": 28,
            },
            8_375_791_824,
        ),
    ],
    ids=["2B", "8B"],
)
def test_official_sizes(sizes, count):
    with torch.device("meta"):
        network = InfinityTransformer(**sizes)
    assert sum(p.numel() for p in network.parameters()) == count
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    width = network.config["hidden_size"]
    assert shapes["text_proj_for_sos.ca.mat_q"] == (1, 16, width // 16)
    assert shapes["block_chunks.7.module.3.ffn.fc1.weight"] == (4 * width, width)


def test_official_tokenizer_size():
    with torch.device("meta"):
        tokenizer = InfinityTokenizer()
    assert round(sum(p.numel() for p in tokenizer.parameters()) / 1e6, 1) == 110.1


@pytest.mark.parametrize("ratio", RATIOS)
def test_schedules(ratio):
    longest = scale_schedule("1M", ratio)
    for pixels, num in NUM_SCALES.items():
        scales = scale_schedule(pixels, ratio)
        assert scales == longest[:num]
        assert rotary_grid(scales) == longest[-1]
    height, width = longest[-1]
    # The grids of the paper come as near to a ratio and to 1M pixels as whole tokens allow.
    assert height / width == pytest.approx(ratio, rel=0.02)
    assert 256 * height * width == pytest.approx(1024**2, rel=0.07)


def test_square_schedules_have_the_published_number_of_tokens():
    totals = [sum(h * w for h, w in scale_schedule(pixels)) for pixels in NUM_SCALES]
    assert totals == [521, 2521, 6425, 10521]
