"""Training of MAR and of its draft: resumed equals uninterrupted, the recipes run end to end."""

from __future__ import annotations

import pytest
import torch

from arvision.models import MAR
from arvision.training.mar_draft import MAR_DRAFT_RECIPES
from arvision.training.mar_recipe import MAR_RECIPES


@pytest.fixture
def pictures(monkeypatch):
    """Invented garments in place of the data set: grey rectangles."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(48, 32, 32, dtype=torch.uint8)
    for image in images:
        half = int(torch.randint(4, 14, (), generator=generator))
        image[4:28, 16 - half : 16 + half] = int(torch.randint(60, 255, (), generator=generator))
    content = (images, torch.arange(48) % 10)
    monkeypatch.setattr("arvision.training.stages.load_fashion", lambda split: content)


def short(recipe, steps):
    """A recipe of few small steps."""
    return recipe.shortened(steps=steps, num_images=48, batch_size=4, save_every=2)


def test_the_recipe_makes_a_model_and_a_draft(tmp_path, pictures):
    recipe = short(MAR_RECIPES["mar-fashion"], 4)
    parts = recipe.run(tmp_path / "whole", progress=False)
    assert all((tmp_path / "whole" / stage.name / "log.jsonl").exists() for stage in recipe.stages)
    again = recipe.run(tmp_path / "whole", progress=False)  # every stage resumes at its end
    for name, value in parts["transformer"].state_dict().items():
        assert torch.equal(value, again["transformer"].state_dict()[name]), name
    target = MAR(parts["transformer"], parts["tokenizer"])
    draft_recipe = short(MAR_DRAFT_RECIPES["mar-fashion-draft"], 3)
    draft = draft_recipe.run(tmp_path / "draft", target=target, progress=False)["transformer"]
    target_size, draft_size = (
        sum(p.numel() for p in network.parameters()) for network in (parts["transformer"], draft)
    )
    assert 4 * draft_size <= target_size
    assert torch.isfinite(torch.cat([p.flatten() for p in draft.parameters()])).all()
