"""The commands as a new user runs them: three in processes of their own, the others in this one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image, ImageChops


def test_sample_writes_a_sheet_and_statistics(tmp_path, cli):
    out = tmp_path / "boots.png"
    done = cli(
        *("sample", "--model", "llamagen-fashion-t2i", "--prompt", "a dark ankle boot"),
        *("--sampler", "sjd", "--num-images", "4", "--seed", "0", "--out", str(out), "--json"),
    )
    assert done.returncode == 0, done.stderr
    stats = json.loads(done.stdout)
    assert stats["tokens"] == 64
    assert stats["forward_passes"] < 63
    assert "256/256" in done.stderr  # the progress bar
    with Image.open(out) as sheet:
        assert sheet.width > 4 * 32
    assert [path.name for path in tmp_path.iterdir()] == ["boots.png"]


def test_one_image_of_a_run_alone(tmp_path, cli):
    from arvision import sample

    options = ("sample", "--model", "llamagen-fashion", "--prompt", "bag", "--quiet", "--json")
    done = cli(*options, "--seed", "5:2", "--sampler", "ar", "--out", str(tmp_path / "a.png"))
    assert done.returncode == 0, done.stderr
    whole = sample("llamagen-fashion", "bag", "sjd", num_images=3, seed=5, progress=False)
    with Image.open(tmp_path / "a.png") as alone:
        small = alone.resize((32, 32), Image.Resampling.NEAREST)
        assert small.tobytes() == whole.images[2].tobytes()


def test_a_guidance_scale_for_each_image(tmp_path, cli):
    from arvision import sample

    done = cli(
        *("sample", "--model", "llamagen-fashion", "--prompt", "bag", "--num-images", "2"),
        *("--guidance-scale", "1", "--guidance-scale", "4", "--seed", "3", "--quiet"),
        *("--out", str(tmp_path / "bags.png")),
    )
    assert done.returncode == 0, done.stderr
    for number, scale in enumerate((1.0, 4.0)):
        alone = sample(
            "llamagen-fashion", "bag", seed=[(3, number)], guidance_scale=scale, progress=False
        )
        with Image.open(tmp_path / "bags.png") as sheet:
            left = 4 + number * (96 + 4)
            drawn = sheet.crop((left, 4, left + 96, 100)).resize((32, 32), Image.Resampling.NEAREST)
        # Decoding two pictures rounds otherwise than decoding one.
        assert max(ImageChops.difference(drawn, alone.images[0]).tobytes()) <= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "llamagen-fasion", "--prompt", "bag"], "did you mean 'llamagen-fashion"),
        (["--model", "llamagen-fashion", "--prompt", "hat"], "unknown class 'hat'"),
        (["--model", "llamagen-fashion", "--prompt", "12"], "class 12: expected 0..9"),
        (["--model", "llamagen-fashion", "--prompt", " "], "empty prompt"),
        (["--model", "llamagen-fashion", "--prompt", "1", "--sampler", "x"], "unknown sampler 'x'"),
        (["--model", "llamagen-fashion", "--prompt", "1", "--window", "0"], "window 0"),
        (["--model", "llamagen-fashion", "--prompt", "1", "--option", "a=1"], "option"),
        (["--model", "llamagen-fashion", "--prompt", "1", "--seed", "x"], "seed 'x'"),
        (["--model", "llamagen-fashion", "--prompt", "1", "--guidance-scale", "-1"], "guidance"),
        (
            [
                *("--model", "llamagen-fashion", "--prompt", "1", "--num-images", "3"),
                *("--guidance-scale", "1", "--guidance-scale", "2"),
            ],
            "guidance_scale of 2 lists: expected 3",
        ),
        (["--model", "llamagen-fashion", "--prompt", "1", "--out", "/"], "is a folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, message, cli):
    check_refused(cli("sample", "--quiet", *arguments), message)


def test_bad_input_to_a_process():
    command = [sys.executable, "-m", "arvision.cli", "samplers", "--model", "llamagen-fasion"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    check_refused(done, "did you mean 'llamagen-fashion'")


def check_refused(done, message: str) -> None:
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("sample --model llamagen-fashion --prompt 1 --out a.txt", "expected a name that ends in"),
        ("sample --model none --prompt 1 --out a.png/../b/c.doc", "expected a name that ends in"),
        ("compare --model none --samplers ar --out FILE", "is a file: expected a folder"),
        ("train --recipe var-fashion --out FILE/run", "is a file, expected a folder"),
        ("distill --teacher none --out FILE", "is a file: expected a folder"),
        ("eval generate --model none --out FILE", "is a file: expected a folder"),
        ("eval export --samples none --layout npz --out a.tar", "a name that ends in .npz"),
    ],
)
def test_out_is_checked_before_any_work(arguments, message, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("mine")
    done = cli(*arguments.split())
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]


def test_an_output_that_is_full_or_closed_is_one_line_and_exit_1():
    command = [sys.executable, "-m", "arvision.cli", "samplers"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "arvision: the output cannot be written: No space left on device\n"
    receiver, sender = os.pipe()
    os.close(receiver)
    done = subprocess.run(command, stdout=sender, stderr=subprocess.PIPE, text=True, check=False)
    os.close(sender)
    assert done.returncode == 1
    assert done.stderr == "arvision: the output was closed\n"


def test_an_interrupted_sample_leaves_no_file(tmp_path):
    command = [sys.executable, "-m", "arvision.cli", "sample", "--model", "llamagen-fashion"]
    command += ["--prompt", "bag", "--num-images", "20", "--sampler", "ar"]
    command += ["--out", str(tmp_path / "bags.png")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    deadline = time.monotonic() + 120
    begun = re.compile(r" [1-9]\d*/\d+ \[")
    while not begun.search(process.stderr.readline(80)) and time.monotonic() < deadline:
        pass
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert os.listdir(tmp_path) == []


def test_lists(cli):
    done = cli("models", "--json")
    names = [entry["name"] for entry in json.loads(done.stdout)]
    assert {"llamagen-fashion", "llamagen-fashion-t2i"} <= set(names)
    done = cli("samplers", "--json")
    laws = {entry["name"]: entry["lossless"] for entry in json.loads(done.stdout)}
    assert laws["ar"] is True
    assert laws["sjd"] is True
    assert "lossless" in cli("samplers").stdout


@pytest.mark.parametrize("command", ["sample", "compare", "train", "models", "samplers", "demo"])
def test_help(command, cli):
    done = cli(command, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout
    if command in ("sample", "compare", "train"):
        assert f"arvision {command} --" in done.stdout  # an example


def test_train_miniature(tmp_path, cli):
    arguments = ("train", "--recipe", "llamagen-fashion-t2i", "--out", str(tmp_path / "run"))
    sizes = ("--steps", "2", "--num-images", "200", "--card-samples", "30", "--threads", "1")
    done = cli(*arguments, *sizes, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"] == 30
    folder = tmp_path / "run" / "llamagen-fashion-t2i"
    assert "small demonstration model" in (folder / "README.md").read_text()
    drawn = cli("sample", "--model", str(folder), "--prompt", "a dark boot", "--json", "--quiet")
    assert json.loads(drawn.stdout)["tokens"] == 64
    wrong = cli("train", "--recipe", "llamagen", "--out", str(tmp_path))
    assert wrong.returncode == 2
    assert "unknown recipe 'llamagen': did you mean" in wrong.stderr
