"""Writing: whole or not at all, never over what is not ours, and swept behind killed writers."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import resource
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from arvision.cli import main
from arvision.errors import CheckpointError, DiskError, InputError
from arvision.files import (
    check_out,
    check_seal,
    making_folder,
    regular_file,
    replacing,
    seal,
    sweep,
    working_in,
    write_bytes,
    write_json,
    write_text,
)
from arvision.training.saved import load_state, save_state

MANY = 300


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_appears_whole_and_alone(tmp_path, durable):
    goal = tmp_path / "new" / "table.json"
    with replacing(goal, durable=durable) as path:
        assert path.name == goal.name
        assert not goal.exists()
        path.write_text("half")
        path.write_text("whole")
    assert goal.read_text() == "whole"
    assert names(goal.parent) == {"table.json"}
    assert goal.stat().st_mode & 0o777 == 0o644


def test_an_error_keeps_the_old_file(tmp_path):
    goal = tmp_path / "a.txt"
    write_text(goal, "old")
    with contextlib.suppress(KeyError), replacing(goal) as path:
        path.write_text("half")
        raise KeyError
    assert goal.read_text() == "old"
    assert names(tmp_path) == {"a.txt"}


def test_a_link_is_followed(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "there" / "real.json")
    write_json(tmp_path / "link.json", [1])
    assert (tmp_path / "there" / "real.json").read_text() == "[\n 1\n]\n"
    assert (tmp_path / "link.json").is_symlink()


def test_writers_of_one_folder_lose_nothing(tmp_path):
    """The old writer shared `.NAME.tmp`: the second one deleted what the first had written."""
    goal, outcomes = tmp_path / "pictures", []
    ready = threading.Barrier(2)

    def export(mark: str) -> None:
        try:
            with making_folder(goal) as place:
                for number in range(MANY):
                    (place / f"{number}.txt").write_text(mark)
                    if number == MANY // 2:
                        ready.wait(30)
            outcomes.append("written")
        except InputError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=export, args=(mark,)) for mark in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes)[1] == "written"
    assert "exists and is not an empty folder" in sorted(outcomes)[0]
    assert len({path.read_text() for path in goal.iterdir()}) == 1
    assert len(names(goal)) == MANY
    assert names(tmp_path) == {"pictures"}


def test_folders_that_are_not_ours_stay(tmp_path):
    for name in (".goal.tmp", ".goal.arvision-mine", ".goal.arvision-"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "diary.txt").write_text("dear")
    with making_folder(tmp_path / "goal") as place:
        (place / "a").write_text("a")
    sweep(tmp_path)
    assert len(list(tmp_path.glob(".goal*/diary.txt"))) == 3
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        making_folder(tmp_path / "goal").__enter__()  # before any work
    with pytest.raises(InputError, match="is a folder"):
        write_text(tmp_path / "goal", "text")


def test_an_own_folder_is_replaced_at_once(tmp_path):
    goal = tmp_path / "model"

    def write(mark: str) -> None:
        with making_folder(goal, is_ours=lambda path: (path / "card").exists(), durable=True) as p:
            (p / "card").write_text(mark)
            (p / mark).write_text(mark)

    write("one")
    write("two")
    assert names(goal) == {"card", "two"}
    assert names(tmp_path) == {"model"}
    (goal / "card").unlink()
    with pytest.raises(InputError, match="expected a new name"):
        write("three")
    assert names(goal) == {"two"}


FORK = multiprocessing.get_context("fork")


def _hold(kind: str, goal: Path, ready: Any) -> None:
    """Write half of a file or folder, or stop between the two renames that replace a folder."""

    def wait() -> None:
        ready.set()
        time.sleep(60)

    rename = os.rename

    def rename_or_wait(start: Path, end: Path) -> None:
        if end == goal:
            wait()
        rename(start, end)

    if kind == "exchange":
        os.rename = rename_or_wait
    own = replacing(goal) if kind == "file" else making_folder(goal, is_ours=lambda path: True)
    with own as path:
        (path if kind == "file" else path / "part").write_text("half")
        if kind != "exchange":
            wait()


def waiting_writer(kind: str, goal: Path) -> Any:
    """A process that waits within its write."""
    ready = FORK.Event()
    child = FORK.Process(target=_hold, args=(kind, goal, ready))
    child.start()
    assert ready.wait(30)
    return child


def test_leftovers_are_swept_only_behind_the_dead(tmp_path):
    children = {kind: waiting_writer(kind, tmp_path / kind) for kind in ("file", "folder")}
    before = names(tmp_path)
    assert len(before) == 2
    write_text(tmp_path / "file", "other")  # a second writer of a name that is being written
    sweep(tmp_path)
    assert names(tmp_path) == before | {"file"}
    for child in children.values():
        child.kill()
        child.join()
    assert names(tmp_path) == before | {"file"}
    write_text(tmp_path / "file", "again")  # sweeps what had its own name
    assert len(names(tmp_path)) == 2
    sweep(tmp_path)
    assert names(tmp_path) == {"file"}


def test_a_kill_between_the_renames_loses_nothing(tmp_path):
    goal = tmp_path / "model"
    goal.mkdir()
    (goal / "old").write_text("old")
    child = waiting_writer("exchange", goal)
    child.kill()
    child.join()
    assert not goal.exists()
    sweep(tmp_path)
    assert names(goal) == {"old"}
    assert names(tmp_path) == {"model"}


LIMIT = 40_000


@pytest.fixture
def small_disk():
    """Files may not grow past `LIMIT` bytes, as on a disk that is full."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


