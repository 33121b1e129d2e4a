"""Features that MAR keeps between iterations: exact where nothing depends on what is left out."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import arvision
from arvision import InputError, get_sampler
from arvision.models.latent_head import SteppedHead, run_part
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
    with pytest.raises(InputError, match="refresh_share 2: expected a share in"):
        get_sampler("ar", refresh=2, refresh_share=2)
    with pytest.raises(InputError, match=r"refresh_share 0\.5 with refresh 1: it would have no"):
        get_sampler("ar", refresh_share=0.5)
    with pytest.raises(InputError, match="refresh_first -1: expected an integer >= 0"):
        get_sampler("ar", refresh_first=-1)
    with pytest.raises(InputError, match="head_refresh 0: expected an integer >= 1"):
        get_sampler("ar", head_refresh=0)
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


@torch.no_grad()
def test_places_that_changed_are_computed_and_all_of_them_are_a_full_decoder_pass():
    """With every place computed one encoder-free decoder is whole; with fewer it is near."""
    net = network(0, 4)
    latents, known, condition = inputs((3, 3))
    new = torch.stack([(~row).nonzero()[:2, 0] for row in known])
    queries = torch.stack([(~row).nonzero()[2:4, 0] for row in known])
    later = known.scatter(1, new, True)
    fed = latents.gather(1, new[..., None].expand(-1, -1, 3))
    whole = net(latents, later, condition).gather(1, queries[..., None].expand(-1, -1, 32))
    apart = {}
    for num in (4, 7, 11):
        kept = KeptFeatures(net)
        net(latents, known, condition, kept)
        found = net.update(fed, new, later, queries, kept, condition, num)
        apart[num] = float((found - whole).abs().mean())
    assert apart[11] < 1e-5 < apart[7] < apart[4]


@torch.no_grad()
def test_the_changed_places_are_chosen_by_the_values_of_the_probe():
    """A slow twin of the choice: the places computed behind the probe are those it names."""
    net = network(0, 4)
    latents, known, condition = inputs((3,))
    kept = KeptFeatures(net)
    net(latents, known, condition, kept)
    assert kept.probe == 1
    new, queries = ((~known[0]).nonzero()[part, 0][None] for part in (slice(0, 1), slice(1, 2)))
    before = kept.decoder[1].values(1)
    later = [kept.decoder[number].values(1) for number in (2, 3)]
    fed = latents.gather(1, new[..., None].expand(-1, -1, 3))
    net.update(fed, new, known.scatter(1, new, True), queries, kept, condition, 5)
    after = kept.decoder[1].values(1)
    likeness = torch.nn.functional.cosine_similarity(after, before, dim=-1).mean(1)[0]
    forced = {2 + int(new), 2 + int(queries)}
    others = [slot for slot in likeness.argsort().tolist() if slot not in forced]
    wanted = forced | set(others[:3])
    for number, old in zip((2, 3), later, strict=True):
        moved = (kept.decoder[number].values(1) - old).abs().amax((1, 3))[0] > 0
        assert set(moved.nonzero()[:, 0].tolist()) == wanted


def test_lazymar_in_the_sampler():
    model = MAR(network(2, 4))
    draw = {"seeds": [(0, 0), (0, 1)], "guidance_scale": 2.0}

    def tokens(**options):
        sampler = get_sampler("ar", num_iter=8, **options)
        assert sampler.is_exact == (not options)
        return sampler(model, [1, 2], **draw).tokens

    plain = tokens()
    # All passes at the start: nothing is left out.
    torch.testing.assert_close(tokens(refresh=9, refresh_first=8), plain, rtol=1e-3, atol=1.0)
    everything = tokens(refresh=9, refresh_share=1.0, refresh_first=2)
    newest = tokens(refresh=9, refresh_first=2)
    assert not torch.equal(newest, plain)
    distances = [float((found - plain).square().mean()) for found in (everything, newest)]
    assert distances[0] < distances[1]
    published = {"refresh": 9, "refresh_first": 5, "refresh_share": "published"}
    lazy = get_sampler("ar", num_iter=8, reuse_guidance=True, head_refresh=7, **published)
    batch = lazy(model, [1, 2], **draw).tokens
    alone = lazy(model, [2], seeds=[(0, 1)], guidance_scale=2.0).tokens
    torch.testing.assert_close(alone[0], batch[1], rtol=1e-4, atol=1e-4)


def test_a_head_computed_in_every_step_is_plain():
    model = MAR(network(1, 1))
    draw = {"seeds": [(0, 0)], "guidance_scale": 2.0}
    plain = get_sampler("ar", num_iter=4)(model, [1], **draw).tokens
    lazy = get_sampler("ar", num_iter=4, head_refresh=2)(model, [1], **draw).tokens
    assert not torch.equal(lazy, plain)
    net, z, x = model.head.net, torch.randn(3, 64), torch.randn(3, 3)
    steps = SteppedHead(net, partial(run_part, net), torch.arange(5.0), z)
    for row in range(5):
        torch.testing.assert_close(steps.lazily(x, row, is_fresh=True), steps.at(x, row))
    # What the last block added, and the distance of the branches, are those of the fresh step.
    fresh, kept = steps.lazily(x, 1, is_fresh=True), steps.lazily(x, 2, is_fresh=False)
    torch.testing.assert_close(kept[1] - kept[0], fresh[1] - fresh[0])
    assert not torch.allclose(kept, steps.at(x, 2))
