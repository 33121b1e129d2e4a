"""Training: resumed equals uninterrupted, captions follow the pixels, recipes run end to end."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc

import pytest
import torch

from arvision import CheckpointError, InputError
from arvision.models import LlamaGenTokenizer, LlamaGenTransformer
from arvision.training import data
from arvision.training.captions import (
    BRIGHTNESS,
    CaptionWriter,
    measure,
    measure_brightness,
    vocabulary,
)
from arvision.training.data import load_fashion, to_pixels
from arvision.training.llamagen_text import build_text_encoder, build_text_tokenizer
from arvision.training.llamagen_tokenizer import TokenizerObjective
from arvision.training.llamagen_transformer import CaptionObjective, ClassObjective, pad_left
from arvision.training.loop import FitConfig, batch_indices, fit, learning_rate
from arvision.training.publish import run_recipe


@pytest.fixture(scope="module")
def pictures():
    """Invented garments: grey rectangles, so that no data set is needed."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(96, 32, 32, dtype=torch.uint8)
    for image in images:
        tone = int(torch.randint(60, 255, (), generator=generator))
        half = int(torch.randint(4, 14, (), generator=generator))
        image[4:28, 16 - half : 16 + half] = tone
    return images, torch.arange(96) % 10


def small_tokenizer():
    torch.manual_seed(1)
    return LlamaGenTokenizer(
        ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=32, codebook_size=16, num_recorded=0
    )


def small_transformer(**kind):
    torch.manual_seed(2)
    return LlamaGenTransformer(
        vocab_size=16,
        grid=(8, 8),
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        intermediate_size=32,
        **kind,
    )


def caption_objective(tokens, pictures):
    text_tokenizer = build_text_tokenizer()
    return CaptionObjective(
        small_transformer(num_classes=None, caption_dim=16, caption_length=6),
        tokens,
        CaptionWriter(measure(*pictures)),
        build_text_encoder(len(text_tokenizer), 16, seed=0),
        text_tokenizer,
    )


def make(kind, pictures):
    images, labels = pictures
    tokens = torch.randint(16, (96, 64), generator=torch.Generator().manual_seed(3))
    if kind == "tokenizer":
        return TokenizerObjective(small_tokenizer(), images, unquantised_steps=3)
    if kind == "class":
        return ClassObjective(small_transformer(num_classes=10), tokens, labels)
    return caption_objective(tokens, pictures)


@pytest.mark.parametrize("kind", ["tokenizer", "class", "caption"])
def test_resumed_equals_uninterrupted(tmp_path, pictures, kind):
    config = FitConfig(steps=8, batch_size=8, save_every=100, log_every=2)
    whole = make(kind, pictures)
    log = fit(whole, config, tmp_path / "whole", progress=False)
    for expected in (3, 6, 8):  # killed twice
        part = make(kind, pictures)
        resumed = fit(part, config, tmp_path / "parts", progress=False, stop_after=3)
        state = torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)
        assert state["step"] == expected
    for name, value in whole.state_dict().items():
        assert torch.equal(part.state_dict()[name], value), name
    assert [line["loss"] for line in resumed] == [line["loss"] for line in log]
    lines = (tmp_path / "parts" / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 8


def test_a_checkpoint_of_other_settings_is_refused(tmp_path, pictures):
    fit(make("class", pictures), FitConfig(steps=1, batch_size=4), tmp_path, progress=False)
    with pytest.raises(CheckpointError, match="other settings"):
        fit(make("class", pictures), FitConfig(steps=2, batch_size=4), tmp_path, progress=False)


def test_a_damaged_checkpoint_is_named(tmp_path, pictures):
    config = FitConfig(steps=2, batch_size=4)
    fit(make("class", pictures), config, tmp_path, progress=False, stop_after=1)
    path = tmp_path / "checkpoint.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    for bad in (bytes(data), bytes(data[: len(data) // 2])):
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"checkpoint\.pt is damaged .*: delete it to"):
            fit(make("class", pictures), config, tmp_path, progress=False)
    assert path.read_bytes() == bad


def test_a_second_training_in_a_folder_says_so(tmp_path, pictures):
    def try_another(_):
        with pytest.raises(InputError, match="another run works in"):
            fit(make("class", pictures), config, tmp_path, progress=False)
        tried.append(True)

    tried, config = [], FitConfig(steps=1, batch_size=4)
    fit(make("class", pictures), config, tmp_path, progress=False, on_log=try_another)
    assert tried == [True]


def test_fits_of_one_process_may_differ_in_precision(tmp_path, pictures):
    for precision in ("no", "bf16", "no"):
        config = FitConfig(steps=1, batch_size=4, mixed_precision=precision)
        assert fit(make("class", pictures), config, tmp_path / precision, progress=False)


def test_each_epoch_visits_every_item_once():
    seen = torch.cat([batch_indices(step, 7, 21, seed=0) for step in range(6)])
    assert seen[:21].sort().values.tolist() == list(range(21))
    assert seen[21:].sort().values.tolist() == list(range(21))
    assert not torch.equal(seen[:21], seen[21:])


