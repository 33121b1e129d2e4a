"""The file of cost tables: what is damaged is measured anew, what is not ours stays, nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import warnings

import pytest

from arvision import get_sampler
from arvision.decoding import window
from arvision.decoding.costs import FORMAT, KIND, CostFile
from arvision.testing import tiny_llamagen

pytestmark = pytest.mark.filterwarnings("ignore:cost table")

WINDOWS = [1, 4, 8]
TABLE = {1: [[1, w, 0.5 * w, 1.0] for w in WINDOWS]}


@pytest.fixture(scope="module")
def model():
    return tiny_llamagen(grid=(3, 3))


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setattr(window, "_MEASURED", {})


def draw(model, file):
    sampler = get_sampler("sjd", window="auto", cost_file=str(file))
    return sampler(model, [0], seeds=[0]).stats.cost_table


def content(tables, **changes):
    return json.dumps({"kind": KIND, "format": FORMAT, "tables": tables} | changes, indent=1)


DAMAGES = {
    "nan": [[1, 1, float("nan"), 1.0], *TABLE[1][1:]],
    "infinite": [[1, 1, float("inf"), 1.0], *TABLE[1][1:]],
    "huge": [[1, 1, 10**400, -(10**400)], *TABLE[1][1:]],
    "negative": [*TABLE[1][:2], [1, 8, -4.0, 1.0]],
    "zero gain": [*TABLE[1][:2], [1, 8, 4.0, 0]],
    "short row": [*TABLE[1][:2], [1, 8, 4.0]],
    "missing row": TABLE[1][:2],
    "double row": [*TABLE[1][:2], TABLE[1][1]],
    "window 0": [[1, 0, 0.5, 1.0], *TABLE[1][1:]],
    "window -1": [[1, -1, 0.5, 1.0], *TABLE[1][1:]],
    "window 1.5": [[1, 1.5, 0.5, 1.0], *TABLE[1][1:]],
    "other images": [[2, w, 1.0, 1.0] for w in WINDOWS],
    "texts": [[str(n) for n in row] for row in TABLE[1]],
    "booleans": [[True, w, 1.0, 1.0] for w in WINDOWS],
    "null": None,
    "number": 3,
    "nested": [[[1], [1], [1], [1]]] * 3,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_table_is_left_out_with_a_warning(tmp_path, name):
    file = tmp_path / "costs.json"
    file.write_text(content({"key": {"1": DAMAGES[name]}, "whole": TABLE}))
    with pytest.warns(UserWarning, match="costs.json: the file holds a table that cannot be used"):
        assert CostFile(file).read("key", WINDOWS) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CostFile(file).read("whole", WINDOWS) == TABLE


@pytest.mark.parametrize(
    "text",
    [
        content({}, format=1),
        content({}, format="newer"),
        content([]),
        content({"key": TABLE})[:-30],
        "{",
        json.dumps({"key": {"1": [[1, 1, 1, 1]]}}),
    ],
)
def test_another_format_and_a_torn_file_are_measured_anew(model, tmp_path, text):
    file = tmp_path / "costs.json"
    file.write_text(text)
    with pytest.warns(UserWarning, match="costs.json: the file cannot be read"):
        table = draw(model, file)
    window._MEASURED.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw(model, file) == table, "read from the file, which is whole again"


def test_numbers_that_were_changed_in_a_real_file_are_measured_anew(model, tmp_path):
    file = tmp_path / "costs.json"
    draw(model, file)
    saved = json.loads(file.read_text())
    for tables in saved["tables"].values():
        tables["1"][0][2] = float("nan")
    file.write_text(json.dumps(saved))
    window._MEASURED.clear()
    with pytest.warns(UserWarning, match="costs.json"):
        table = draw(model, file)
    assert all(number > 0 for row in table for number in row[:4])
    assert "NaN" not in file.read_text()


@pytest.mark.parametrize(
    "text",
    [
        "my notes",
        "[1, 2]",
        '{"a": 1}',
        '{"a": {"b": []}}',
        "3",
        "null",
        "\x00\xff",
        '{"kind": "x"}',
        "{}",
        "[" * 100_000,
        f'{{"kind": "{KIND}"}}',
    ],
)
def test_a_file_that_is_no_cost_table_stays(model, tmp_path, text):
    file = tmp_path / "notes.txt"
    file.write_text(text)
    with pytest.warns(UserWarning, match=r"notes.txt \(this is no cost table"):
        draw(model, file)
    assert file.read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_pipes_and_folders_do_not_hang(model, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.warns(UserWarning, match="not saved"):
            draw(model, tmp_path / name)


SAVE = """
import sys
from arvision.decoding.costs import CostFile
path, table, windows = eval(sys.argv[1])
for number in range(int(sys.argv[2]), int(sys.argv[2]) + 10):
    CostFile(path).add(f"key {number}", table, windows)
"""


def test_processes_and_threads_at_once_lose_nothing(tmp_path):
    file = tmp_path / "costs.json"
    arguments = repr((str(file), TABLE, WINDOWS))
    processes = [
        subprocess.Popen([sys.executable, "-c", SAVE, arguments, str(start)]) for start in (0, 10)
    ]

    def save(number):
        CostFile(file).add(f"key {number}", TABLE, WINDOWS)

    threads = [threading.Thread(target=save, args=(number,)) for number in range(20, 32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait() for process in processes] == [0, 0]
    saved = json.loads(file.read_text())["tables"]
    assert sorted(saved) == sorted(f"key {number}" for number in range(32))
    assert [path.name for path in tmp_path.iterdir()] == ["costs.json"]


def test_the_first_to_save_has_the_last_word(tmp_path):
    file = CostFile(tmp_path / "costs.json")
    assert file.add("key", TABLE, WINDOWS) == TABLE
    later = {n: [[n, w, 9.0, 1.0] for w in WINDOWS] for n in (1, 4)}
    assert file.add("key", later, WINDOWS) == {1: TABLE[1], 4: later[4]}
    assert file.read("key", WINDOWS) == {1: TABLE[1], 4: later[4]}
