"""NextStep against outputs of the official code; see tests/goldens/README.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from arvision.decoding.latents.chain import draw_chain, guidance_scales
from arvision.models import ImagePrompt, NextStep, NextStepAutoencoder, NextStepTransformer
from arvision.models.nextstep.autoencoder import patchify, unpatchify

GOLDENS = Path(__file__).resolve().parent.parent / "goldens" / "nextstep"
FACTS = json.loads((GOLDENS / "nextstep.json").read_text())
GRID = (FACTS["grid"], FACTS["grid"])


def load(**sizes) -> NextStep:
    options: dict[str, Any] = {
        "grid": GRID,
        "num_sampling_steps": FACTS["steps"],
        "use_norm": False,
    }
    return NextStep.from_official(GOLDENS / "nextstep", **options | sizes)


@pytest.fixture(scope="module")
def outputs():
    return load_file(GOLDENS / "nextstep.io.safetensors")


@pytest.fixture(scope="module")
def model():
    return load()


def assert_close(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


def prompts(outputs):
    """Captions with their negatives, pads cut off."""
    rows = [
        ids[mask.bool()]
        for ids, mask in zip(outputs["input_ids"], outputs["attention_mask"], strict=True)
    ]
    return [ImagePrompt(rows[0], negative=rows[2]), ImagePrompt(rows[1], negative=rows[3])]


@torch.no_grad()
def test_language_model(model, outputs):
    ids, mask = outputs["input_ids"], outputs["attention_mask"].bool()
    for row in range(4):
        hidden = prefill(model, ids[row][mask[row]])
        assert_close(hidden, outputs["prefill_hidden"][row][mask[row]])
        assert_close(model.transformer.lm_head(hidden[-1]), outputs["prefill_logits"][row])


def prefill(model, ids):
    from transformers import DynamicCache

    places = torch.arange(len(ids))
    mask = torch.zeros(1, 1, len(ids), len(ids)).masked_fill(places > places[:, None], -torch.inf)
    embeddings = model.transformer.embed_tokens(ids)[None]
    return model.transformer(embeddings, mask, places[None], DynamicCache())[0]


def conditions(outputs):
    """[2, N, 2 W]: conditional and unconditional side by side."""
    return torch.cat(outputs["condition"].chunk(2), dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("way", ["one by one", "at once", "in parts", "ragged", "backwards"])
def test_cached_equals_teacher_forced(model, outputs, way):
    state = model.start(prompts(outputs), 3.0)
    tokens, images = outputs["teacher_tokens"], torch.arange(2)
    num = tokens.shape[1]
    wanted = conditions(outputs)
    if way == "one by one":
        z = []
        for place in range(num):
            z.append(state.condition(1))
            state.feed(tokens[:, place : place + 1])
        assert state.lengths.tolist() == [num, num]
        assert_close(torch.cat(z, dim=1), wanted)
        return
    counts = {
        "at once": [(num, num)],
        "in parts": [(3, 3), (9, 9), (num, num)],
        "ragged": [(5, 2), (5, 11), (num, 11), (num, num)],
        "backwards": [(num, num), (4, 9)],
    }[way]
    for pair in counts:
        known = torch.arange(num) < torch.tensor(pair)[:, None]
        junk = torch.where(known[..., None], tokens, torch.full_like(tokens, 7.0))
        z = state.contexts(junk, known, images)
        for row, count in enumerate(pair):
            last = min(count, num - 1)
            assert_close(z[row, : last + 1], wanted[row, : last + 1])
            # What is further on has no condition of its own yet.
            assert torch.equal(z[row, last:], z[row, last].expand_as(z[row, last:]))


@torch.no_grad()
def test_contexts_that_disagree_do_not_mix(model, outputs):
    state = model.start(prompts(outputs), 3.0)
    tokens = outputs["teacher_tokens"]
    num = tokens.shape[1]
    other = tokens.flip(1)
    rows = torch.stack([tokens[0], other[0], tokens[1], tokens[0]])
    images = torch.tensor([0, 0, 1, 0])
    known = torch.arange(num) < torch.tensor([6, 9, num, 3])[:, None]
    z = state.contexts(rows, known, images)
    wanted = conditions(outputs)
    for row, count in ((0, 6), (2, num - 1), (3, 3)):
        assert_close(z[row, : count + 1], wanted[images[row], : count + 1])
    alone = model.start(prompts(outputs)[:1], 3.0)
    assert_close(z[1], alone.contexts(other[:1], known[1:2], torch.tensor([0]))[0])
    # Afterwards the state still knows what it was fed.
    for place in range(3):
        state.feed(tokens[:, place : place + 1])
    assert_close(state.condition(1)[:, 0], wanted[:, 3])


@torch.no_grad()
def test_head_network(model, outputs):
    out = model.head.net(outputs["head_x"], outputs["head_t"], outputs["head_condition"])
    assert_close(out, outputs["head_velocity"])


TRACES = {
    "sample_cfg_1": (1.0, {}),
    "sample_cfg_3": (3.0, {}),
    "sample_cfg_7.5_shift_3.2": (7.5, {"shift": 3.2}),
    "sample_cfg_3_image_2": (3.0, {"image_guidance_scale": 2.0}),
    "v11_cfg_3": (3.0, {"release": "1.1"}),
    "v11_cfg_3_shift_2": (3.0, {"release": "1.1", "shift": 2.0}),
}


@torch.no_grad()
@pytest.mark.parametrize("tag", TRACES)
def test_chains(outputs, tag):
    scale, sizes = TRACES[tag]
    model = load(**sizes)
    three = tag.endswith("image_2")
    z = outputs["sample_condition_three" if three else "sample_condition"]
    z = z[:2] if scale == 1 else torch.cat(z.split(2), dim=-1)
    assert_close(model.head.steps.times().float(), outputs[f"{tag}_times"])
    noise = outputs[f"{tag}_noise"]
    steps = model.head.num_steps
    # The first release's last step takes no noise.
    noise = torch.cat([noise, torch.full_like(noise[:1], 1e9)])[: steps + 1]
    path = draw_chain(model.head.law(z, scale), noise)
    assert_close(path.states[1:], outputs[f"{tag}_trace"], 1e-4)
    # All steps at once say the same.
    means, log_variances = model.head.law(z, scale).path_moments(path.states[:-1])
    assert_close(means, path.means)
    assert_close((0.5 * log_variances).exp(), path.scales)


GENERATIONS = {
    "generate_norm": ({"use_norm": True}, "constant"),
    "generate_linear": ({"shift": 2.0}, "falling"),
}


@torch.no_grad()
@pytest.mark.parametrize("tag", GENERATIONS)
def test_generation(outputs, tag):
    """Each token from the recorded ones before it.

    These random weights multiply a difference by 2.5 from token to token: what starts as rounding
    (4e-6 at the first token) would be as large as the tokens at the last.
    """
    sizes, schedule = GENERATIONS[tag]
    model = load(num_sampling_steps=FACTS["gen_steps"], **sizes)
    state = model.start(prompts(outputs), 3.0)
    num, recorded = model.num_tokens, outputs[f"{tag}_tokens"]
    scales = guidance_scales(list(range(1, num + 1)), 3.0, schedule)
    for place, (noise, scale) in enumerate(zip(outputs[f"{tag}_noise"], scales, strict=True)):
        padded = torch.cat([noise, torch.zeros_like(noise[:1])])
        latents = draw_chain(model.head.law(state.condition(1)[:, 0], scale), padded).latents
        tokens = model.transformer.normalised(latents)
        assert_close(tokens, recorded[:, place], 1e-4)
        # A normalised token is fed and decoded as what the head drew.
        state.feed((latents if place == 0 else recorded[:, place])[:, None])


@torch.no_grad()
def test_decoding(outputs):
    model = load(use_norm=True)
    tokens, latents = outputs["generate_norm_tokens"], outputs["generate_norm_latents"]
    vae: Any = model.tokenizer
    config = vae.config
    ours = unpatchify(model.transformer.normalised(tokens), 2, GRID)
    assert_close(ours / config["scaling_factor"] + config["shift_factor"], latents)
    image = outputs["generate_norm_image"]
    assert_close(vae.decode_map(latents[:1]), image)
    assert_close(model.decode(tokens)[:1], image.clamp(-1, 1))
    # What the head drew before the normalisation decodes alike.
    assert_close(model.decode(3 * tokens + 1)[:1], image.clamp(-1, 1), 1e-4)


@torch.no_grad()
def test_autoencoder(model, outputs):
    vae = model.tokenizer
    mean, log_variance = vae.moments(outputs["vae_pixels"])
    raw = vae.encoder(outputs["vae_pixels"])
    assert_close(raw, outputs["vae_moments_before_norm"])
    assert_close(mean, outputs["vae_mean"])
    assert_close(log_variance, outputs["vae_logvar"])
    tokens = vae.encode(outputs["vae_pixels"])
    assert_close(tokens, outputs["vae_tokens"])
    assert_close(unpatchify(tokens, 2, GRID), outputs["vae_latents"])
    assert torch.equal(patchify(unpatchify(tokens, 2, (2, 8)), 2), tokens)
    assert_close(vae.decode_map(outputs["vae_mean"]), outputs["vae_decoded"])
    assert_close(vae.decode(tokens, GRID), outputs["vae_decoded"])


def test_parameters_of_the_official_sizes():
    with torch.device("meta"):
        network, vae = NextStepTransformer(), NextStepAutoencoder()
    count = sum(p.numel() for p in network.parameters())
    head = sum(p.numel() for p in network.image_head.parameters())
    assert count == 14_953_814_080
    assert round(head / 1e6) == 157
    assert round(sum(p.numel() for p in vae.parameters()) / 1e5) == 838
