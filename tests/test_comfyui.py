"""The nodes for ComfyUI, loaded by path as it loads them, and run without it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import arvision
from arvision import InputError

FOLDER = Path(__file__).resolve().parent.parent / "integrations" / "comfyui"
HOW: dict[str, Any] = {
    "sampler": "sjd:window=8",
    "num_images": 2,
    "seed": 3,
    "guidance_scale": -1.0,
    "preview_every": 4,
}


@pytest.fixture(scope="module")
def nodes() -> Any:
    place = FOLDER / "__init__.py"
    spec = importlib.util.spec_from_file_location(
        "comfy_arvision", place, submodule_search_locations=[str(FOLDER)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["comfy_arvision"] = package
    spec.loader.exec_module(package)
    return package


@pytest.fixture(scope="module")
def pipe(nodes) -> Any:
    load = nodes.NODE_CLASS_MAPPINGS["ArvisionLoadPipeline"]()
    return load.load("llamagen-fashion", "float32")[0]


def run(nodes: Any, name: str, **given: Any) -> Any:
    node = nodes.NODE_CLASS_MAPPINGS[name]
    return getattr(node(), node.FUNCTION)(**given)[0]


def test_every_node_says_what_comfyui_reads(nodes):
    assert set(nodes.NODE_CLASS_MAPPINGS) == set(nodes.NODE_DISPLAY_NAME_MAPPINGS)
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        assert callable(getattr(node, node.FUNCTION))
        assert isinstance(node.RETURN_TYPES, tuple)
        assert node.CATEGORY == "arvision"
        for group in node.INPUT_TYPES().values():
            for kind, *rest in group.values():
                assert isinstance(kind, (str, list))
                choices = kind if isinstance(kind, list) else []
                assert not rest or "default" not in rest[0] or not choices
    load = nodes.NODE_CLASS_MAPPINGS["ArvisionLoadPipeline"]
    assert load.INPUT_TYPES()["required"]["model"][0] == arvision.list_models()


def test_sample_draws_the_pipeline_s_pictures(nodes, pipe):
    images = run(nodes, "ArvisionSample", pipeline=pipe, prompt="bag", **HOW)
    assert images.shape == (2, 32, 32, 3)
    assert images.dtype == torch.float32
    own = pipe("bag", num_images_per_prompt=2, seed=3, output_type="pt", progress=False).images
    torch.testing.assert_close(images.movedim(-1, 1), own)


def test_edit_redraws_the_masked_part_alone(nodes, pipe):
    image = run(nodes, "ArvisionSample", pipeline=pipe, prompt="sneaker", **HOW)
    mask = torch.zeros(1, 32, 32)
    mask[:, 16:] = 1
    given = {"pipeline": pipe, "prompt": "bag", "image": image, "mask": mask, **HOW}
    edited = run(nodes, "ArvisionEdit", keep_pixels=True, **given)
    torch.testing.assert_close(edited[:, :16], image[:, :16], atol=1 / 254, rtol=0)
    assert (edited[:, 16:] - image[:, 16:]).abs().mean() > 0.01
    given["image"] = torch.zeros(3, 32, 32, 3)
    with pytest.raises(InputError, match="3 pictures for 2 images: expected one, or as many"):
        run(nodes, "ArvisionEdit", keep_pixels=False, **given)


def test_progress_shows_previews_and_stops_when_asked(nodes, pipe, monkeypatch):
    host = sys.modules["comfy_arvision.host"]
    shown = []

    class Bar:
        def __init__(self, total):
            self.total = total

        def update_absolute(self, value, total, preview):
            shown.append((value, total, preview))

    monkeypatch.setattr(host, "ProgressBar", Bar)
    images = run(nodes, "ArvisionSample", pipeline=pipe, prompt="bag", **HOW)
    assert shown[-1][0] == shown[-1][1] == 128
    previews = [preview for _, _, preview in shown if preview]
    assert previews[0][0] == "JPEG"
    assert previews[0][1].size == (32, 32)

    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr(host, "stop_if_asked", stop)
    with pytest.raises(KeyboardInterrupt):
        run(nodes, "ArvisionSample", pipeline=pipe, prompt="bag", **HOW)
    monkeypatch.undo()
    again = run(nodes, "ArvisionSample", pipeline=pipe, prompt="bag", **HOW)
    torch.testing.assert_close(again, images)


def test_prior_tokens_are_those_that_diffusers_decodes(nodes, pipe, tmp_path):
    from image_folders import glm_folder

    theirs = glm_folder(tmp_path / "glm")
    ours = arvision.load(tmp_path / "glm")
    size = {"height": 64, "width": 64}
    given = {"prompt": "ab", "sampler": "sjd", "num_images": 1, "seed": 0, **size}
    ids = run(nodes, "ArvisionGlmPriorTokens", pipeline=ours, **given)
    assert ids.shape == (1, 16)
    few: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}
    generator = torch.Generator().manual_seed(0)
    pictures = theirs(
        "ab", prior_token_ids=ids, generator=generator, guidance_scale=1.5, **size, **few
    ).images
    assert pictures.shape == (1, 64, 64, 3)
    with pytest.raises(InputError, match="expected a pipeline of GLM-Image"):
        run(nodes, "ArvisionGlmPriorTokens", pipeline=pipe, **given)
