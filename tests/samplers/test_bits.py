"""Samplers of bitwise scale models: the product law of bits, one picture per seed, lossy options."""

from __future__ import annotations

import json

import pytest
import torch
from forms import SHORT, by_draws, by_fault
from safetensors.torch import load_file

from arvision import InputError, get_sampler
from arvision.decoding.run import Run
from arvision.decoding.scale_loop import decode_scales
from arvision.decoding.verify import gumbel_draw
from arvision.errors import StateError
from arvision.models import Infinity
from arvision.testing import ScaleTable, draw_joint, law_p_value

ALPHA = 1e-4


def table(seed=3):
    """Two scales, 1x1 and 1x2, of 2 bits per token: 64 pictures."""
    return ScaleTable(vocab_size=2, scales=((1, 1), (1, 2)), seed=seed, num_bits=2)


@pytest.fixture(scope="module")
def case(request):
    """A real network with random weights, float64: rounding cannot flip a bit."""
    folder = request.config.rootpath / "tests" / "goldens" / "infinity"
    sizes = json.loads((folder / "infinity.json").read_text())
    model = Infinity.from_official(
        folder / "infinity.pth",
        folder / "infinity_vae.pth",
        scale_schedule=sizes["scale_schedule"],
    )
    made = load_file(folder / "infinity_generation.io.safetensors")
    texts = list(made["text_features"].double().split(made["text_lengths"].tolist()))
    return model.to(torch.float64), texts


@by_draws
@pytest.mark.parametrize("shaping", [{}, {"temperature": 1.4, "top_k": 900}, {"top_p": 0.8}])
def test_joint_law(shaping, num):
    sampler = get_sampler("ar", **shaping)
    samples = draw_joint(sampler, table(), num, seed=3)
    assert law_p_value(samples, table().joint(sampler.shaping())) > ALPHA


@by_fault
def test_a_mutant_whose_bits_hang_together_is_found(num, off):
    def clinging(laws, positions, noise):
        """A share of the tokens gives their first bit to all bits."""
        drawn = gumbel_draw(laws, positions, noise)
        holds = noise.uniform(positions, "accept") < off
        return torch.where(holds[..., None], drawn[..., :1], drawn)

    shape = get_sampler("ar").shaping()
    seeds = [(3, image) for image in range(num)]
    out = decode_scales(
        table(), [None] * num, Run(num, table().num_tokens, seeds), shape=shape, pick=clinging
    )
    assert out.tokens.shape == (num, 3, 2)
    assert law_p_value(table().number(out.tokens), table().joint(shape)) < ALPHA


def test_temperature_of_each_scale():
    hot, cold = get_sampler("ar", temperature=2.0), get_sampler("ar", temperature=0.5)
    mixed = get_sampler("ar", temperature=[2.0, 0.5])
    one = table()
    one.tables[0] = one.tables[0] / 2.0
    one.tables[1] = one.tables[1] / 0.5
    joint = one.joint(get_sampler("ar").shaping())
    assert law_p_value(draw_joint(mixed, table(), SHORT, seed=5), joint) > ALPHA
    for other in (hot, cold):
        assert law_p_value(draw_joint(other, table(), SHORT, seed=5), joint) < ALPHA


def test_code_draws_the_coarse_scales_from_the_draft():
    large, small = table(0), table(1)
    sampler = get_sampler("code", draft=large, draft_scales=1, temperature=[1.0, 1.5])
    samples = draw_joint(sampler, small, SHORT, seed=7)
    mixed = table(1)
    mixed.tables = [large.tables[0], small.tables[1] / 1.5]
    plain = get_sampler("ar").shaping()
    assert law_p_value(samples, mixed.joint(plain)) > ALPHA
    assert law_p_value(samples, small.joint(plain)) < ALPHA


def test_a_seed_names_a_picture(case):
    model, texts = case
    seeds, guidance = [(5, 0), (5, 1), (5, 2)], [1.0, 1.0, 1.5, 2.0, 3.0, 4.0, 3.0]
    conditions = [texts[0], texts[1], texts[0]]
    for name, options in (("ar", {}), ("ar", {"prune": 0.5}), ("code", {"draft": model})):
        sampler = get_sampler(name, temperature=0.5, **options)
        batch = sampler(model, conditions, seeds=seeds, guidance_scale=guidance)
        assert batch.tokens.shape == (3, 521, 8)
        for row in (0, 1):
            one = {"seeds": [seeds[row]], "guidance_scale": guidance}
            alone = sampler(model, conditions[row : row + 1], **one)
            assert torch.equal(alone.tokens[0], batch.tokens[row])
    assert batch.stats.draft_passes == 3
    plain = get_sampler("ar", temperature=0.5)(
        model, conditions, seeds=seeds, guidance_scale=guidance
    )
    assert torch.equal(plain.tokens, batch.tokens)  # code with itself as its draft
    assert plain.stats.computed_tokens == 521
    assert not torch.equal(plain.tokens[0], plain.tokens[2])


