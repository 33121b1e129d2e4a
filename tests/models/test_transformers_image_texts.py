"""Image models of transformers with their processors: texts, pictures, folders."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from image_networks import (
    CHAMELEON,
    EMU,
    chameleon_processor,
    chameleon_prompts,
    emu3_processor,
    emu3_prompts,
    glm_prompts,
    janus_processor,
    janus_prompts,
    tiny_chameleon,
    tiny_emu3,
    tiny_glm,
    tiny_janus,
)
from PIL import Image

from arvision import InputError, get_sampler
from arvision.models import Chameleon, Emu3, GlmImage, ImagePrompt, Janus


def draw(model, conditions, scale):
    run = {"seeds": list(range(len(conditions))), "guidance_scale": scale}
    return get_sampler("sjd", window=5)(model, conditions, **run).tokens


def test_janus_writes_one_turn_of_a_user():
    model = Janus(tiny_janus(), janus_processor())
    ids = model.encode("a cat", ())
    assert (ids[0], ids[-1]) == (1, 2)
    tokens = draw(model, ["a cat", ImagePrompt("two dogs")], 3.0)
    assert torch.equal(tokens[:1], draw(model, [ids], 3.0))


def test_emu3_writes_the_size_behind_the_text():
    processor = emu3_processor()
    model = Emu3(tiny_emu3(), processor, ratio="4:3", image_area=48 * 8 * 8)
    assert model.grid == (6, 8)
    ids = model.encode("a cat", ()).tolist()
    assert ids[0] == EMU["bos"]
    assert ids[ids.index(EMU["image_start"]) + 4 :] == [EMU["image_token"]]
    letters = processor.tokenizer.convert_tokens_to_ids(["6", "*", "8"])
    assert ids[ids.index(EMU["image_start"]) + 1 : -1] == letters
    tokens = draw(model, ["a cat", ImagePrompt("two dogs", "bad")], 3.0)
    assert torch.equal(tokens[0], draw(model, [torch.tensor(ids)], 3.0)[0])
    assert model.resized("1:1", 64 * 16).grid == (4, 4)


def test_chameleon_and_lumina_write_what_opens_an_image():
    processor = chameleon_processor()
    start, turn = CHAMELEON["image_start"], CHAMELEON["end_of_turn"]
    model = Chameleon(tiny_chameleon(), processor, grids=[(3, 4)])
    ids = model.encode("a cat", ()).tolist()
    assert (ids[0], ids[-2:]) == (CHAMELEON["bos"], [turn, start])
    assert ids.count(CHAMELEON["bos"]) == 1
    draw(model, ["a cat", ImagePrompt("two dogs", "bad")], 3.0)
    lumina = Chameleon(tiny_chameleon(), processor, layout="lumina", height=64, width=96)
    ids = lumina.encode("a cat", ()).tolist()
    size = CHAMELEON["size"]
    assert ids[-4:] == [turn, start, size + 2, size + 3]
    told = processor.tokenizer.convert_tokens_to_ids(list("Generate an image of 96x64"))
    assert ids[1 : 1 + len(told)] == told
    draw(lumina, ["a cat"], 3.0)
    with pytest.raises(InputError, match="Lumina-mGPT draws from text alone"):
        draw(lumina, [ImagePrompt("a cat", images=[Image.new("RGB", (32, 32))])], 3.0)


def test_chameleon_reads_pictures():
    network = tiny_chameleon(codes=48)
    del network.model.vocabulary_mapping.__dict__["image_tokens"]
    model = Chameleon(network, chameleon_processor(), grids=[(3, 4)])
    picture = Image.effect_noise((40, 32), 80).convert("RGB")
    prompt = ImagePrompt("a cat", images=[picture])
    state, _ = model.start([prompt, "a dog"], 3.0)
    assert state.cache.keys.shape[1] == 6
    ids = model.encode("a cat", [picture])
    assert int((ids == CHAMELEON["place"]).sum()) == 256
    draw(model, [prompt], 1.0)


def test_source_pictures_come_in_every_form():
    network = tiny_chameleon(codes=48)
    del network.model.vocabulary_mapping.__dict__["image_tokens"]
    model = Chameleon(network, chameleon_processor(), grids=[(3, 4)])
    picture = Image.effect_noise((40, 32), 80).convert("RGB")
    bytes_ = np.array(picture)
    wanted = draw(model, [ImagePrompt("a cat", images=[picture])], 1.0)
    floats = torch.from_numpy(bytes_).permute(2, 0, 1) / 127.5 - 1
    for form in (bytes_, torch.from_numpy(bytes_), floats, floats[None].numpy()):
        assert torch.equal(draw(model, [ImagePrompt("a cat", images=[form])], 1.0), wanted)
    for form, words in (
        (floats * 2, r"expected float in \[-1, 1\]"),
        (torch.stack([floats, floats]), "a source image of 2 pictures"),
        ("cat.png", "images of type str"),
    ):
        with pytest.raises(InputError, match=words):
            model.start([ImagePrompt("a cat", images=[form])], 1.0)


FOLDERS: dict[str, Any] = {
    "glm": (tiny_glm, lambda n: GlmImage(n, grids=[(2, 2), (3, 4)]), glm_prompts([3, 5]), 1.0),
    "janus": (tiny_janus, Janus, janus_prompts([3, 5]), 3.0),
    "emu3": (tiny_emu3, lambda n: Emu3(n, grids=[(3, 4)]), emu3_prompts([3, 5]), 3.0),
    "chameleon": (
        tiny_chameleon,
        lambda n: Chameleon(n, grids=[(3, 4)]),
        chameleon_prompts([3, 5]),
        3.0,
    ),
}


@pytest.mark.parametrize("family", FOLDERS)
def test_a_saved_network_draws_the_same(family, tmp_path):
    make, wrap, prompts, scale = FOLDERS[family]
    network = make()
    expected = draw(wrap(network), prompts, scale)
    network.save_pretrained(tmp_path)
    again = type(network).from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(draw(wrap(again), prompts, scale), expected)
