"""From images to scores: sources, extraction on one and two processes, and bad files."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import run_forked
from forms import slow
from PIL import Image

from arvision.errors import InputError
from arvision.eval import evaluate, get_extractor, load_reference, open_source
from arvision.eval.evaluate import score_features
from arvision.eval.extract import extract
from arvision.eval.sources import FolderSource
from arvision.eval.writers import write_npz, write_pictures, write_tar

RANKS = Path(__file__).with_name("ranks.py")
CONV = get_extractor("random-conv")


def pictures(count: int, seed: int = 0, side: int = 8) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=draw)


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    images = pictures(1200).permute(0, 2, 3, 1).numpy()
    path = tmp_path / "samples.npz"
    np.savez(path, arr_0=images, arr_1=np.arange(1200) % 10)
    return path


def same_moments(a, b) -> bool:
    return torch.equal(a.mean, b.mean) and torch.equal(a.scatter, b.scatter)


def test_npz_folder_and_tensor_give_the_same_bits(npz: Path, tmp_path: Path):
    source = open_source(npz)
    assert isinstance(source.images, np.memmap)  # type: ignore[attr-defined]
    assert torch.equal(source.read(0, 1200), pictures(1200))
    write_pictures(source, tmp_path / "png")
    found = [
        extract(s, CONV, progress=False, keep_rows=False)
        for s in (source, open_source(tmp_path / "png"), open_source(pictures(1200)))
    ]
    first, second, third = (f.moments for f in found if f is not None)
    assert same_moments(second, third)
    assert first.count == second.count == 1200
    # With labels the images fall into other groups, so only rounding may differ.
    assert (first.scatter - second.scatter).abs().max() < 1e-9 * first.scatter.abs().max()


def test_compressed_npz_is_read_too(tmp_path: Path):
    images = pictures(20).permute(0, 2, 3, 1).numpy()
    np.savez_compressed(tmp_path / "small.npz", arr_0=images)
    assert torch.equal(open_source(tmp_path / "small.npz").read(0, 20), pictures(20))


def test_written_npz_is_readable_stored_and_repeatable(npz: Path, tmp_path: Path):
    source = open_source(npz)
    paths = [write_npz(source, tmp_path / name) for name in ("a.npz", "b.npz")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    loaded = np.load(paths[0])
    assert np.array_equal(loaded["arr_0"], np.load(npz)["arr_0"])
    assert np.array_equal(loaded["arr_1"], np.load(npz)["arr_1"])
    assert isinstance(open_source(paths[0]).images, np.memmap)  # type: ignore[attr-defined]


def test_tar_holds_every_image(npz: Path, tmp_path: Path):
    import io
    import tarfile

    path = write_tar(open_source(npz), tmp_path / "samples.tar")
    with tarfile.open(path) as tar:
        assert len(tar.getnames()) == 2400
        file = tar.extractfile("000007.png")
        assert file is not None
        picture = np.array(Image.open(io.BytesIO(file.read())))
    assert np.array_equal(picture, pictures(1200)[7].permute(1, 2, 0).numpy())


def launch(size: int, *arguments: object) -> None:
    """As `run_forked`, by PyTorch's own launcher."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}"]
    command += ["--standalone", "--no-python", sys.executable, str(RANKS), *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, timeout=900)


@pytest.mark.parametrize(
    ("run", "size"), [(partial(run_forked, RANKS), 2), slow(launch, 3)], ids=["forked", "launched"]
)
def test_many_processes_give_the_same_bits(npz: Path, tmp_path: Path, run: Any, size: int):
    out = tmp_path / "ranks.pt"
    run(size, npz, out)
    many = torch.load(out, weights_only=True)
    found = extract(open_source(npz), CONV, progress=False)
    assert found is not None
    assert torch.equal(many["moments"]["mean"], found.moments.mean)
    assert torch.equal(many["moments"]["scatter"], found.moments.scatter)
    halves = [open_source(pictures(1200)[:500]), open_source(pictures(1200)[500:1000])]
    scores = evaluate(halves[1], halves[0], CONV, metrics=["frechet"], progress=False)
    assert scores is not None
    assert many["metric"] == pytest.approx(scores["frechet_random-conv"].value, rel=1e-9)


def test_same_images_score_perfectly():
    source = open_source(pictures(300))
    scores = evaluate(source, open_source(pictures(300)), CONV, progress=False)
    assert scores is not None
    assert scores["frechet_random-conv"].value < 1e-9
    assert scores["precision"].value == scores["recall"].value == scores["coverage"].value == 1


def test_worse_images_score_worse():
    reference = load_reference(open_source(pictures(400)), CONV, need_rows=False, progress=False)
    values = []
    for shift in (0, 20, 80):
        images = (pictures(400, seed=5).int() + shift).clamp(0, 255).to(torch.uint8)
        scores = evaluate(open_source(images), reference, CONV, metrics=["frechet"], progress=False)
        assert scores is not None
        score = scores["frechet_random-conv"]
        assert score.interval is not None
        assert score.interval[0] < score.value < score.interval[1]
        values.append(score.value)
    assert values == sorted(values)


