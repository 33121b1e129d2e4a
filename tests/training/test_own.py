"""Training on a person's own pictures: three recipes, killed and resumed, and bad input in one line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import arvision
from arvision import InputError
from arvision.training.data import pixel_loss
from arvision.training.own import train
from arvision.training.own_data import open_pictures, pack_pictures
from arvision.training.own_recipes import OwnSettings, scales_of

TINY = OwnSettings(
    size=16,
    factor=4,
    steps=6,
    hidden_size=32,
    num_layers=1,
    codebook_size=16,
    batch_size=8,
    sample_every=3,
)


def draw(kind, index):
    generator = np.random.default_rng(index)
    picture = Image.new("RGB", (24, 20), (20, 30, 40))
    x, radius = int(generator.integers(8, 16)), int(generator.integers(4, 8))
    colour = tuple(generator.integers(120, 255, 3).tolist())
    box = (x - radius, 10 - radius, x + radius, 10 + radius)
    getattr(ImageDraw.Draw(picture), kind)(box, fill=colour)
    return picture


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Circles and squares in subfolders, PNG and JPEG, and captions of them."""
    folder = tmp_path_factory.mktemp("shapes")
    lines = []
    for index in range(24):
        kind, name = [("ellipse", "circle"), ("rectangle", "square")][index % 2]
        (folder / name).mkdir(exist_ok=True)
        file = f"{name}/{index}.{'jpg' if index % 3 == 0 else 'png'}"
        draw(kind, index).save(folder / file)
        lines.append({"file": file, "text": f"A {name}, on slate!"})
    captions = folder.parent / "captions.jsonl"
    captions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder, captions