def test_pruning_restores_in_every_layer(case):
    model, texts = case
    run = {"seeds": [0, 1], "guidance_scale": 3.0}
    plain = get_sampler("ar")(model, texts, **run)
    pruned = get_sampler("ar", prune=0.5, prune_scales=1)(model, texts, **run)
    assert pruned.stats.computed_tokens == 521 - 128
    assert not pruned.stats.lossless
    assert torch.equal(pruned.tokens[:, :265], plain.tokens[:, :265])
    differs = (pruned.tokens != plain.tokens)[:, 265:].double().mean()
    assert 0.001 < differs < 0.35  # other bits here and there, and not another picture


@torch.no_grad()
def test_pruning_as_a_plain_loop_over_the_layers(case):
    """FastVAR spelled out on one picture: what the pruner does, without the pruner."""
    model, texts = case
    state = model.start(texts[:1])
    for scale in range(6):
        logits = state.next_reference() if scale == 5 else state.next()
        state.feed(torch.randint(2, logits.shape[:-1]))  # unlike tokens, so that no two tie
    memory = {name: part.clone() for name, part in state._pruner._memory.items()}
    whole = [state._cache._parts[layer] for layer in range(4)]
    got = state.next_pruned(0.75)

    network = model.transformer
    rows = network.text_rows(texts[:1])
    view = network.pyramid.view(state.canvas, 6)
    x = network.word_embed(view) + network.places(265, 521)
    angles = network.angles()[265:]
    for layer, block in enumerate(network.blocks):
        gates = (block.ada_gss + rows.modulation).unbind(2)

        def norm(h, scale, shift, eps=block.eps):
            return torch.nn.functional.layer_norm(h, h.shape[-1:], eps=eps) * (1 + scale) + shift

        def step(name, x, part, layer=layer):
            far = (x - x.mean(1, keepdim=True)).square().sum(-1)[0]
            kept = far.argsort(descending=True)[:64].sort().values
            added = torch.nn.functional.interpolate(
                memory[layer, name].float(), size=(16, 16), mode="area"
            )
            added = added.double().flatten(2).mT.clone()
            added[:, kept] = part(x[:, kept], kept)
            return x + added

        class Cache:
            def update(self, layer, keys, values):
                old_keys, old_values = whole[layer]
                return torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)

        def attend(h, kept, block=block, gates=gates, layer=layer):
            h = norm(h, gates[2], gates[4])
            return gates[0] * block.sa(h, angles[kept], layer, None, Cache())

        x = step("attend", x, attend)
        x = step("read", x, lambda h, kept, block=block: block.ca(block.ca_norm(h), rows.text))
        x = step(
            "think",
            x,
            lambda h, kept, block=block, gates=gates: (
                gates[1] * block.ffn(norm(h, gates[3], gates[5]))
            ),
        )
    wanted = network.logits(x, rows.head)
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-6


def test_what_does_not_fit(case):
    model, texts = case
    with pytest.raises(InputError, match="guidance_scale of 3 numbers: expected one number, or 7"):
        get_sampler("ar")(model, texts[:1], seeds=[0], guidance_scale=[1.0, 2.0, 3.0])
    with pytest.raises(InputError, match="temperature of 2 numbers: expected one number, or 7"):
        get_sampler("ar", temperature=[1.0, 0.5])(model, texts[:1], seeds=[0])
    with pytest.raises(InputError, match=r"temperature -1: expected a number >= 0"):
        get_sampler("ar", temperature=[1.0, -1])
    with pytest.raises(InputError, match=r"guidance_scale -1: expected a number >= 0"):
        get_sampler("ar")(model, texts[:1], seeds=[0], guidance_scale=[1.0] * 6 + [-1])
    with pytest.raises(InputError, match="this model has no codebook to mix"):
        get_sampler("ar", more_smooth=True)(model, texts[:1], seeds=[0])
    with pytest.raises(InputError, match="this model has no codebook to flow to"):
        get_sampler("ar", noise="flow")(model, texts[:1], seeds=[0])
    thick = ScaleTable(vocab_size=2, scales=((1, 1), (1, 2)), num_bits=3)
    codes = ScaleTable(vocab_size=3, scales=((1, 1), (1, 2)))
    for draft, message in ((thick, "num_bits 3: expected 2"), (codes, "vocab_size 3: expected 2")):
        with pytest.raises(InputError, match=f"the draft has {message}"):
            get_sampler("code", draft=draft, draft_scales=1)(table(), [None], seeds=[0])


def test_lists_are_for_scale_models(fashion):
    model = fashion.model
    with pytest.raises(
        InputError, match=r"guidance_scale \[1, 2\]: .*only scale models take a list"
    ):
        get_sampler("ar")(model, [0], seeds=[0], guidance_scale=[1, 2])
    with pytest.raises(InputError, match=r"temperature \[1.0, 2.0\]: expected a number"):
        get_sampler("ar", temperature=[1.0, 2.0])(model, [0], seeds=[0])


def test_states_refuse_what_is_out_of_turn(case):
    model, texts = case
    state = model.start(texts[:1])
    with pytest.raises(StateError, match="next_pruned without next_reference"):
        state.next_pruned(0.5)
    state.next()
    with pytest.raises(InputError, match=r"bits \(1, 1\): expected \[1, 1, 8\] at scale 0"):
        state.feed(torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(InputError, match="bits must be 0 or 1"):
        state.feed(torch.full((1, 1, 8), 2))
