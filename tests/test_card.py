"""Model cards: one template, which the Hub's own reader understands."""

from __future__ import annotations

from huggingface_hub import ModelCard

import arvision
from arvision.card import write_card
from arvision.testing import tiny_llamagen


def test_a_card_reads_back(tmp_path):
    folder = tmp_path / "tiny"
    facts = {"Data": "<noise> & 'more'.", "Measured": ["on 5:", "a: 1", "b: 2"], "Size": "1 MB."}
    write_card(folder, "A model.", facts, tags=["x", "y"], licence="apache-2.0")
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "library_name": "arvision",
        "tags": ["x", "y"],
    }
    assert card.text == (
        "# tiny\n\nA model.\n\n- **Data**: <noise> & 'more'.\n- **Measured**: on 5:\n  - a: 1\n"
        "  - b: 2\n- **Size**: 1 MB.\n"
    )


def test_a_saved_pipeline_has_a_card_and_keeps_it(tmp_path):
    pipe = arvision.ARPipeline.from_model(tiny_llamagen(), guidance_scale=3.0, top_k=7)
    pipe.save_pretrained(tmp_path / "mine")
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.to_dict()["library_name"] == "arvision"
    assert "# mine\n\nA LlamaGen pipeline" in card.text
    assert "guidance 3, top-k 7" in card.text
    (tmp_path / "mine" / "README.md").write_text("my own")
    pipe.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "my own"
