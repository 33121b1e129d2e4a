"""Tokens that are given: what follows them keeps the model's law, under every sampler."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gaussian_latents import GaussianModel
from PIL import Image
from tiny_pipelines import tiny

from arvision import InputError, get_sampler
from arvision.contracts import Samples
from arvision.decoding.given import Given
from arvision.decoding.logits import Shaping
from arvision.testing import (
    DroppingTableModel,
    ScaleTable,
    TableModel,
    law_p_value,
    tiny_llamagen,
)

SEEDS = [(5, 0), (5, 1), (5, 2)]


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny_llamagen(grid=(5, 5))
    model.transformer.double()
    return model


@pytest.fixture(scope="module")
def given() -> Given:
    """A beginning and a run, a long run, and every other token with the end."""
    mask = torch.zeros(3, 25, dtype=torch.bool)
    mask[0, :8] = mask[0, 15:20] = True
    mask[1, 2:22] = True
    mask[2, ::2] = mask[2, -5:] = True
    generator = torch.Generator().manual_seed(0)
    return Given(torch.randint(64, (3, 25), generator=generator), mask)


def draw(model: Any, sampler: Any, given: Given | None, rows: Any = (0, 1, 2)) -> Samples:
    chosen = sampler if not isinstance(sampler, str) else get_sampler(sampler)
    rows = list(rows)
    own = None if given is None else given.select(rows)
    return chosen(model, rows, seeds=[SEEDS[r] for r in rows], guidance_scale=2.0, given=own)


def test_plain_sampling_takes_a_pass_for_each_drawn_token(model, given):
    out = draw(model, "ar", given)
    assert torch.equal(out.tokens[given.mask], given.values[given.mask])
    assert out.stats.passes_per_image == [25 - num - 1 for num in given.nums]
    assert out.stats.given == given.nums
    assert all(out.stats.complete)
    for row in range(3):
        alone = draw(model, "ar", given, [row])
        assert torch.equal(alone.tokens[0], out.tokens[row])
        assert alone.stats.forward_passes == 25 - given.nums[row] - 1


def test_an_image_is_drawn_again_around_any_of_its_tokens(model, given):
    whole = draw(model, "ar", None)
    own = Given(whole.tokens, given.mask)
    for name in ("ar", "sjd:window=6"):
        assert torch.equal(draw(model, name, own).tokens, whole.tokens)


GUMBEL = [
    "sjd:window=1",
    "sjd:window=7",
    "sjd:window=40",
    "sjd:window=7:init=repeat_above",
    "sjd:window=7:init=memory",
    "sjd:window=16:tree=drift",
    "sjd:window=64:tree=drift",
]


@pytest.mark.filterwarnings("ignore:window 40")
@pytest.mark.parametrize("name", [*GUMBEL, "draft"])
def test_the_picture_of_plain_sampling_around_given_tokens(name, model, given):
    expected = draw(model, "ar", given).tokens
    sampler = name
    if name == "draft":
        sampler = get_sampler("draft", draft=tiny_llamagen(grid=(5, 5), sharpness=6.0))
    out = draw(model, sampler, given)
    assert torch.equal(out.tokens, expected)
    for row in range(3):
        alone = draw(model, sampler, given, [row])
        assert torch.equal(alone.tokens[0], expected[row])
        assert alone.stats.forward_passes <= 25 - given.nums[row] - 1


@pytest.mark.parametrize(
    "name", ["gsd", "lantern", "sjd:coupling=maximal:reuse=0.5", "sjd:coupling=maximal:tree=static"]
)
def test_other_samplers_keep_given_tokens(name, model, given):
    out = draw(model, name, given)
    assert torch.equal(out.tokens[given.mask], given.values[given.mask])
    assert all(out.stats.complete)
    assert out.stats.forward_passes <= 13


def test_a_compiled_pipeline_draws_around_given_tokens_in_the_ordinary_loop(model, given):
    from arvision.decoding.fixed_step import Steps

    sampler = get_sampler("sjd:window=6")
    kept: dict[str, Any] = {"given": given, "steps": Steps("eager")}
    with pytest.warns(UserWarning, match="runs of given tokens"):
        out = sampler(model, [0, 1, 2], seeds=SEEDS, guidance_scale=2.0, **kept)
    assert torch.equal(out.tokens, draw(model, "ar", given).tokens)


VALUES = torch.tensor([2, 1, 0, 2, 1])
MASKS = {"inside": [0, 1, 0, 1, 0], "begin and end": [1, 0, 0, 0, 1], "run": [0, 1, 1, 1, 0]}


def conditional(model: TableModel, mask: list[int], shape: Shaping) -> torch.Tensor:
    """The law of whole sequences, [V^N]: given tokens as they are, the others each from the model's
    law after all that stands before."""
    joint = model.joint(shape).view([model.vocab_size] * model.num_tokens)
    law = torch.ones(())
    for place, is_given in enumerate(mask):
        if is_given:
            step = torch.nn.functional.one_hot(VALUES[place], model.vocab_size).double()
            law = law[..., None] * step
            continue
        marginal = joint.reshape(*joint.shape[: place + 1], -1).sum(-1)
        law = law[..., None] * marginal / marginal.sum(-1, keepdim=True)
    return law.flatten()


def p_value(sampler: Any, mask: list[int], num: int = 6000) -> float:
    model = DroppingTableModel(vocab_size=3, num_tokens=5, seed=3)
    given = Given(VALUES.expand(num, -1), torch.tensor(mask).bool().expand(num, -1))
    seeds = [(11, image) for image in range(num)]
    out = sampler(model, [None] * num, seeds=seeds, guidance_scale=1.0, given=given)
    return law_p_value(model.number(out.tokens), conditional(model, mask, Shaping()))


@pytest.mark.parametrize(
    "name", ["ar", "sjd:coupling=independent", "sjd:coupling=maximal", "draft"]
)
def test_what_is_drawn_follows_the_models_law_after_given_tokens(name):
    sampler: Any = get_sampler(name.split(":")[0]) if name == "draft" else get_sampler(name)
    if name == "draft":
        draft = DroppingTableModel(vocab_size=3, num_tokens=5, seed=8)
        sampler = get_sampler("draft", draft=draft, coupling="independent")
    elif name != "ar":
        sampler = sampler.with_options(window=3)
    for mask in MASKS.values():
        assert p_value(sampler, mask) > 1e-3 / (4 * len(MASKS))


def test_a_sampler_that_does_not_condition_on_given_tokens_fails_the_test():
    def blind(model: Any, conditions: Any, *, given: Given, **call: Any) -> Samples:
        out = get_sampler("ar")(model, conditions, **call)
        out.tokens[given.mask] = given.values[given.mask]
        return out

    assert p_value(blind, MASKS["inside"]) < 1e-9


def test_samplers_that_keep_no_given_tokens_say_so(model, given):
    for name in ("zipar", "pjd"):
        with pytest.raises(InputError, match=f"sampler '{name}' draws all tokens .* such as ar,"):
            draw(model, name, given)
    narrow = TableModel(vocab_size=3, num_tokens=5, allows_overrun=False)
    own = Given(VALUES[None], torch.tensor([MASKS["run"]]).bool())
    with pytest.raises(InputError, match="takes no candidates past the last token"):
        get_sampler("ar")(narrow, [None], seeds=[0], guidance_scale=1.0, given=own)


def halves() -> tuple[Image.Image, Image.Image]:
    """A picture of 16 x 16 pixels, and a mask whose lower half is white."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[8:] = 255
    return Image.fromarray(pixels), Image.fromarray(mask)


