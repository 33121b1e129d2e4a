"""Images that enter a loop that is going on are the images that they are alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from image_networks import (
    chameleon_prompts,
    emu3_prompts,
    glm_prompts,
    janus_prompts,
    tiny_chameleon,
    tiny_emu3,
    tiny_glm,
    tiny_janus,
)

from arvision.decoding.logits import Shaping
from arvision.decoding.loop import FixedWindow, TokenLoop
from arvision.decoding.run import Run
from arvision.errors import StateError
from arvision.models import Chameleon, Emu3, GlmImage, Janus
from arvision.samplers import get_sampler
from arvision.testing import DroppingTableModel, tiny_llamagen

LENGTHS = [2, 5, 1, 4, 3]


def captioned():
    model = tiny_llamagen(caption_dim=16, caption_length=6, num_classes=None)
    made = torch.Generator().manual_seed(0)
    return model, [torch.randn(length, 16, generator=made) for length in LENGTHS], (3.0, 1.5)


CASES = {
    "table": lambda: (DroppingTableModel(vocab_size=5, num_tokens=6), [0] * 5, (1.0, 1.0)),
    "classes": lambda: (tiny_llamagen(), [0, 1, 2, 0, 1], (3.0, 1.5)),
    "classes alone": lambda: (tiny_llamagen(), [0, 1, 2, 0, 1], (1.0, 1.0)),
    "captions": captioned,
    "glm": lambda: (
        GlmImage(tiny_glm(), grids=[(2, 3), (3, 4)]),
        glm_prompts(LENGTHS),
        (1.0, 1.0),
    ),
    "janus": lambda: (Janus(tiny_janus(side=4)), janus_prompts(LENGTHS), (2.0, 4.0)),
    "emu3": lambda: (Emu3(tiny_emu3(), grids=[(4, 3)]), emu3_prompts(LENGTHS), (2.0, 4.0)),
    "lumina": lambda: (
        Chameleon(tiny_chameleon(), layout="lumina", grids=[(4, 4)]),
        chameleon_prompts(LENGTHS, 0, (4, 4)),
        (2.0, 4.0),
    ),
}
LAWS = [Shaping(), Shaping(temperature=0.7, top_k=9), Shaping(top_p=0.8)]


def alone(model, condition, seed, scale, law, sampler):
    own = sampler.with_options(temperature=law.temperature, top_k=law.top_k, top_p=law.top_p)
    return own(model, [condition], seeds=[seed], guidance_scale=scale).tokens[0]


def staggered(model, prompts, scales, sampler, arrivals, places=2, dropped=()):
    """Tokens of each image, drawn in a loop of two places; image k may enter from round `arrivals[k]` on."""
    run = Run(places, model.num_tokens, [0] * places)
    rows: dict[int, int] = {}

    def laws(logits, own):
        return torch.cat(
            [LAWS[rows[place] % 3](row[None]) for place, row in zip(own, logits, strict=True)]
        )

    loop = TokenLoop(
        model,
        run,
        rule=sampler.rule(model),
        shape=lambda logits: laws(logits, loop.places),
        policy=sampler.policy(model),
    )
    found, waiting, number = {}, list(range(len(prompts))), 0
    while waiting or rows:
        free = [place for place in range(places) if place not in rows]
        for image in [image for image in waiting if arrivals[image] <= number][: len(free)]:
            place = free.pop()
            rows[place] = image
            waiting.remove(image)
            loop.enter(
                [prompts[image]],
                sampler.drafter(model),
                [place],
                seeds=[(image, 3)],
                guidance_scale=scales[image % 2],
                shape=lambda logits, place=place: laws(logits, [place]),
            )
        if loop.places:
            loop.round()
        number += 1
        for place in [place for place in rows if place not in loop.places]:
            found[rows.pop(place)] = run.tokens[place].clone()
        for place in [place for place, image in rows.items() if image in dropped]:
            loop.drop([place])
            del rows[place]
    return found


@pytest.mark.parametrize("case", CASES)
def test_an_image_that_enters_later_is_the_image_alone(case):
    model, prompts, scales = CASES[case]()
    sampler = get_sampler("sjd", window=4)
    found = staggered(model, prompts, scales, sampler, [0, 2, 3, 3, 9])
    for image, prompt in enumerate(prompts):
        expected = alone(model, prompt, (image, 3), scales[image % 2], LAWS[image % 3], sampler)
        assert found[image].tolist() == expected.tolist(), image


@pytest.mark.parametrize(
    ("coupling", "init"), [("maximal", "prior"), ("independent", "prior"), ("maximal", "above")]
)
def test_rounds_of_an_image_are_counted_from_its_own_beginning(coupling, init):
    model, prompts, scales = CASES["classes"]()
    sampler = get_sampler("sjd", window=4, coupling=coupling, init=init)
    found = staggered(model, prompts, scales, sampler, [0, 2, 3, 3, 9])
    for image, prompt in enumerate(prompts):
        expected = alone(model, prompt, (image, 3), scales[image % 2], LAWS[image % 3], sampler)
        assert found[image].tolist() == expected.tolist(), image


def test_an_image_that_leaves_early_changes_no_other():
    model, prompts, scales = CASES["classes"]()
    sampler = get_sampler("sjd", window=2)
    found = staggered(model, prompts, scales, sampler, [0, 0, 0, 0, 0], dropped=[1, 2])
    assert sorted(found) == [0, 3, 4]
    for image in found:
        expected = alone(
            model, prompts[image], (image, 3), scales[image % 2], LAWS[image % 3], sampler
        )
        assert found[image].tolist() == expected.tolist(), image


def test_rows_with_guidance_do_not_join_rows_without():
    model = tiny_llamagen()
    state, _ = model.start([0], 3.0)
    with pytest.raises(StateError, match="rows with guidance and rows without it"):
        state.join(model.start([0], 1.0)[0])
    glm = Janus(tiny_janus(side=4))
    state, _ = glm.start(janus_prompts([2]), 2.0)
    with pytest.raises(StateError, match="1 rows of each image beside 2: expected as many"):
        state.join(glm.start(janus_prompts([2]), 1.0)[0])


def test_the_room_of_rows_that_left_is_used_again():
    model: Any = tiny_llamagen()
    sampler = get_sampler("sjd", window=4)
    run = Run(2, model.num_tokens, [0, 0])
    loop = TokenLoop(model, run, rule=sampler.rule(model), shape=Shaping(), policy=FixedWindow(1))
    sizes = set()
    for image in range(12):
        place = next(place for place in (0, 1) if place not in loop.places)
        loop.enter([image % 3], sampler.drafter(model), [place], seeds=[image], guidance_scale=2.0)
        while len(loop.places) == 2:
            loop.round()
        sizes.add(loop._state.cache._stored[0].shape[1])
        loop.round()
    assert max(sizes) <= 4
