"""MAR against outputs of the official code; see tests/goldens/README.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from arvision.decoding.latents.chain import draw_chain, guidance_scales, iteration_ends
from arvision.decoding.latents.schedule import Schedule
from arvision.models.mar import MAR, MARAutoencoder, MARTransformer

GOLDENS = Path(__file__).resolve().parent.parent / "goldens" / "mar"
CASES = {"mar": 25, "mar_sampling": 20}
GUIDED = {"mar": [("1.0", 1.0), ("3.0", 0.95)], "mar_sampling": [("1.0", 1.0), ("3.0", 0.9)]}


def load(name):
    outputs = load_file(GOLDENS / f"{name}.io.safetensors")
    sizes: dict[str, Any] = {"num_heads": 4, "num_sampling_steps": CASES[name]}
    return MAR.from_official(GOLDENS / f"{name}.pth", **sizes), outputs


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return (request.param, *load(request.param))


NOISIEST = 5e-4
"""The first step of a chain multiplies rounding by thousands: there the recorded float32 means are
themselves 7e-5 (without guidance) from those of a float64 run, and how near float32 comes depends on
the processor."""


def assert_close(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


def head_conditions(outputs, guidance):
    if guidance == "1.0":
        return outputs["head_z"]
    return torch.cat([outputs["head_z"], outputs["head_z_null"]], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("mask", ["all_masked", "half", "last"])
@pytest.mark.parametrize("half", ["cond", "null"])
def test_transformer(case, mask, half):
    _, model, outputs = case
    network, ids = model.transformer, outputs["class_ids"]
    condition = network.embed_classes(ids, torch.full_like(ids, half == "null", dtype=torch.bool))
    z = network(outputs["latents"], outputs[f"mask_{mask}"] == 0, condition)
    assert_close(z, outputs[f"z_{mask}_{half}"])


@torch.no_grad()
def test_what_stands_at_masked_positions_does_not_matter_and_rows_may_be_ragged(case):
    _, model, outputs = case
    state = model.start(outputs["class_ids"].tolist(), 2.0)
    latents, images = outputs["latents"], torch.tensor([0, 1])
    known = torch.stack([outputs["mask_half"][0] == 0, outputs["mask_last"][1] == 0])
    junk = torch.where(known[..., None], latents, torch.full_like(latents, 1e3))
    z = state.contexts(junk, known, images)
    width = z.shape[-1] // 2
    for row, mask in enumerate(("half", "last")):
        assert_close(z[row, :, :width], outputs[f"z_{mask}_cond"][row])
        assert_close(z[row, :, width:], outputs[f"z_{mask}_null"][row])


@torch.no_grad()
def test_head_network(case):
    _, model, outputs = case
    out = model.head.net(outputs["head_x"], outputs["head_t"], outputs["head_z"])
    assert_close(out, outputs["head_out"])


def test_schedule(case):
    name, _, outputs = case
    schedule = Schedule(CASES[name])
    assert torch.equal(schedule.timesteps.flip(0), outputs["sample_timesteps"])
    assert_close(schedule.betas, outputs["betas_respaced"], 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("which", [0, 1])
def test_reverse_loop(case, which):
    name, model, outputs = case
    guidance, temperature = GUIDED[name][which]
    law = model.head.law(head_conditions(outputs, guidance), float(guidance))
    start = outputs[f"sample_init_cfg_{guidance}"][None]
    noise = torch.cat([start, outputs[f"sample_noise_cfg_{guidance}"]])
    path = draw_chain(law, noise, temperature)
    for ours, theirs in zip(path.states[1:], outputs[f"sample_trace_cfg_{guidance}"], strict=True):
        assert_close(ours, theirs, NOISIEST)


@torch.no_grad()
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize(("guidance", "temperature"), GUIDED["mar_sampling"])
def test_single_steps(at_once, guidance, temperature):
    model, outputs = load("mar_sampling")
    law = model.head.law(head_conditions(outputs, guidance), float(guidance))
    states, num = outputs["step_x"], CASES["mar_sampling"]
    if at_once:
        means, log_variances = law.path_moments(states)
    else:
        pairs = [law.moments(states[row], num - 1 - row) for row in range(num)]
        means, log_variances = (torch.stack(part) for part in zip(*pairs, strict=True))
    for row in range(num):
        tolerance = 1e-5 if row else NOISIEST
        assert_close(means[row], outputs[f"step_mean_cfg_{guidance}"][row], tolerance)
        assert_close(log_variances[row], outputs[f"step_log_variance_cfg_{guidance}"][row])


@torch.no_grad()
def test_whole_generation():
    """Orders, counts, guidance of each iteration and its noise as the official sampler had them."""
    model, outputs = load("mar_sampling")
    facts = json.loads((GOLDENS / "mar_sampling.json").read_text())
    num, batch = model.num_tokens, len(outputs["class_ids"])
    order = outputs["gen_order"].flip(1)
    ends = iteration_ends(num, facts["gen_num_iter"])
    counts = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    assert [batch * count for count in counts] == outputs["gen_counts"].tolist()
    state = model.start(outputs["class_ids"].tolist(), facts["gen_cfg"], order)
    latents = torch.zeros(batch, num, model.latent_dim)
    scales = guidance_scales(ends, facts["gen_cfg"], facts["gen_cfg_schedule"])
    for k, (count, end) in enumerate(zip(counts, ends, strict=True)):
        positions = order[:, end - count : end]
        # The recorded noise lies in ascending order of position, ours in the order of drawing.
        rank = positions.argsort(1).argsort(1)
        rows = torch.cat([outputs["gen_init"][k][None], outputs["gen_noise"][k]])
        rows = rows[:, : batch * count].unflatten(1, (batch, count))
        index = rank[None, :, :, None].expand(len(rows), -1, -1, rows.shape[-1])
        drawn = model.head.sample(
            state.condition(count),
            rows.gather(2, index),
            guidance_scale=scales[k],
            temperature=facts["gen_temperature"],
        )
        state.feed(drawn)
        latents.scatter_(1, positions[..., None].expand_as(drawn), drawn)
    assert_close(latents, outputs["gen_latents"], 1e-3)


@torch.no_grad()
def test_autoencoder():
    outputs = load_file(GOLDENS / "mar.io.safetensors")
    vae = MARAutoencoder.from_official(GOLDENS / "mar_kl16.ckpt")
    mean, log_variance = vae.moments(outputs["vae_pixels"])
    assert_close(mean, outputs["vae_mean"])
    assert_close(log_variance, outputs["vae_logvar"])
    assert_close(vae.decode_map(outputs["vae_latents"]), outputs["vae_decoded"])


@pytest.mark.parametrize(
    ("sizes", "millions"),
    [
        ({}, 207.9),
        (
            {"hidden_size": 1024, "encoder_depth": 16, "decoder_depth": 16, "num_heads": 16}
            | {"head_width": 1280, "head_depth": 8},
            478.3,
        ),
        (
            {"hidden_size": 1280, "encoder_depth": 20, "decoder_depth": 20, "num_heads": 16}
            | {"head_width": 1536, "head_depth": 12},
            942.4,
        ),
    ],
    ids=["base", "large", "huge"],
)
def test_parameter_counts(sizes, millions):
    with torch.device("meta"):
        model = MARTransformer(**sizes)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_parameter_count_of_the_autoencoder():
    with torch.device("meta"):
        vae = MARAutoencoder()
    assert sum(p.numel() for p in vae.parameters()) / 1e6 == pytest.approx(66.46, abs=0.005)


@torch.no_grad()
def test_autoencoder_as_diffusers_knows_it():
    from arvision.models.mar.diffusers_vae import to_diffusers

    outputs = load_file(GOLDENS / "mar.io.safetensors")
    theirs: Any = to_diffusers(MARAutoencoder.from_official(GOLDENS / "mar_kl16.ckpt"))
    posterior = theirs.encode(outputs["vae_pixels"]).latent_dist
    assert_close(posterior.mean, outputs["vae_mean"])
    assert_close(posterior.logvar, outputs["vae_logvar"])
    assert_close(theirs.decode(outputs["vae_latents"]).sample, outputs["vae_decoded"])
