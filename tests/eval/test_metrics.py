"""The torchmetrics classes, pixels, classifier, protocols and exports."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance

from arvision.errors import CheckpointError, InputError
from arvision.eval import (
    ClassConsistency,
    FrechetDistance,
    InceptionScore,
    KernelDistance,
    PrecisionRecall,
    class_consistency,
    classify,
    evaluate,
    get_extractor,
    load_classifier,
    open_source,
    to_uint8,
)
from arvision.eval.coco import choose_captions
from arvision.eval.protocols import get_pixels, get_protocol, interleaved_labels
from arvision.eval.writers import export_layout, read_prompts, write_pictures
from arvision.training.data import load_fashion


def pictures(count: int, seed: int = 0, side: int = 32) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=draw)


def fill(metric, count: int = 300):
    for seed, real in ((0, True), (1, False)):
        for part in pictures(count, seed).split(70):
            metric.update(part if real else part // 2, real=real)
    return metric


def test_metrics_equal_functions():
    network = get_extractor("random-conv")
    real, fake = open_source(pictures(300, 0)), open_source(pictures(300, 1) // 2)
    scores = evaluate(fake, real, network, progress=False)
    assert scores is not None
    distance = fill(FrechetDistance(network))
    expected = scores["frechet_random-conv"].value
    assert float(distance.compute()) == pytest.approx(expected, rel=1e-9)
    kid = fill(KernelDistance(network, subset_size=300)).compute()
    assert float(kid) == pytest.approx(scores["kid"].value, rel=1e-9)
    shares = fill(PrecisionRecall(network)).compute()
    for name in ("precision", "recall", "density", "coverage"):
        assert float(shares[name]) == pytest.approx(scores[name].value)


def test_frechet_equals_torchmetrics_with_the_same_network():
    network = get_extractor("random-conv")
    theirs = FrechetInceptionDistance(feature=network, antialias=False)
    fill(theirs)
    ours = float(fill(FrechetDistance(network)).compute())
    # torchmetrics rounds the result to float32 and sums in raw moments.
    assert ours == pytest.approx(float(theirs.compute()), rel=1e-3)


def test_reset_forward_and_statistics():
    metric = fill(FrechetDistance("random-conv", reset_real=False))
    value = float(metric.compute())
    metric.reset()
    with pytest.raises(InputError, match="at least 2"):
        metric.compute()
    metric.update(pictures(300, 1) // 2, real=False)
    assert float(metric.compute()) == pytest.approx(value, rel=1e-9)
    other = FrechetDistance("random-conv")
    rows = other.extractor(pictures(300, 0)).double()
    other.set_real_statistics(rows.mean(0), rows.T.cov())
    other.update(pictures(300, 1) // 2, real=False)
    assert float(other.compute()) == pytest.approx(value, rel=1e-9)
    with pytest.raises(InputError, match="statistics of shape"):
        other.set_real_statistics(torch.zeros(3), torch.eye(3))


def test_state_survives_saving():
    metric = fill(FrechetDistance("random-conv"))
    metric.persistent(True)
    copy = FrechetDistance("random-conv")
    copy.persistent(True)
    copy.load_state_dict(metric.state_dict())
    assert float(copy.compute()) == float(metric.compute())


def test_metrics_refuse_floats_and_emptiness():
    with pytest.raises(InputError, match="uint8"):
        FrechetDistance("random-conv").update(pictures(4).float(), real=True)
    for metric in (KernelDistance("random-conv"), InceptionScore("fashion-classifier")):
        with pytest.raises(InputError, match="before compute"):
            metric.compute()
    with pytest.raises(InputError, match="no logits"):
        InceptionScore("random-conv")


def test_inception_score_metric():
    metric = InceptionScore("fashion-classifier", num_splits=2)
    metric.update(pictures(40))
    assert 1 <= float(metric.compute()) <= 10


def test_embedded_classifier_knows_real_garments():
    images, labels = load_fashion("test")
    score = class_consistency(images.unsqueeze(1), labels)
    assert score.value >= 0.92
    assert score.interval is not None
    assert score.interval[0] < score.value < score.interval[1]
    assert sum(map(sum, score.details["confusion"])) == 400
    metric = ClassConsistency()
    for rows in torch.arange(400).split(150):
        metric.update(images[rows].unsqueeze(1), labels[rows])
    assert float(metric.compute()) == pytest.approx(score.value)
    shuffled = class_consistency(images.unsqueeze(1), labels.roll(1))
    assert shuffled.value < 0.2
    assert classify(images[:3].unsqueeze(1)).sum(1).tolist() == pytest.approx([1, 1, 1])


def test_classifier_refusals(tmp_path: Path):
    with pytest.raises(InputError, match="expected 32x32"):
        class_consistency(pictures(2, side=28), [0, 1])
    with pytest.raises(InputError, match=r"expected 0\.\.9"):
        class_consistency(pictures(2), [0, 10])
    with pytest.raises(InputError, match="one label per image"):
        class_consistency(pictures(2), [0])
    with pytest.raises(CheckpointError, match="no usable"):
        load_classifier(tmp_path)


def test_classifier_recipe_repeats(tmp_path: Path):
    """Two short runs with one seed give the same file; the card carries the measured numbers."""
    from arvision.training import classifier

    folders = [tmp_path / "a", tmp_path / "b"]
    measured = [classifier.train_classifier(f, epochs=8, seed=3, progress=False) for f in folders]
    files = [(f / "model.safetensors").read_bytes() for f in folders]
    assert files[0] == files[1]
    assert measured[0]["accuracy"] > 0.3
    card = (folders[0] / "README.md").read_text()
    assert f"{measured[0]['accuracy']:.4f}" in card
    assert load_classifier(folders[0])(pictures(2)).shape == (2, 10)
    with pytest.raises(InputError, match="epochs"):
        classifier.train_classifier(tmp_path / "c", epochs=0)


def test_roundings():
    x = torch.tensor([-1.2, -1.0, -0.003, 0.0, 0.5, 0.999, 1.0, 1.2]).view(1, 1, 2, 4)
    flat = x.clamp(-1, 1).flatten()
    expected = {
        "round": (flat * 127.5 + 127.5).round(),
        "truncate": (flat * 127.5 + 127.5).trunc(),
        "llamagen": (127.5 * flat + 128.0).clamp(0, 255).trunc(),
        "mar": (255 * (flat + 1) / 2).round(),
    }
    for rounding, values in expected.items():
        found = to_uint8(x, rounding, "signed").flatten()
        assert torch.equal(found, values.to(torch.uint8)), rounding
    unit = torch.rand(1, 3, 4, 4)
    assert torch.equal(to_uint8(unit), (unit * 255).round().to(torch.uint8))
    with pytest.raises(InputError, match="NaN"):
        to_uint8(torch.tensor([float("nan")]).view(1, 1, 1, 1))
    with pytest.raises(InputError, match="rounding"):
        to_uint8(unit, "floor")
    with pytest.raises(InputError, match="float"):
        to_uint8(pictures(1))
    with pytest.raises(InputError, match="value range"):
        to_uint8(unit, value_range="byte")


def test_pixel_presets():
    big = torch.rand(1, 3, 384, 384)
    ours = get_pixels("llamagen")(big)
    resized = torch.nn.functional.interpolate(big * 2 - 1, (256, 256), mode="bicubic")
    theirs = torch.clamp(127.5 * resized + 128.0, 0, 255).to(torch.uint8)
    assert ours.shape == (1, 3, 256, 256)
    # x and 2x - 1 round differently in float32: a level flips in a few pixels of 100,000.
    assert (ours.int() - theirs.int()).abs().max() <= 1
    assert (ours != theirs).double().mean() < 1e-3
    half = torch.full((1, 3, 2, 2), 0.5)
    levels = {name: int(get_pixels(name)(half)[0, 0, 0, 0]) for name in ("plain", "var", "mar")}
    assert levels == {"plain": 128, "var": 127, "mar": 128}
    with pytest.raises(InputError, match="pixel preset"):
        get_pixels("vae")


def test_protocols_and_labels():
    assert get_protocol("adm-in256").id == get_protocol("adm-in256/v1").id == "adm-in256/v1"
    with pytest.raises(InputError, match="did you mean"):
        get_protocol("adm-in25")
    labels = interleaved_labels(995, 1005, 1000)
    assert labels == [995, 996, 997, 998, 999, 0, 1, 2, 3, 4]
    counts = np.bincount(interleaved_labels(0, 50_000, 1000))
    assert counts.min() == counts.max() == 50


def test_coco_captions(tmp_path: Path):
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(20)]
    notes = [{"id": 100 - k, "image_id": k % 20, "caption": f" caption {k} "} for k in range(60)]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": notes}))
    records = choose_captions(path, 10, seed=1)
    ids = [r["image_id"] for r in records]
    assert ids == sorted(set(ids))
    assert records == choose_captions(path, 10, seed=1)
    assert records != choose_captions(path, 10, seed=2)
    assert all(r["prompt"] == f"caption {r['image_id'] + 40}" for r in records)
    with pytest.raises(InputError, match="20 images"):
        choose_captions(path, 21)
    path.write_text("{}")
    with pytest.raises(InputError, match="expected COCO captions"):
        choose_captions(path, 5)


def test_geneval_layout(tmp_path: Path):
    records = [{"tag": "color", "prompt": "a red dog"}, {"tag": "count", "prompt": "two cats"}]
    path = tmp_path / "meta.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    source = open_source(pictures(8))
    out = export_layout("geneval", source, read_prompts(path), tmp_path / "out", 4)
    assert json.loads((out / "00001" / "metadata.jsonl").read_text()) == records[1]
    picture = np.array(Image.open(out / "00001" / "samples" / "0002.png"))
    assert np.array_equal(picture, pictures(8)[6].permute(1, 2, 0).numpy())
    with pytest.raises(InputError, match="not an empty folder"):
        export_layout("geneval", source, records, out, 4)
    with pytest.raises(InputError, match="expected as many"):
        export_layout("geneval", source, records, tmp_path / "x", 3)
    assert not (tmp_path / "x").exists()


def test_hpsv2_and_dpg_layouts(tmp_path: Path):
    path = tmp_path / "hps.json"
    path.write_text(json.dumps({"anime": ["a", "b"], "photo": ["c"]}))
    records = read_prompts(path)
    out = export_layout("hpsv2", open_source(pictures(3)), records, tmp_path / "hps")
    names = sorted(str(p.relative_to(out)) for p in out.rglob("*.jpg"))
    assert names == ["anime/00000.jpg", "anime/00001.jpg", "photo/00000.jpg"]
    with pytest.raises(InputError, match="style"):
        export_layout("hpsv2", open_source(pictures(2)), [{"prompt": "x"}] * 2, tmp_path / "y")
    dpg = export_layout(
        "dpg-bench",
        open_source(pictures(4, side=8)),
        [{"prompt": "x", "id": "p7"}],
        tmp_path / "d",
        4,
    )
    grid = np.array(Image.open(dpg / "p7.png"))
    assert grid.shape == (16, 16, 3)
    assert np.array_equal(grid[:8, 8:], pictures(4, side=8)[1].permute(1, 2, 0).numpy())
    assert np.array_equal(grid[8:, :8], pictures(4, side=8)[2].permute(1, 2, 0).numpy())
    with pytest.raises(InputError, match="takes 4"):
        export_layout("dpg-bench", open_source(pictures(2)), [{"prompt": "x"}], tmp_path / "z", 2)
    with pytest.raises(InputError, match="unknown layout"):
        export_layout("dpg", open_source(pictures(2)), [{"prompt": "x"}], tmp_path / "z", 2)


def test_jpeg_is_not_written_unasked(tmp_path: Path):
    with pytest.raises(InputError, match="JPEG"):
        write_pictures(open_source(pictures(2)), tmp_path / "j", "jpg")
    write_pictures(open_source(pictures(2)), tmp_path / "j", "jpg", allow_jpeg=True)
    assert len(list((tmp_path / "j").iterdir())) == 2


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_prompts_must_exist(tmp_path: Path, text: str):
    path = tmp_path / "p.txt"
    path.write_text(text)
    with pytest.raises(InputError, match="expected a prompt or more, found none"):
        read_prompts(path)
    with pytest.raises(InputError, match="expected prompts"):
        read_prompts(tmp_path / "none.txt")
