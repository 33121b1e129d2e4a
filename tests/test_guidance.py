"""Guidance that changes over an image and from image to image, under every sampler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_pipelines import tiny

from arvision import InputError, get_sampler
from arvision.decoding.guidance import Guidance
from arvision.testing import tiny_llamagen

SEEDS = [(2, 0), (2, 1)]
SAMPLERS = ["ar", "sjd:window=5", "sjd:window=16:tree=drift", "draft"]


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny_llamagen(grid=(4, 4))
    model.transformer.double()
    return model


def draw(model: Any, name: str, guidance: Any) -> torch.Tensor:
    options = {"draft": tiny_llamagen(grid=(4, 4), sharpness=6.0)} if name == "draft" else {}
    sampler = get_sampler(name, **options)
    return sampler(model, [0, 1], seeds=SEEDS, guidance_scale=guidance).tokens


def by_hand(model: Any, weights: torch.Tensor) -> torch.Tensor:
    """Plain sampling with [B, N] weights, from the conditional and the null logits apart."""
    from arvision.decoding.noise import Noise

    halves = [model.start([0, 1], scale) for scale in (1.0, 0.0)]
    logits = [one for _, one in halves]
    noise, tokens = Noise(SEEDS), torch.zeros(2, 0, dtype=torch.int64)
    for place in range(model.num_tokens):
        conditional, null = logits
        guided = null + weights[:, place, None] * (conditional - null)
        numbers = noise.gumbel(torch.full((2, 1), place), model.vocab_size)[:, 0]
        token = (guided.log_softmax(-1) + numbers).argmax(-1)[:, None]
        tokens = torch.cat([tokens, token], dim=1)
        if place + 1 < model.num_tokens:
            logits = []
            for state, _ in halves:
                logits.append(state.extend(token)[:, 0])
                state.commit(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, dtype=torch.int64))
    return tokens


RAMP = [0.5 * place for place in range(16)]
PLANS: dict[str, tuple[Any, list[list[float]]]] = {
    "list": (Guidance(RAMP), [RAMP, RAMP]),
    "per image": (Guidance([[1.0], [6.0]]), [[1.0] * 16, [6.0] * 16]),
    "per image and token": (Guidance([RAMP, RAMP[::-1]]), [RAMP, RAMP[::-1]]),
    "interval": (Guidance(4.0, (0.25, 0.5)), [[1.0] * 4 + [4.0] * 4 + [1.0] * 8] * 2),
    "linear": (Guidance(4.0, "linear"), [[1 + 3 * place / 15 for place in range(16)]] * 2),
    "function": (
        Guidance(4.0, lambda share, scale: scale * share**2),
        [[4.0 * (place / 15) ** 2 for place in range(16)]] * 2,
    ),
}


@pytest.mark.parametrize("plan", PLANS)
def test_every_position_has_its_own_weight(plan, model):
    guidance, weights = PLANS[plan]
    expected = by_hand(model, torch.tensor(weights, dtype=torch.float64))
    for name in SAMPLERS:
        assert torch.equal(draw(model, name, guidance), expected), name
    assert not torch.equal(draw(model, "ar", 3.0), expected)
    for name in ("zipar", "pjd"):  # a weight for each position, whatever the order
        assert draw(model, name, guidance).shape == expected.shape


def test_constant_weights_are_a_number(model):
    plain = draw(model, "sjd:window=5", 3.0)
    for guidance in (Guidance([3.0] * 16), Guidance([[3.0], [3.0]]), Guidance(3.0, "constant")):
        assert torch.equal(draw(model, "sjd:window=5", guidance), plain)


def test_compiled_steps_use_each_positions_weight(model):
    from arvision.decoding.fixed_step import Steps

    sampler: Any = get_sampler("sjd:window=5")
    call: dict[str, Any] = {"seeds": SEEDS, "guidance_scale": Guidance(RAMP)}
    out = sampler(model, [0, 1], **call, steps=Steps("eager"))
    assert torch.equal(out.tokens, draw(model, "ar", Guidance(RAMP)))


@pytest.mark.parametrize(
    "family", ["llamagen", "var", "infinity", "infinity inside", "mar", "nextstep"]
)
def test_each_family_takes_schedules_and_weights_for_each_image(family):
    pipe, prompt = tiny(family)
    call: dict[str, Any] = {"output_type": "latent", "seed": 3}
    units = {
        "llamagen": 16,
        "var": 4,
        "infinity": 3,
        "infinity inside": 3,
        "mar": 9,
        "nextstep": 12,
    }
    num = units[family]
    ramp = [1.0 + 0.3 * unit for unit in range(num)]
    alone = [
        pipe(prompt, seed=[(3, image)], output_type="latent", guidance_scale=weights).tokens
        for image, weights in enumerate((ramp, ramp[::-1]))
    ]
    both = pipe([prompt] * 2, guidance_scale=[ramp, ramp[::-1]], **call).tokens
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-3, rtol=1e-3)
    plain = pipe(prompt, guidance_scale=[1.5] * num, **call).tokens
    constant = pipe(prompt, guidance_scale=1.5, guidance_schedule="constant", **call).tokens
    torch.testing.assert_close(plain, constant)
    changed = pipe(prompt, guidance_scale=5.0, guidance_schedule=(0.0, 0.5), **call).tokens
    assert not torch.equal(changed, pipe(prompt, guidance_scale=5.0, **call).tokens)
    with pytest.raises(
        InputError, match=f"guidance_scale of {num + 1} numbers: expected one number, or {num}"
    ):
        pipe(prompt, guidance_scale=[1.0] * (num + 1), **call)
    with pytest.raises(InputError, match="guidance_scale of 3 lists: expected 1"):
        pipe(prompt, guidance_scale=[[1.0]] * 3, **call)


@pytest.mark.parametrize("name", ["csjd:criterion=tolerance:tolerance=0", "csjd", "cspd"])
def test_latents_of_each_image_have_their_own_weights(name):
    pipe, prompt = tiny("mar")
    options = {"draft": tiny("mar")[0], "max_draft": 3} if name == "cspd" else {"window": 3}
    sampler: Any = get_sampler(name, **options)
    call: dict[str, Any] = {"output_type": "latent", "sampler": sampler, "seed": 3}
    weights = [[1.0 + 0.2 * unit for unit in range(9)], [2.0 - 0.1 * unit for unit in range(9)]]
    both = pipe([prompt] * 2, guidance_scale=weights, **call).tokens
    for image in range(2):
        own: dict[str, Any] = call | {"seed": [(3, image)]}
        alone = pipe(prompt, guidance_scale=weights[image], **own).tokens
        torch.testing.assert_close(both[image], alone[0], atol=2e-2, rtol=2e-2)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "name": ({"guidance_schedule": "linaer"}, "guidance_schedule.*linear"),
    "pair": ({"guidance_schedule": (0.5, 0.5)}, "0 <= begin < end <= 1"),
    "number": ({"guidance_schedule": 3}, "expected one of constant"),
    "both": ({"guidance_scale": [1.0] * 16, "guidance_schedule": "linear"}, "expected one of them"),
    "negative": ({"guidance_schedule": lambda share, scale: -1.0}, "numbers >= 0"),
    "text": ({"guidance_schedule": lambda share, scale: "a"}, "numbers >= 0"),
    "ragged": ({"guidance_scale": [[1.0], 2.0]}, "lists of one length"),
    "one in a list": ({"guidance_scale": [3.0]}, "of 1 numbers: expected one number, or 16"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_guidance_is_one_line(name, tiny_pipeline):
    arguments, message = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        tiny_pipeline("cat", seed=0, **({"guidance_scale": 3.0} | arguments))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["llamagen", "captioned", "var", "infinity", "mar", "nextstep"])
def test_no_condition_is_what_guidance_leads_away_from(family):
    pipe, prompt = tiny(family)
    call: dict[str, Any] = {"seed": 3, "output_type": "latent"}
    free = pipe(None, guidance_scale=1.0, **call).tokens
    torch.testing.assert_close(
        pipe(None, guidance_scale=4.0, **call).tokens, free, atol=1e-3, rtol=1e-3
    )
    assert not torch.equal(free, pipe(prompt, guidance_scale=1.0, **call).tokens)
    both = pipe([None, prompt], guidance_scale=2.0, **call).tokens
    torch.testing.assert_close(both[:1], free, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ["llamagen", "var", "mar"])
def test_classes_are_mixed_as_embeddings(family):
    pipe, _ = tiny(family)
    call: dict[str, Any] = {"seed": 3, "output_type": "latent", "guidance_scale": 2.0}
    mixed = pipe({0: 0.5, 1: 0.5}, **call).tokens
    assert torch.equal(mixed, pipe(torch.tensor([0.5, 0.5, 0.0]), **call).tokens)
    assert torch.equal(pipe({1: 1.0}, **call).tokens, pipe(1, **call).tokens)
    table = pipe.transformer.cls_embedding if family == "llamagen" else pipe.transformer.class_emb
    weight = next(table.parameters()).data
    kept = weight.clone()
    try:
        weight[2] = 0.5 * (kept[0] + kept[1])
        torch.testing.assert_close(pipe(2, **call).tokens, mixed, atol=1e-3, rtol=1e-3)
    finally:
        weight.copy_(kept)
    for prompt, message in (
        ({}, "not all 0"),
        ({0: float("nan")}, "finite weights"),
        ({0: "much"}, "expected a number"),
        ({7: 1.0}, "class 7: expected 0..2"),
        (torch.ones(5), r"weights of classes \(5,\): expected \[3\]"),
    ):
        with pytest.raises(InputError, match=message):
            pipe(prompt, **call)


@pytest.mark.parametrize("family", ["captioned", "infinity", "nextstep"])
def test_guidance_leads_away_from_a_negative_prompt(family):
    pipe, prompt = tiny(family)
    call: dict[str, Any] = {"seed": 3, "output_type": "latent", "guidance_scale": 3.0}
    away = pipe(prompt, negative_prompt="a dress", **call).tokens
    assert not torch.equal(away, pipe(prompt, **call).tokens)
    call["guidance_scale"] = 0.0  # only what it leads away from
    only = pipe(prompt, negative_prompt="a dress", **call).tokens
    if family != "nextstep":  # whose prompts have a prefix of their own
        call["guidance_scale"] = 1.0
        assert torch.equal(only, pipe("a dress", **call).tokens)


def test_models_of_classes_take_no_negative_prompt(tiny_pipeline):
    with pytest.raises(InputError, match="negative_prompt 'blurry': this model takes classes"):
        tiny_pipeline("cat", negative_prompt="blurry", seed=0)