def test_statistics_reference(tmp_path: Path):
    found = extract(open_source(pictures(300)), CONV, progress=False)
    assert found is not None
    whole = found.moments
    path = tmp_path / "stats.npz"
    np.savez(path, mu=whole.mean.numpy(), sigma=whole.covariance().numpy())
    scores = evaluate(pictures(300), str(path), CONV, metrics=["frechet"], progress=False)
    assert scores is not None
    assert scores["frechet_random-conv"].value < 1e-9
    with pytest.raises(InputError, match="no images: expected arr_0"):
        evaluate(pictures(300), str(path), CONV, metrics=["precision"], progress=False)
    goal = load_reference(str(path), CONV, need_rows=False, progress=False)
    assert goal is not None
    with pytest.raises(InputError, match="expected them for sfid"):
        score_features(found, goal, CONV, ["sfid"])


def test_labels_reach_the_label_order_check(tmp_path: Path):
    images = pictures(400, side=32).permute(0, 2, 3, 1).numpy()
    path = tmp_path / "sorted.npz"
    np.savez(path, arr_0=images, arr_1=np.arange(400) // 40)
    network = get_extractor("fashion-classifier")
    with pytest.raises(InputError, match="sorted by class"):
        evaluate(str(path), pictures(400), network, metrics=["is"], progress=False)
    with pytest.warns(UserWarning, match="sorted by class"):
        scores = evaluate(
            str(path), pictures(400), network, metrics=["is"], allow_sorted=True, progress=False
        )
    assert scores is not None
    assert scores["is_fashion-classifier"].value >= 1


def save(path: Path, **arrays) -> str:
    np.savez(path, **arrays)
    return str(path)


def test_bad_files(tmp_path: Path):
    images = pictures(10).permute(0, 2, 3, 1).numpy()
    good = save(tmp_path / "good.npz", arr_0=images)
    data = Path(good).read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    wide = np.eye(5)
    cases = {
        "does not exist": str(tmp_path / "nowhere.npz"),
        "expected a whole .npz": str(tmp_path / "cut.npz"),
        "expected images under arr_0": save(tmp_path / "keys.npz", images=images),
        "expected uint8": save(tmp_path / "float.npz", arr_0=images.astype(np.float32)),
        r"expected \[N, H, W, 3\]": save(tmp_path / "flat.npz", arr_0=images[..., 0]),
        "labels for 10 images": save(tmp_path / "l.npz", arr_0=images, arr_1=np.arange(3)),
        "pickled|plain arrays": save(tmp_path / "o.npz", arr_0=np.array([{}, {}], dtype=object)),
    }
    for words, path in cases.items():
        with pytest.raises(InputError, match=words):
            open_source(path)
    references = {
        "expected sigma too": save(tmp_path / "mu.npz", mu=np.zeros(64)),
        r"for random-conv": save(tmp_path / "wide.npz", mu=np.zeros(5), sigma=wide),
    }
    for words, path in references.items():
        with pytest.raises(InputError, match=words):
            evaluate(good, path, CONV, metrics=["frechet"], progress=False)


def test_bad_pictures(tmp_path: Path):
    first, second = Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))
    first.save(tmp_path / "0.png")
    second.save(tmp_path / "1.png")
    with pytest.raises(InputError, match="is 9x8, the first picture 8x8"):
        extract(open_source(tmp_path), CONV, progress=False)
    (tmp_path / "1.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match="cannot be read as a picture"):
        extract(open_source(tmp_path), CONV, progress=False)
    (tmp_path / "1.png").unlink()
    with pytest.raises(InputError, match="at least 2"):
        extract(open_source(tmp_path), CONV, progress=False)
    first.save(tmp_path / "2.jpg")
    with pytest.raises(InputError, match="is JPEG"):
        open_source(tmp_path)
    assert len(open_source(tmp_path, allow_jpeg=True)) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no pictures"):
        open_source(tmp_path / "empty")


def test_numbers_in_names_order_pictures(tmp_path: Path):
    for number in (2, 10, 1):
        Image.new("L", (4, 4), number).save(tmp_path / f"{number}.png")
    source = FolderSource(tmp_path)
    assert [int(x) for x in source.read(0, 3)[:, 0, 0, 0]] == [1, 2, 10]


def test_crop_takes_the_centre(tmp_path: Path):
    picture = np.zeros((8, 16, 3), dtype=np.uint8)
    picture[:, 4:12] = 200
    Image.fromarray(picture).save(tmp_path / "a.png")
    cropped = FolderSource(tmp_path, crop=8).read(0, 1)
    assert cropped.shape == (1, 3, 8, 8)
    assert int(cropped.min()) == 200


def test_unknown_metric_and_missing_output():
    with pytest.raises(InputError, match="unknown metric"):
        evaluate(pictures(9), pictures(9), CONV, metrics=["fidd"], progress=False)
    with pytest.raises(InputError, match="needs logits"):
        evaluate(pictures(9), pictures(9), CONV, metrics=["is"], progress=False)
    with pytest.raises(InputError, match="needs spatial"):
        evaluate(pictures(9), pictures(9), CONV, metrics=["sfid"], progress=False)