@pytest.mark.parametrize("recipe", ["llamagen", "var", "mar"])
def test_a_model_of_ones_own_is_trained_and_loads(recipe, shapes, tmp_path, cli):
    out = tmp_path / "run"
    figures = train(shapes[0], out, replace(TINY, recipe=recipe), progress=False)
    assert (figures["pictures"], figures["held_out"]) == (22, 2)
    assert figures["classes"] == ["circle", "square"]
    assert figures["held_out_loss"]["best"] < figures["held_out_loss"]["first"]
    for name in ("000003.png", "000006.png"):
        assert Image.open(out / "samples" / name).size[0] > 300
    rows = [json.loads(line) for line in (out / "held_out.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 3, 6] * 2
    assert rows[2]["psnr"] > rows[0]["psnr"]
    pipe = arvision.load(out)
    assert pipe("square", seed=0).images[0].size == (16, 16)
    drawn = cli("sample", "--model", str(out), "--prompt", "circle", "--quiet", "--json")
    assert drawn.returncode == 0, drawn.stderr
    before = (out / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    again = train(shapes[0], out, replace(TINY, recipe=recipe), progress=False)
    assert again == figures
    assert (out / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == before


def test_captions_train_a_model_of_texts(shapes, tmp_path):
    folder, captions = shapes
    out = tmp_path / "run"
    figures = train(folder, out, TINY, captions=captions, progress=False)
    assert figures["classes"] is None
    assert figures["held_out_loss"]["best"] < figures["held_out_loss"]["first"]
    pipe = arvision.load(out)
    assert set(pipe.text_tokenizer.get_vocab()) == {
        *("<pad>", "</s>", "<unk>", "a", "circle", "square", ",", "on", "slate", "!")
    }
    assert pipe("a square on slate", seed=0).images[0].size == (16, 16)


RUN = """
import sys
from dataclasses import replace
from arvision.training.data import pixel_loss
from arvision.training.own import train
from arvision.training.own_recipes import OwnSettings
train(sys.argv[1], sys.argv[2], OwnSettings(**eval(sys.argv[3])), progress=False)
"""


SHORT = replace(TINY, steps=8, batch_size=4)


@pytest.fixture(scope="module")
def whole(shapes, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    train(shapes[0], out, SHORT, progress=False)
    return out


@pytest.mark.parametrize("sheet", ["tokenizer-000006.png", "000006.png"])
def test_interrupted_and_resumed_equals_uninterrupted(sheet, shapes, whole, tmp_path):
    settings, part = SHORT, tmp_path / "part"
    shutil.copytree(whole / "work" / "pictures", part / "work" / "pictures")
    # A folder in the place of a sheet ends the run behind a checkpoint and before the next.
    obstacle = part / "samples" / sheet
    obstacle.mkdir(parents=True)
    with pytest.raises(InputError, match="is a folder"):
        train(shapes[0], part, settings, progress=False)
    assert not (part / "model_index.json").exists()
    obstacle.rmdir()
    train(shapes[0], part, settings, progress=False)
    check_same(part, whole)


def check_same(one, other):
    for name in ("tokenizer", "transformer"):
        file = f"{name}/diffusion_pytorch_model.safetensors"
        assert (one / file).read_bytes() == (other / file).read_bytes()
    held = [(run / "held_out.jsonl").read_text() for run in (one, other)]
    assert held[0] == held[1]


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(shapes, tmp_path):
    settings = replace(TINY, steps=12, batch_size=4)
    train(shapes[0], tmp_path / "whole", settings, progress=False)
    part = tmp_path / "part"
    command = [sys.executable, "-c", RUN, str(shapes[0]), str(part), repr(settings.to_json())]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 300
    while not (part / "samples/tokenizer-000003.png").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (part / "model_index.json").exists()
    train(shapes[0], part, settings, progress=False)
    check_same(part, tmp_path / "whole")


def test_pictures_are_read_as_viewers_show_them(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    tall = Image.new("RGB", (40, 20), "black")
    tall.paste("white", (0, 0, 40, 10))  # white above, black below
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter: white is on the right then
    tall.save(folder / "1.png", exif=exif)
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(folder / "2.png")
    pack_pictures(folder, 16, tmp_path / "packed", {}, progress=False)
    pictures = open_pictures(tmp_path / "packed")
    assert pictures.class_names == ["picture"]
    turned, clear = sorted(pictures.images, key=lambda image: int(image.sum()))
    assert int(clear.min()) == 255
    assert turned[0, :, :6].max() < 30
    assert turned[0, :, 10:].min() > 225


def test_scales_grow_to_the_grid():
    assert scales_of(8) == (1, 2, 3, 5, 8)
    for grid in range(1, 33):
        sides = scales_of(grid)
        assert sides[0] == 1
        assert sides[-1] == grid
        assert list(sides) == sorted(set(sides))


def broken(tmp_path, shapes):
    folder = tmp_path / "broken"
    folder.mkdir()
    for index in range(3):
        draw("ellipse", index).save(folder / f"{index}.png")
    data = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(data[: len(data) // 2])
    return {"data": folder}


def called_a_picture(tmp_path, shapes):
    given = broken(tmp_path, shapes)
    (given["data"] / "1.png").write_text("no picture")
    return given


def empty(tmp_path, shapes):
    (tmp_path / "empty").mkdir()
    return {"data": tmp_path / "empty"}


def missing_file(tmp_path, shapes):
    file = tmp_path / "captions.csv"
    file.write_text("file,text\ncircle/0.jpg,a circle\ncircle/99.png,a circle\nx.png,none\n")
    return {"captions": file}


def no_text(tmp_path, shapes):
    file = tmp_path / "captions.csv"
    file.write_text("file,caption\ncircle/0.jpg,a circle\n")
    return {"captions": file}


def another_file(tmp_path, shapes):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    return {}


def beside(tmp_path, shapes):
    folder = tmp_path / "mixed"
    (folder / "dogs").mkdir(parents=True)
    draw("ellipse", 0).save(folder / "dogs" / "1.png")
    draw("ellipse", 1).save(folder / "2.png")
    return {"data": folder}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (broken, r"1\.png cannot be read as a picture"),
        (called_a_picture, r"1\.png cannot be read as a picture"),
        (empty, "holds no pictures"),
        (missing_file, r"captions\.csv names circle/99\.png and 1 more: no such picture"),
        (no_text, "columns file, caption: expected one of them to be named text"),
        (another_file, r"holds thesis\.txt and no run: expected a new or empty folder"),
        (beside, r"2\.png lies beside subfolders"),
        (lambda *_: {"data": "nowhere"}, "data nowhere: expected a folder"),
        (lambda *_: {"captions": "captions.txt"}, r"expected captions in a \.csv"),
    ],
)
def test_bad_pictures_are_one_line_and_leave_nothing(make, message, shapes, tmp_path):
    given = {"data": shapes[0], **make(tmp_path, shapes)}
    out = tmp_path / "run"
    before = sorted(out.iterdir()) if out.exists() else []
    with pytest.raises(InputError, match=message) as caught:
        train(given.pop("data"), out, TINY, progress=False, **given)
    assert "\n" not in str(caught.value)
    work = list((out / "work").glob("*")) if out.exists() else []
    assert not work
    assert [path for path in before if not path.exists()] == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"size": 50}, r"size 50: the tokenizer takes multiples of 8 .* such as 48"),
        ({"size": 4096}, "such as 512"),
        ({"size": 64, "factor": 3}, "factor 3 at size 64: expected one of 2, 4, 8, 16"),
        ({"recipe": "lamagen"}, "did you mean 'llamagen'"),
        ({"minutes": 3.0}, "expected one of them"),
        ({"hidden_size": 100}, "multiple of 32"),
        ({"steps": 0}, "steps 0"),
    ],
)
def test_settings_out_of_range_are_named(changed, message):
    with pytest.raises(InputError, match=message):
        replace(TINY, **changed)


def test_a_folder_of_another_run_and_options_without_effect(shapes, tmp_path, cli):
    folder, captions = shapes
    out = tmp_path / "run"
    train(folder, out, replace(TINY, steps=1), progress=False)
    with pytest.raises(InputError, match="holds a run with size 16, not 24"):
        train(folder, out, replace(TINY, steps=1, size=24), progress=False)
    with pytest.raises(InputError, match="recipe 'llamagen', which reads text"):
        train(folder, out, replace(TINY, recipe="var"), captions=captions, progress=False)
    done = cli("train", "--recipe", "llamagen-fashion", "--size", "32", "--out", str(out))
    assert done.returncode == 2
    assert "--size without --data" in done.stderr
    given = ("train", "--recipe", "llamagen", "--data", str(folder), "--out", str(out))
    done = cli(*given, "--num-images", "3")
    assert "--num-images with --data" in done.stderr


def test_minutes_become_steps(shapes, tmp_path):
    settings = replace(TINY, steps=None, minutes=0.02, sample_every=100)
    figures = train(shapes[0], tmp_path / "run", settings, progress=False)
    assert all(steps >= 20 for steps in figures["steps"].values())
    plan = json.loads((tmp_path / "run" / "work" / "tokenizer.json").read_text())
    assert plan["steps"] == figures["steps"]["tokenizer"]
    assert plan["mixed_precision"] in ("no", "bf16")
    assert torch.get_num_threads() == 1


def test_errors_of_colour_weigh_more_where_there_is_colour():
    pixels = torch.zeros(1, 3, 4, 4)
    alike, coloured = pixels + 0.1, pixels + torch.tensor([0.1, -0.1, 0.0]).view(3, 1, 1)
    grey, rgb = torch.zeros(1, 4, 4), torch.zeros(1, 3, 4, 4)
    for out in (alike, coloured):
        error = (out - pixels).square().mean()
        loss, told = pixel_loss(out, pixels, grey)
        assert float(told) == pytest.approx(float(error))
        assert float(loss) == pytest.approx(float(error + 0.2 * (out - pixels).abs().mean()))
    assert float(pixel_loss(alike, pixels, rgb)[0]) == pytest.approx(
        float(pixel_loss(alike, pixels, grey)[0])
    )
    added = pixel_loss(coloured, pixels, rgb)[0] - pixel_loss(coloured, pixels, grey)[0]
    assert float(added) == pytest.approx(4 * 0.02 / 3)
