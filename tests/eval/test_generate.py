"""Crash-safe generation: any batch size, any number of processes, the same bytes."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from forked import run_forked
from forms import slow
from typer.testing import CliRunner

from arvision.cli import app
from arvision.errors import InputError
from arvision.eval import generate
from arvision.eval.generate import run_facts
from arvision.eval.shards import ShardFolder

SCRIPT = Path(__file__).with_name("maker.py")
spec = importlib.util.spec_from_file_location("eval_maker", SCRIPT)
assert spec is not None
assert spec.loader is not None
maker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(maker)
NUM = 2300  # four whole blocks and a part


def hashes(folder: Path) -> dict[str, str]:
    """Names and hashes of all block files; temporary files must not survive."""
    files = sorted((folder / "blocks").iterdir())
    assert not [f.name for f in files if f.name.endswith(".tmp")]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    generate(maker.make, maker.config(NUM), out, batch_size=100, progress=False)
    return out


def test_blocks_and_facts(whole: Path):
    names = set(hashes(whole))
    assert names == {f"{b:05d}{s}" for b in range(5) for s in (".npy", ".tokens.npy")}
    shards = ShardFolder(whole)
    facts = run_facts(shards)
    assert facts["images"] == facts["forward_passes"] == NUM
    assert facts["images_per_second"] > 0
    assert shards.read(499, 501).shape == (2, 8, 8, 3)
    assert shards.read_tokens(499, 501)[:, 0].tolist() == [499 % 97, 500 % 97]


def test_images_depend_on_seed_and_label_alone(whole: Path):
    index = 1234
    own = maker.make([index], [index % 10], [(0, index)]).images[0].permute(1, 2, 0)
    assert np.array_equal(ShardFolder(whole).read(index, index + 1)[0], own.numpy())


def test_batch_size_changes_nothing(whole: Path, tmp_path: Path):
    generate(maker.make, maker.config(NUM), tmp_path, batch_size=33, progress=False)
    assert hashes(tmp_path) == hashes(whole)


def start(out: Path, size: int, batch: int, delay: float) -> subprocess.Popen:
    """The maker as `size` processes, in one group that can be killed."""
    launcher = [sys.executable]
    if size > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={size}"]
        launcher += ["--standalone", "--no-python", sys.executable]
    command = [*launcher, str(SCRIPT), str(out), str(NUM), str(batch), str(delay)]
    return subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to everything that `start` began; torchrun's workers have sessions of their own."""
    everything = [psutil.Process(process.pid)]
    everything += everything[0].children(recursive=True)
    for one in everything:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    psutil.wait_procs(everything, timeout=30)


