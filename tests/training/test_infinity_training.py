"""Training of Infinity: losses fall, flipped bits are corrected by finer scales, the recipe runs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from arvision.models import Infinity
from arvision.models.infinity.bits import BitPyramid
from arvision.training.infinity import BitTokenizerObjective, corrected_bits
from arvision.training.infinity_recipe import BITS, INFINITY_RECIPES, SCALES
from arvision.training.stages import Work, run_stages


@pytest.fixture(scope="module")
def pictures():
    """Invented garments: grey rectangles."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(64, 32, 32, dtype=torch.uint8)
    for image in images:
        tone = int(torch.randint(60, 255, (), generator=generator))
        half = int(torch.randint(4, 14, (), generator=generator))
        image[4:28, 16 - half : 16 + half] = tone
    return images, torch.arange(64) % 10


def test_without_flips_bits_are_the_tokenizers():
    pyramid = BitPyramid(SCALES, BITS, False)
    features = torch.randn(3, BITS, 8, 8)
    bits, views = corrected_bits(pyramid, features, 0.0, torch.Generator().manual_seed(0))
    assert torch.equal(bits.long(), pyramid.encode(features))
    assert torch.allclose(views, pyramid.canvas(bits, torch.float32)[1], atol=1e-6)


def test_finer_scales_answer_flipped_bits():
    pyramid = BitPyramid(SCALES, BITS, False)
    features = torch.randn(64, BITS, 8, 8)
    plain, _ = corrected_bits(pyramid, features, 0.0, torch.Generator().manual_seed(0))
    bits, _ = corrected_bits(pyramid, features, 0.3, torch.Generator().manual_seed(0))
    assert torch.equal(bits[:, :1], plain[:, :1])  # labels of the first scale see no flips
    changed = (bits != plain).float().mean(-1)
    assert 0.02 < float(changed[:, 1:].mean()) < 0.4


def test_the_recipe_learns_and_draws(pictures, tmp_path):
    recipe = INFINITY_RECIPES["infinity-fashion"].shortened(30, 64, batch_size=4, warmup=5)
    stages = [replace(stage, fit=replace(stage.fit, log_every=5)) for stage in recipe.stages]
    work = Work(*pictures)
    run_stages(stages, work, tmp_path, progress=False)
    for stage in stages:
        lines = [json.loads(line) for line in (tmp_path / stage.name / "log.jsonl").open()]
        losses = [line["loss"] for line in lines if "loss" in line]
        assert losses[-1] < 0.9 * losses[0], stage.name
    parts = work.parts
    model = Infinity(
        parts["transformer"].eval(),
        parts["tokenizer"],
        parts["text_encoder"].eval(),
        parts["text_tokenizer"],
    )
    state = model.start(["a dark bag", "a light dress"], 2.0)
    for _ in model.scales:
        state.feed(state.next().argmax(-1))
    assert state.canvas.shape == (2, BITS, 8, 8)


def test_the_size_of_the_recipe(pictures):
    stages = INFINITY_RECIPES["infinity-fashion"].stages
    objective = stages[0].objective(Work(*pictures))
    assert isinstance(objective, BitTokenizerObjective)
    counted: list[torch.nn.Module] = [objective]
    work = Work(*pictures)
    work.parts["tokenizer"], work.codes = objective.tokenizer, torch.zeros(64, BITS, 8, 8)
    counted.append(stages[1].objective(work))
    total = sum(p.numel() for one in counted for p in one.parameters())
    assert 2 * total < 8e6  # bytes in half precision