def _safetensors(path: Path) -> None:
    with replacing(path) as temporary:
        save_file({"a": torch.zeros(LIMIT)}, temporary)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_bytes(path, bytes(2 * LIMIT)),
        lambda path: save_state(path, {"a": torch.zeros(LIMIT)}),
        _safetensors,
    ],
    ids=["bytes", "torch", "safetensors"],
)
def test_a_full_disk_is_one_line(tmp_path, small_disk, write):
    goal = tmp_path / "big"
    with pytest.raises(DiskError) as caught:
        write(goal)
    assert str(caught.value) == f"{goal} cannot be written: {os.strerror(errno.EFBIG)}"
    assert names(tmp_path) == set()


def test_a_full_disk_ends_a_command_with_one_line_and_exit_1(
    tmp_path, small_disk, monkeypatch, capsys
):
    goal = tmp_path / "a.png"
    given = (
        "arvision sample --model llamagen-fashion --prompt 1 --sampler ar --num-images 32 --quiet"
    )
    monkeypatch.setattr(sys, "argv", [*given.split(), "--out", str(goal)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"arvision: {goal} cannot be written: {os.strerror(errno.EFBIG)}"]
    assert names(tmp_path) == set()


def test_places_where_nobody_may_write(tmp_path):
    with pytest.raises(InputError, match=r"cannot be written \(File name too long\)"):
        write_text(tmp_path / ("a" * 300), "a")
    (tmp_path / "file").write_text("a")
    with pytest.raises(InputError, match="cannot be made"):
        write_text(tmp_path / "file" / "b", "b")
    assert names(tmp_path) == {"file"}


def test_a_sealed_file_tells_cut_and_changed_bytes(tmp_path):
    goal = tmp_path / "state.pt"
    state = {"a": torch.arange(5.0), "step": 3}
    save_state(goal, state)
    for mmap in (False, True):
        found = load_state(goal, "delete it", mmap=mmap)
        assert found["step"] == 3
        assert torch.equal(found["a"], state["a"])
    data = goal.read_bytes()
    changed = bytearray(data)
    changed[700] ^= 1
    for bad in (data[:-1], data[: len(data) // 2], b"", bytes(changed)):
        goal.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"state\.pt is damaged .*: delete it"):
            load_state(goal, "delete it")
    goal.write_bytes(b"abc")
    seal(goal)
    check_seal(goal, "")


def _work(folder: Path, ready: Any) -> None:
    with working_in(folder), replacing(folder / "part"):
        ready.set()
        time.sleep(60)


def test_the_second_run_in_a_folder_says_so(tmp_path):
    place = tmp_path / "run"
    ready = FORK.Event()
    child = FORK.Process(target=_work, args=(place, ready))
    child.start()
    assert ready.wait(30)
    with pytest.raises(InputError, match=r"another run works in .*run: wait until it has ended"):
        working_in(place).__enter__()
    assert len(names(place)) == 1
    child.kill()
    child.join()
    with working_in(place):
        assert names(place) == set()  # and the leftovers are swept
    with working_in(place):  # once more, since it was given back
        pass


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("a.txt", {"suffixes": (".png", ".jpg")}, "expected a name that ends in .png, .jpg"),
        ("folder", {}, "is a folder: expected a file name"),
        ("file", {"is_folder": True}, "is a file: expected a folder"),
        ("file/b.png", {}, "file is a file, expected a folder"),
        ("a" * 256, {}, "expected names of at most 255 bytes"),
        ("é" * 128 + "/b", {}, "expected names of at most 255 bytes"),
        ("locked/new/b.png", {}, "nobody may write into"),
    ],
)
def test_an_out_that_cannot_be_written_is_refused(tmp_path, monkeypatch, name, given, message):
    for folder in ("folder", "locked"):
        (tmp_path / folder).mkdir()
    (tmp_path / "file").write_text("mine")
    access = os.access  # the tests may run as root, who may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "locked")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message):
        check_out(tmp_path / name, **given)
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.setattr(os, "access", access)
    check_out(tmp_path / "new" / "a.PNG", suffixes=(".png",))
    check_out(tmp_path / "new" / "folder", is_folder=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_only_regular_files_are_opened(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    for name in ("file", "fifo"):
        (tmp_path / f"to-{name}").symlink_to(tmp_path / name)
    for name in ("file", "to-file"):
        with regular_file(tmp_path / name) as file:
            assert file.read() == b"content"
    kinds = {"fifo": "a FIFO", "to-fifo": "a FIFO", "folder": "a folder", "socket": "a socket"}
    for name, kind in kinds.items():
        with pytest.raises(InputError, match=f"{name} is {kind}: expected a regular file"):
            regular_file(tmp_path / name)
    with pytest.raises(InputError, match="is a device"):
        regular_file("/dev/zero")
    with pytest.raises(FileNotFoundError):
        regular_file(tmp_path / "missing")
    server.close()