def wait_for_blocks(out: Path, count: int, process: subprocess.Popen) -> None:
    """Until `count` block files are there, or the process ends."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        if len(list((out / "blocks").glob("*"))) >= count:
            return
        time.sleep(0.005)
    assert process.poll() is not None, "no blocks within ten minutes"


def kill_and_resume(out: Path, whole: Path, moments: list[tuple[int, float, int]]) -> int:
    """Kill at (blocks seen, extra seconds, processes), finish, compare; the number of kills."""
    kills = 0
    for round_, (blocks, extra, size) in enumerate(moments):
        process = start(out, size, 50 + 7 * round_, delay=0.01)
        wait_for_blocks(out, blocks, process)
        time.sleep(extra)
        if process.poll() is None:
            kills += 1
            kill(process)
    generate(maker.make, maker.config(NUM), out, batch_size=250, progress=False)
    assert hashes(out) == hashes(whole)
    return kills


def test_killed_and_resumed(whole: Path, tmp_path: Path):
    assert kill_and_resume(tmp_path, whole, [(3, 0.05, 1)]) >= 1


@pytest.mark.slow
def test_killed_at_ten_random_moments_with_changing_processes(whole: Path, tmp_path: Path):
    draw, kills = random.Random(0), 0
    for trial in range(5):
        out = tmp_path / str(trial)
        moments = [(draw.randint(0, 3), draw.random() * 0.1, size) for size in (1, 2)]
        kills += kill_and_resume(out, whole, moments)
    assert kills == 10


def launch(out: Path) -> None:
    assert start(out, 2, 64, 0.0).wait(timeout=900) == 0


def fork(out: Path) -> None:
    run_forked(SCRIPT, 2, out, NUM, 64)


@pytest.mark.parametrize("run", [fork, slow(launch)])
def test_two_processes_give_the_same_bytes(whole: Path, tmp_path: Path, run: Any):
    run(tmp_path)
    assert hashes(tmp_path) == hashes(whole)
    assert {p.name for p in tmp_path.glob("manifest-*")} == {
        "manifest-0000.jsonl",
        "manifest-0001.jsonl",
    }


def test_a_torn_manifest_line_is_made_again(whole: Path, tmp_path: Path):
    generate(maker.make, maker.config(NUM), tmp_path, progress=False)
    manifest = tmp_path / "manifest-0000.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-40])
    assert len(ShardFolder(tmp_path).finished()) == 4
    generate(maker.make, maker.config(NUM), tmp_path, progress=False)
    assert hashes(tmp_path) == hashes(whole)
    assert len(ShardFolder(tmp_path).check_complete()) == 5


def test_a_shard_that_disagrees_is_reported_and_kept(tmp_path: Path):
    generate(maker.make, maker.config(600), tmp_path, progress=False)
    path = tmp_path / "blocks" / "00001.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"00001\.npy: sha256"):
        generate(maker.make, maker.config(600), tmp_path, progress=False)
    assert path.read_bytes() == bytes(data)


def test_damaged_and_missing_shards_are_made_again_after_a_repair(tmp_path: Path):
    generate(maker.make, maker.config(1700), tmp_path, progress=False)
    before = hashes(tmp_path)
    (tmp_path / "blocks" / "00000.npy").unlink()
    tokens = tmp_path / "blocks" / "00002.tokens.npy"
    tokens.write_bytes(tokens.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"arvision eval repair --samples .*, then generate again"):
        generate(maker.make, maker.config(1700), tmp_path, progress=False)
    done = CliRunner().invoke(app, ["eval", "repair", "--samples", str(tmp_path), "--json"])
    assert json.loads(done.stdout) == {"forgotten": [0, 2]}
    assert set(ShardFolder(tmp_path).finished()) == {1, 3}
    generate(maker.make, maker.config(1700), tmp_path, progress=False)
    assert hashes(tmp_path) == before
    assert ShardFolder(tmp_path).repair() == []
    with pytest.raises(InputError, match=r"run\.json: expected the settings of a run"):
        ShardFolder(tmp_path / "none").repair()
    assert not (tmp_path / "none").exists()


def test_the_second_run_in_a_folder_says_so(whole: Path, tmp_path: Path):
    def make_and_try(indices, labels, seeds):
        with pytest.raises(InputError, match="another run works in"):
            generate(maker.make, maker.config(600), tmp_path, progress=False)
        return maker.make(indices, labels, seeds)

    generate(make_and_try, maker.config(600), tmp_path, batch_size=300, progress=False)
    generate(maker.make, maker.config(600), tmp_path, progress=False)


def test_a_missing_shard_is_reported(tmp_path: Path):
    generate(maker.make, maker.config(600), tmp_path, progress=False)
    (tmp_path / "blocks" / "00000.npy").unlink()
    with pytest.raises(InputError, match=r"00000\.npy is in the manifest but missing"):
        ShardFolder(tmp_path).check_complete()


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"seed": 1}, "seed=0"), ({"options": {"window": 4}}, "options"), ({"num": 700}, "num=600")],
)
def test_a_changed_config_is_refused(tmp_path: Path, changes: dict, word: str):
    generate(maker.make, maker.config(600), tmp_path, progress=False)
    before = hashes(tmp_path)
    with pytest.raises(InputError, match=word):
        generate(maker.make, maker.config(**{"num": 600, **changes}), tmp_path, progress=False)
    assert hashes(tmp_path) == before


def test_an_unfinished_run_is_not_scored(tmp_path: Path):
    shards = ShardFolder(tmp_path)
    shards.open(maker.config(600).to_dict())
    with pytest.raises(InputError, match="2 of 2 blocks are missing"):
        shards.check_complete()


def test_manifest_of_other_settings(tmp_path: Path):
    generate(maker.make, maker.config(600), tmp_path, progress=False)
    manifest = tmp_path / "manifest-0000.jsonl"
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    lines[0]["config"] = "0" * 16
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match="other settings"):
        ShardFolder(tmp_path).finished()


def test_prompts(tmp_path: Path):
    prompts = [f"picture {k}" for k in range(7)]
    settings = maker.config(7, num_classes=None, prompts_sha256="x")
    shards = generate(maker.make, settings, tmp_path, prompts=prompts, progress=False)
    own = maker.make([3], ["picture 3"], [(0, 3)]).images[0].permute(1, 2, 0).numpy()
    assert np.array_equal(shards.read(3, 4)[0], own)
    with pytest.raises(InputError, match="prompts for 7 images"):
        generate(maker.make, settings, tmp_path, prompts=prompts[:3], progress=False)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: maker.config(1), "at least 2"),
        (lambda: maker.config(10, num_classes=None), "num_classes or prompts"),
        (lambda: maker.config(10, options={"x": object()}).to_dict(), "JSON"),
    ],
)
def test_bad_settings(call, word: str):
    with pytest.raises(InputError, match=word):
        call()


def test_float_images_are_refused(tmp_path: Path):
    def floats(indices, labels, seeds):
        made = maker.make(indices, labels, seeds)
        made.images = made.images.float() / 255
        return made

    with pytest.raises(InputError, match="uint8"):
        generate(floats, maker.config(600), tmp_path, progress=False)
    assert not list((tmp_path / "blocks").iterdir())
