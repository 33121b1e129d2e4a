"""The embedded models: small, carded, and able to draw what they are asked for."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

import arvision
from arvision.eval.classifier import class_consistency, classify
from arvision.folders import ASSETS
from arvision.training.captions import BRIGHTNESS, GARMENTS, measure_brightness
from arvision.training.publish import draw, nearest_training_distance

FOUNDATION = ("llamagen-fashion", "llamagen-fashion-t2i")


def test_size_of_the_foundation_models():
    files = [p for name in FOUNDATION for p in (ASSETS / name).rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 15_000_000


@pytest.mark.parametrize("name", arvision.list_models())
def test_cards_and_precision(name):
    folder = ASSETS / name
    card = (folder / "README.md").read_text()
    for words in ("license: apache-2.0", "small demonstration model", "MIT", "Wall time", "Recipe"):
        assert words in card
    facts = set(json.loads((folder / "card.json").read_text()))
    assert {"kind", "conditions", "summary"} <= facts
    assert facts <= {"kind", "conditions", "summary", "shared", "draft_for", "student_of"}
    for weights in folder.rglob("*.safetensors"):
        with safe_open(weights, "pt") as file:
            kinds = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
        assert torch.float32 not in kinds


def test_a_model_with_a_shared_part_saves_whole(tmp_path):
    pipe = arvision.load("llamagen-fashion-t2i", device="cpu")
    pipe.save_pretrained(tmp_path)
    again = arvision.load(tmp_path, device="cpu")
    ours, theirs = (p("a dark bag", seed=0, output_type="pt").images for p in (pipe, again))
    assert torch.equal(ours, theirs)


def test_class_model_draws_the_class():
    """The card measures 1,000 samples; 100 leave room for their standard error of 0.03."""
    pipe = arvision.load("llamagen-fashion", device="cpu")
    labels = torch.arange(100) % 10
    assert float(class_consistency(draw(pipe, labels.tolist()), labels)) >= 0.80


def test_text_model_draws_garment_and_brightness():
    pipe = arvision.load("llamagen-fashion-t2i", device="cpu")
    labels, tones = torch.arange(105) % 10, torch.arange(105) % 3
    prompts = [
        f"a {BRIGHTNESS[tone]} {GARMENTS[label][0]}"
        for label, tone in zip(labels.tolist(), tones.tolist(), strict=True)
    ]
    images = draw(pipe, prompts)
    assert float((classify(images).argmax(-1) == labels).double().mean()) >= 0.80
    grey = images.float().mean(1).round().to(torch.uint8)
    assert float((measure_brightness(grey) == tones).double().mean()) >= 0.75


def test_nearest_training_distance_finds_a_copy():
    training = torch.randint(256, (50, 32, 32), dtype=torch.uint8)
    images = training[7:9, None].expand(2, 3, 32, 32).clone()
    images[1] = 255 - images[1]
    distances = nearest_training_distance(images, training)
    assert float(distances[0]) == pytest.approx(0.0, abs=0.1)
    assert float(distances[1]) > 50