def test_a_pipeline_edits_a_picture(tiny_pipeline):
    pipe, (image, mask) = tiny_pipeline, halves()
    tokens = pipe.model.tokens_of(
        torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    )
    out = pipe("cat", image=image, mask_image=mask, seed=1, num_images_per_prompt=2)
    assert torch.equal(out.tokens[:, :8], tokens[:, :8].expand(2, -1))
    assert not torch.equal(out.tokens[0], out.tokens[1])
    assert out.stats.given == [8, 8]
    again = pipe(["cat", "dog"], known_tokens=tokens[0, :8], seed=[(1, 0), (1, 1)])
    assert torch.equal(again.tokens[0], out.tokens[0])
    # A mask for each prompt; a pixel of white redraws its token.
    dot = np.zeros((16, 16), bool)
    dot[15, 15] = True
    each = pipe(["cat", "dog"], image=image, mask_image=[mask, Image.fromarray(dot)], seed=1)
    assert each.stats.given == [8, 15]
    pasted = pipe("cat", image=image, mask_image=mask, seed=1, blend=True).images[0]
    assert np.array_equal(np.array(pasted)[:8], np.array(image)[:8])
    assert np.array_equal(np.array(pasted)[8:], np.array(out.images[0])[8:])


def bad_calls() -> dict[str, tuple[dict[str, Any], str]]:
    image, mask = halves()
    black, white = Image.new("L", (16, 16)), Image.new("L", (16, 16), 255)
    both = {"image": image, "mask_image": mask}
    return {
        "mask of another size": (
            both | {"mask_image": mask.resize((8, 16))},
            "16x8 pixels: expected 16x16",
        ),
        "black": (both | {"mask_image": black}, "keeps the whole image"),
        "white": (both | {"mask_image": white}, "nothing of the image is kept"),
        "image of another size": (
            both | {"image": image.resize((20, 16))},
            "expected .B, 3, 16, 16",
        ),
        "16 bits": (both | {"image": Image.new("I;16", (16, 16))}, "8 bits a channel"),
        "no picture": (both | {"image": "cat.png"}, "type str: expected PIL images"),
        "no mask": ({"image": image}, "image without mask_image"),
        "no image": ({"mask_image": mask}, "mask_image without image"),
        "a text": (both | {"mask_image": "left"}, "mask_image of type str"),
        "integers": (
            both | {"mask_image": torch.zeros(16, 16, dtype=torch.int64)},
            "expected booleans",
        ),
        "many": (both | {"image": [image] * 3}, "image of 3 pictures: expected one"),
        "scales": ({"image": image, "known_scales": 1}, "this model has no scales"),
        "blend": ({"blend": True}, "blend without image"),
        "tokens and image": ({"known_tokens": [1], "image": image}, "expected one of them"),
        "too many tokens": ({"known_tokens": [1] * 17}, "n <= 16"),
        "all tokens": ({"known_tokens": [1] * 16}, "all 16 tokens are given"),
        "no tokens": ({"known_tokens": [-1] * 16}, "no token is given"),
        "codes out of range": ({"known_tokens": [64]}, "expected 0..63"),
        "floats": ({"known_tokens": [0.5]}, "expected integers"),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_edits_are_one_line(name, tiny_pipeline):
    arguments, message = bad_calls()[name]
    with pytest.raises(InputError, match=message) as caught:
        tiny_pipeline("cat", seed=0, **arguments)
    assert "\n" not in str(caught.value)


def test_the_command_edits_a_picture_that_it_wrote(tmp_path, cli):
    base = ("sample", "--model", "llamagen-fashion", "--quiet", "--json", "--sampler", "sjd")
    shoe, mask, out = (tmp_path / name for name in ("shoe.png", "mask.png", "out.png"))
    done = cli(*base, "--prompt", "sneaker", "--out", str(shoe))
    assert done.returncode == 0, done.stderr
    pixels = np.zeros((32, 32), np.uint8)
    pixels[16:] = 255
    Image.fromarray(pixels).save(mask)
    edit = (*base, "--prompt", "bag", "--image", str(shoe), "--mask", str(mask), "--out", str(out))
    done = cli(*edit, "--blend")
    assert done.returncode == 0, done.stderr
    assert '"given": [32]' in done.stdout
    with Image.open(shoe) as before, Image.open(out) as after:  # 96 x 96, enlarged
        assert np.array_equal(np.array(before)[:48], np.array(after)[:48])
        assert not np.array_equal(np.array(before)[48:], np.array(after)[48:])
    Image.new("L", (20, 20)).save(mask)
    done = cli(*edit)
    assert done.returncode == 2
    assert "mask_image of 20x20 pixels: expected 32x32" in done.stderr
    mask.unlink()
    assert f"{mask}: expected a picture (No such file or directory)" in cli(*edit).stderr
    mask.write_bytes(b"no picture")
    assert f"{mask}: expected a picture (no format we know)" in cli(*edit).stderr
    Image.new("RGB", (40, 20)).save(shoe)
    Image.new("L", (32, 32)).save(mask)
    assert "expected [B, 3, 32, 32], pictures of 32 rows and 32 columns" in cli(*edit).stderr


def known_law(model: ScaleTable, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The law of all tokens of a scale model after given ones, [V^N], see `ScaleTable.joint`."""
    law, done = torch.ones(1, dtype=torch.float64), 0
    for table in model.tables:
        laws = Shaping()(table).exp().flatten(1, -2)
        for place in range(laws.shape[1]):
            own = laws[:, place]
            if mask[done + place]:
                point = torch.nn.functional.one_hot(values[done + place], model.vocab_size)
                own = point.double().expand_as(own)
            law = (law[:, None] * own.repeat_interleave(len(law) // len(laws), dim=0)).flatten()
        done += laws.shape[1]
    return law


@pytest.mark.parametrize("name", ["ar", "code"])
def test_scales_follow_the_law_after_given_tokens(name):
    num, model = 6000, ScaleTable(vocab_size=3, scales=(1, 2), seed=2)
    sampler = get_sampler("ar")
    if name == "code":  # its first scale is another model's: given here, it is nobody's
        sampler = get_sampler("code", draft=ScaleTable(vocab_size=3, scales=(1, 2)), draft_scales=1)
    values = torch.tensor([2, 0, 1, 1, 2])
    for mask in ([1, 0, 1, 0, 0], [1, 0, 0, 0, 0], *([[0, 1, 0, 0, 1]] if name == "ar" else [])):
        given = Given(values.expand(num, -1), torch.tensor(mask).bool().expand(num, -1))
        seeds = [(4, image) for image in range(num)]
        out = sampler(model, [None] * num, seeds=seeds, guidance_scale=1.0, given=given)
        law = known_law(model, values, torch.tensor(mask))
        assert law_p_value(model.number(out.tokens), law) > 1e-3 / 5
        assert out.stats.forward_passes == 2 - mask[0]


@pytest.mark.parametrize("name", ["ar", "ar:num_iter=2", "csjd", "cspd"])
def test_latents_follow_the_law_given_others_anywhere(name):
    """Latent i is normal around the mean plus `pull` times the sum of what is known."""
    num, pull = 4000, 0.5
    model: Any = GaussianModel(0.3, 0.7, num_tokens=3, pull=pull)
    options: dict[str, Any] = {"last_noise": True} if name.startswith("ar") else {"window": 2}
    if name == "cspd":
        draft: Any = GaussianModel(0.1, 0.8, num_tokens=3, pull=pull)
        options = {"draft": draft, "criterion": "trajectory", "context": "batched", "max_draft": 2}
    sampler = get_sampler(name, **options)
    values = torch.tensor([[0.0], [0.0], [2.0]])
    mask = torch.tensor([False, False, True])
    given = Given(values.expand(num, -1, -1), mask.expand(num, -1))
    seeds = [(9, image) for image in range(num)]
    out = sampler(model, [None] * num, seeds=seeds, guidance_scale=1.0, given=given)
    assert bool((out.tokens[:, 2] == 2).all())
    drawn = out.tokens[:, :2, 0].double()
    # Each of the two is first in half of the images; the mean of both together is known exactly.
    first = 0.3 + pull * 2.0
    expected = (first + (first + pull * first)) / 2 if ":" not in name else first
    spread = float(drawn.mean(1).std()) / num**0.5
    assert abs(float(drawn.mean()) - expected) < 4 * spread
    assert abs(float(drawn.mean()) - (0.3 + 0.15 / 2)) > 20 * spread  # a blind draw's
    assert out.stats.forward_passes <= (1 if ":" in name else 2) + (name in ("csjd", "cspd"))


@pytest.mark.parametrize("family", ["var", "infinity", "mar", "nextstep"])
def test_other_families_edit_pictures(family):
    pipe, prompt = tiny(family)
    model = pipe.model
    height, width = model.picture_size
    pixels = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(height, width)
    rows = model.grid[0] if family in ("mar", "nextstep") else 4
    mask[rows // 2 * height // rows :] = 1
    call: dict[str, Any] = {"image": pixels, "mask_image": mask, "seed": 1}
    out = pipe(prompt, num_images_per_prompt=2, output_type="latent", **call)
    tokens = model.tokens_of(pixels[None])
    if family in ("mar", "nextstep"):
        kept = slice(0, rows // 2 * model.grid[1])
        assert torch.equal(out.tokens[:, kept], tokens[:, kept].expand(2, -1, -1))
        assert out.stats.forward_passes == model.num_tokens - kept.stop
    else:
        first, second = pipe(prompt, **call, known_scales=2), out
        assert torch.equal(first.tokens[:, :5], tokens[:, :5])
        assert first.stats.forward_passes == len(model.scales) - 2
        fine = model.num_tokens - 16  # the first half of the last scale, and the upper half of it
        assert torch.equal(
            second.tokens[:, fine : fine + 8],
            tokens[:, fine : fine + 8].expand_as(second.tokens[:, fine : fine + 8]),
        )
        whole = pipe(prompt, seed=1)
        again = pipe(prompt, seed=1, known_tokens=whole.tokens[0, :5])
        assert torch.equal(again.tokens, whole.tokens)
        with pytest.raises(InputError, match="expected an integer from 1 to"):
            pipe(prompt, image=pixels, known_scales=len(model.scales), seed=0)


def test_a_beginning_of_latents_is_continued():
    pipe, prompt = tiny("nextstep")
    whole = pipe(prompt, seed=1, output_type="latent")
    begin = whole.tokens[0, :4]
    for name in ("ar", "csjd:criterion=tolerance:tolerance=0"):
        again = pipe(
            prompt, seed=1, known_tokens=begin, sampler=get_sampler(name), output_type="latent"
        )
        torch.testing.assert_close(again.tokens, whole.tokens, atol=1e-4, rtol=1e-4)
    holes = whole.tokens[0].clone()
    holes[2:5] = holes[-2] = float("nan")
    again = pipe(prompt, seed=1, known_tokens=holes, output_type="latent")
    torch.testing.assert_close(again.tokens, whole.tokens, atol=1e-4, rtol=1e-4)
    assert again.stats.forward_passes == 4
    with pytest.raises(InputError, match="keeps a beginning only"):
        pipe(prompt, seed=1, known_tokens=holes, sampler=get_sampler("csjd"))


def test_masks_of_other_sizes_are_drawn_in_parts_where_latents_have_no_order():
    pipe, prompt = tiny("mar")
    pixels, masks = torch.zeros(3, 6, 6), torch.zeros(2, 6, 6)
    masks[0, 2:], masks[1, 4:] = 1, 1
    both = pipe([prompt] * 2, image=pixels, mask_image=list(masks), seed=3, output_type="latent")
    assert both.stats.given == [3, 6]
    alone = pipe(prompt, image=pixels, mask_image=masks[1], seed=[(3, 1)], output_type="latent")
    torch.testing.assert_close(alone.tokens[0], both.tokens[1])