def test_schedule():
    config = FitConfig(steps=100, warmup=10, learning_rate=1.0)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1, rel=1e-3)
    assert max(rates) <= 1.0
    assert rates[-1] < 0.001
    with pytest.raises(InputError, match="steps 0"):
        FitConfig(steps=0)


def test_losses_fall(tmp_path, pictures):
    images, labels = pictures
    objective = make("tokenizer", (images[:, ::2, ::2], labels))
    config = FitConfig(steps=60, batch_size=32, learning_rate=3e-3, log_every=10, warmup=5)
    log = fit(objective, config, tmp_path, progress=False)
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert log[-1]["codes_used"] > 4


def test_pad_left_keeps_order():
    features = torch.arange(8.0).view(2, 4, 1)
    valid = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    moved, mask = pad_left(features, valid)
    assert moved[0, :, 0].tolist()[2:] == [0.0, 1.0]
    assert mask.tolist() == [[False, False, True, True], [True] * 4]
    assert torch.equal(moved[1], features[1])


def test_captions_say_what_the_pixels_show():
    images = torch.zeros(3, 32, 32, dtype=torch.uint8)
    for image, tone in zip(images, (80, 165, 240), strict=True):
        image[6:26, 10:22] = tone
    found = measure(images, torch.tensor([1, 1, 1]))
    assert [BRIGHTNESS[i] for i in found.brightness.tolist()] == ["dark", "grey", "light"]
    assert measure_brightness(images).tolist() == [0, 1, 2]
    writer = CaptionWriter(found)
    captions = {writer(2, torch.Generator().manual_seed(seed)) for seed in range(40)}
    assert all("dark" not in c and "grey" not in c for c in captions)
    assert any("light" in c and "narrow" in c for c in captions)
    assert all("trousers" in c or "pants" in c for c in captions)
    assert {word for c in captions for word in c.split()} <= set(vocabulary())


def test_every_caption_word_is_known_to_the_text_tokenizer():
    tokenizer = build_text_tokenizer()
    for word in vocabulary():
        assert tokenizer.unk_token_id not in tokenizer(word)["input_ids"]
    assert tokenizer("zebra")["input_ids"][0] == tokenizer.unk_token_id


def test_fashion_mnist_loader():
    images, labels = load_fashion("test")
    assert images.shape == (400, 32, 32)
    assert labels.bincount().tolist() == [42, 44, 54, 36, 43, 32, 39, 40, 34, 36]
    assert int(images[:, :2].max()) == 0
    pixels = to_pixels(images[:2])
    assert pixels.shape == (2, 3, 32, 32)
    assert float(pixels.min()) == -1.0
    with pytest.raises(InputError, match="unknown split 'dev'"):
        load_fashion("dev")


def test_absent_fashion_mnist_is_one_line_that_says_how_to_get_it(tmp_path, monkeypatch):
    """Asked for by name, by a recipe, or by a folder that is not whole; before any work."""
    monkeypatch.setattr(data, "DEBIAN_FOLDER", tmp_path / "none")
    monkeypatch.delenv(data.FOLDER_VARIABLE)
    for ask in (
        lambda: load_fashion("train"),
        lambda: run_recipe("var-fashion", tmp_path / "run"),
        lambda: run_recipe("mar-fashion-draft", tmp_path / "run"),
        lambda: run_recipe("fashion-classifier", tmp_path / "run"),
    ):
        with pytest.raises(InputError, match="apt-get install dataset-fashion-mnist") as caught:
            ask()
        assert "--fashion-mnist or ARVISION_FASHION_MNIST" in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(data.FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(InputError, match=r"has no train-images-idx3-ubyte\.gz, train-labels"):
        load_fashion("train")
    for file in (name for pair in data.FILES.values() for name in pair):
        (tmp_path / file).write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(InputError, match=r"t10k-images.* expected a whole gzipped IDX file"):
        load_fashion("test")


def idx(kind: int, shape: tuple[int, ...], data: bytes) -> bytes:
    sides = b"".join(side.to_bytes(4, "big", signed=True) for side in shape)
    return gzip.compress(bytes([0, 0, kind, len(shape)]) + sides + data, 1, mtime=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx(8, (2, 4, 4), bytes(2**26)), "33 bytes or more for"),
        (idx(8, (2, 4, 4), bytes(31)), "31 bytes"),
        (idx(8, (2**20, 2**10, 28), bytes(9)), "268,435,456 bytes at most"),
        (idx(8, (-2, -4, 4), bytes(32)), "at most"),
        (idx(8, (0, 4, 4), b""), "at most"),
        (idx(13, (2, 4, 4), bytes(32)), "no header of unsigned bytes"),
        (idx(8, (2,) * 200, bytes(9)), "at most"),
        (b"not gzip", "gzip"),
        (idx(8, (2, 4, 4), bytes(32))[:-6], "gzipped IDX"),
        (gzip.compress(b"", mtime=0), "no header"),
    ],
    ids=range(10),
)
def test_idx_files_are_as_large_as_their_header_says(tmp_path, content, message):
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(InputError, match=message) as error:
        data._read_idx(path)
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()
    assert "\n" not in str(error.value)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match="is a FIFO"):
        data._read_idx(path)
