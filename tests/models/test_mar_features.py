"""Features that MAR keeps between iterations: exact where nothing depends on what is left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import arvision
from arvision import InputError, get_sampler
from arvision.models.mar.model import MAR
from arvision.models.mar.transformer import KeptFeatures, MARTransformer
from arvision.testing import tiny_llamagen

SIZES = {
    "latent_dim": 3,
    "grid": (3, 3),
    "hidden_size": 32,
    "num_heads": 4,
    "head_width": 16,
    "head_depth": 1,
    "num_classes": 4,
    "num_buffer": 2,
    "num_sampling_steps": 5,
}


def network(encoder_depth: int, decoder_depth: int) -> MARTransformer:
    net = MARTransformer(encoder_depth=encoder_depth, decoder_depth=decoder_depth, **SIZES)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net.eval()


def inputs(known_counts):
    known = torch.zeros(len(known_counts), 9, dtype=torch.bool)
    for row, count in zip(known, known_counts, strict=True):
        row[torch.randperm(9)[:count]] = True
    return torch.randn(len(known), 9, 3), known, torch.randn(len(known), 32)


@torch.no_grad()
@pytest.mark.parametrize("counts", [(0, 0), (4, 4), (2, 7)])
def test_keeping_changes_no_full_pass(counts):
    net = network(2, 2)
    latents, known, condition = inputs(counts)
    kept = net(latents, known, condition, KeptFeatures(net))
    torch.testing.assert_close(kept, net(latents, known, condition), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("encoder_depth", [0, 1])
def test_update_is_exact_where_kept_features_cannot_change(encoder_depth):
    """Without encoder blocks the inputs of the one decoder block stay what they were."""
    net = network(encoder_depth, 1)
    latents, known, condition = inputs((3, 3))
    kept = KeptFeatures(net)
    net(latents, known, condition, kept)
    new = torch.stack([(~row).nonzero()[:2, 0] for row in known])
    queries = torch.stack([(~row).nonzero()[2:4, 0] for row in known])
    known = known.scatter(1, new, True)
    fed = latents.gather(1, new[..., None].expand(-1, -1, 3))
    found = net.update(fed, new, known, queries, kept)
    whole = net(latents, known, condition).gather(1, queries[..., None].expand(-1, -1, 32))
    apart = float((found - whole).abs().max())
    assert apart < 1e-4 if encoder_depth == 0 else apart > 1e-3


def test_refresh_in_the_sampler():
    model = MAR(network(0, 1))
    draw = {"seeds": [(0, 0), (0, 1)], "guidance_scale": 2.0}
    plain = get_sampler("ar", num_iter=6)(model, [1, 2], **draw)
    lazy = get_sampler("ar", num_iter=6, refresh=3)(model, [1, 2], **draw)
    torch.testing.assert_close(lazy.tokens, plain.tokens, rtol=1e-3, atol=1e-3)
    assert plain.stats.lossless
    assert not lazy.stats.lossless
    further = get_sampler("ar", num_iter=6, refresh=3, reuse_guidance=True)(model, [1, 2], **draw)
    assert float((further.tokens - plain.tokens).abs().max()) > 1e-3
    # Without guidance there is no unconditional row to leave out.
    draw["guidance_scale"] = 1.0
    runs = [
        get_sampler("ar", refresh=2, reuse_guidance=reuse)(model, [1, 2], **draw).tokens
        for reuse in (False, True)
    ]
    assert torch.equal(*runs)


def test_embedded_model_stays_near_its_plain_picture():
    pipe = arvision.load("mar-fashion", device="cpu")
    options: dict[str, Any] = {"seed": [(0, 0)], "progress": False, "num_iter": 16}
    changes: list[dict[str, Any]] = [{}, {"refresh": 2}, {"seed": [(0, 1)]}]
    plain, lazy, other = (arvision.sample(pipe, 8, **options | change).tokens for change in changes)
    assert 0 < float((lazy - plain).square().mean()) < 0.5 * float((other - plain).square().mean())


def test_bad_input():
    with pytest.raises(InputError, match="refresh 0: expected an integer >= 1"):
        get_sampler("ar", refresh=0)
    with pytest.raises(InputError, match="refresh 2: a token model has no such option"):
        get_sampler("ar", refresh=2)(tiny_llamagen(), [0], seeds=[0])


def test_fewer_denoising_steps_late_in_the_image():
    model = MAR(network(1, 1))

    def draw(**options):
        sampler = get_sampler("ar", order="raster", **options)
        assert sampler.is_exact == ("final_head_steps" not in options)
        return sampler(model, [1, 2], seeds=[0, 1], guidance_scale=2.0)

    plain, every, fewer = draw(), draw(final_head_steps=5), draw(final_head_steps=2)
    assert torch.equal(plain.tokens, every.tokens)
    assert torch.equal(plain.tokens[:, 0], fewer.tokens[:, 0])
    assert not torch.allclose(plain.tokens[:, -1], fewer.tokens[:, -1])
    assert fewer.stats.head_steps == sum(round(5 - 3 * place / 8) for place in range(9))
    with pytest.raises(InputError, match="final_head_steps 6: expected 1 to 5"):
        draw(final_head_steps=6)
