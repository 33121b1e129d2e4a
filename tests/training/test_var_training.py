"""Training of VAR: resumed equals uninterrupted, losses fall, the recipe runs end to end."""

from __future__ import annotations

import pytest
import torch

from arvision.models import VARTokenizer, VARTransformer
from arvision.training.data import to_pixels
from arvision.training.llamagen_tokenizer import encode_all
from arvision.training.loop import FitConfig, fit
from arvision.training.var import VARClassObjective, VARTokenizerObjective
from arvision.training.var_recipe import VAR_RECIPES

SCALES = (1, 2, 4)


@pytest.fixture(scope="module")
def pictures():
    """Invented garments: grey rectangles, so that no data set is needed."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(96, 16, 16, dtype=torch.uint8)
    for image in images:
        tone = int(torch.randint(60, 255, (), generator=generator))
        half = int(torch.randint(2, 7, (), generator=generator))
        image[2:14, 8 - half : 8 + half] = tone
    return images, torch.arange(96) % 10


def small_tokenizer():
    torch.manual_seed(1)
    sizes = {"patch_nums": SCALES, "ch": 32, "ch_mult": (1, 1, 1), "num_res_blocks": 1}
    return VARTokenizer(z_channels=4, codebook_size=16, **sizes)


def make(kind, pictures):
    images, labels = pictures
    tokenizer = small_tokenizer()
    if kind == "tokenizer":
        return VARTokenizerObjective(tokenizer, images, unquantised_steps=3)
    torch.manual_seed(2)
    transformer = VARTransformer(
        patch_nums=SCALES,
        codebook_size=16,
        z_channels=4,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        num_classes=10,
        shared_aln=kind == "shared",
    )
    return VARClassObjective(transformer, tokenizer, encode_all(tokenizer, images), labels)


@pytest.mark.parametrize("kind", ["tokenizer", "class", "shared"])
def test_resumed_equals_uninterrupted(tmp_path, pictures, kind):
    config = FitConfig(steps=8, batch_size=8, save_every=3, log_every=2, warmup=2)
    whole = make(kind, pictures)
    fit(whole, config, tmp_path / "whole", progress=False)
    fit(make(kind, pictures), config, tmp_path / "parts", progress=False, stop_after=5)
    resumed = make(kind, pictures)
    fit(resumed, config, tmp_path / "parts", progress=False)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_tokenizer_learns_codes_and_restarts_dead_ones(tmp_path, pictures):
    images, _ = pictures
    objective = VARTokenizerObjective(small_tokenizer(), images, unquantised_steps=15)
    config = FitConfig(steps=45, batch_size=8, learning_rate=3e-3, warmup=3, log_every=5)
    log = fit(objective, config, tmp_path, progress=False)
    assert log[-1]["psnr"] > log[0]["psnr"] + 2
    tokens = encode_all(objective.tokenizer, images)
    assert tokens.shape == (96, 21)
    assert len(tokens.unique()) > 10
    with torch.no_grad():
        rebuilt = objective.tokenizer.decode(tokens)
    # Far better than the best single grey for each image.
    pixels = to_pixels(images)
    error = (rebuilt - pixels).square().mean()
    assert error < 0.5 * pixels.var(dim=(1, 2, 3)).mean()


def test_the_transformer_learns(tmp_path, pictures):
    objective = make("shared", pictures)
    config = FitConfig(steps=40, batch_size=16, learning_rate=3e-3, warmup=5, log_every=10)
    log = fit(objective, config, tmp_path, progress=False)
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert not any(name.startswith("_tokenizer") for name in objective.state_dict())


def test_the_recipes_run_from_the_data_to_the_parts(tmp_path, monkeypatch, pictures):
    images, labels = pictures
    wide = torch.nn.functional.pad(images, (8, 8, 8, 8))
    monkeypatch.setattr("arvision.training.stages.load_fashion", lambda split: (wide, labels))
    for model, recipe in VAR_RECIPES.items():
        # One process knows one precision, and the other tests of it use the full one.
        short = recipe.shortened(steps=1, num_images=32, mixed_precision="no", batch_size=4)
        parts = short.run(tmp_path, progress=False)
        assert all((tmp_path / stage.name / "log.jsonl").exists() for stage in short.stages)
        assert parts["transformer"].scales == parts["tokenizer"].scales, model
