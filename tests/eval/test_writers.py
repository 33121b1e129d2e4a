"""Exports: nothing lost between two of them, nothing of the user's deleted, every picture counted."""

from __future__ import annotations

import threading

import pytest
import torch

from arvision.errors import InputError
from arvision.eval.sources import TensorSource
from arvision.eval.writers import export_layout, write_pictures

NUM = 40


class SlowSource(TensorSource):
    """Pictures of one grey level; waits for the other export halfway."""

    def __init__(self, level: int, meeting: threading.Barrier) -> None:
        super().__init__(torch.full((NUM, 3, 8, 8), level, dtype=torch.uint8))
        self.meeting = meeting

    def read(self, start, stop):
        self.meeting.wait(30)
        return super().read(start, stop)


def test_two_exports_to_one_name_lose_nothing(tmp_path):
    goal, outcomes, meeting = tmp_path / "pictures", [], threading.Barrier(2)

    def export(level: int) -> None:
        try:
            outcomes.append(str(write_pictures(SlowSource(level, meeting), goal)))
        except (InputError, OSError) as error:
            outcomes.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=export, args=(level,)) for level in (10, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name for path in goal.iterdir()) == [f"{k:06d}.png" for k in range(NUM)]
    assert len({path.read_bytes() for path in goal.iterdir()}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]
    assert sorted(outcomes) == sorted(
        [str(goal), f"InputError: {goal} exists and is not an empty folder: expected a new name"]
    )


def test_a_folder_of_the_user_stays(tmp_path):
    mine = tmp_path / ".pictures.tmp"
    mine.mkdir()
    (mine / "diary.txt").write_text("dear")
    write_pictures(TensorSource(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)), tmp_path / "pictures")
    assert (mine / "diary.txt").read_text() == "dear"


def test_two_records_of_one_name_are_refused_before_a_picture_is_lost(tmp_path):
    source = TensorSource(torch.zeros(8, 3, 8, 8, dtype=torch.uint8))
    records = [{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x"}]
    with pytest.raises(InputError, match="2 dpg-bench records have the id 'x'"):
        export_layout("dpg-bench", source, records, tmp_path / "out", per_prompt=4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name",
    [
        "../up",
        "/tmp/arvision-absolute",
        "a/b",
        "a\\b",
        "..",
        ".",
        "",
        " x",
        "x.",
        "nul",
        "COM1.x",
        "a" * 201,
        "a\0b",
        "c:d",
    ],
)
@pytest.mark.parametrize("layout", ["hpsv2", "dpg-bench"])
def test_names_from_data_do_not_climb(tmp_path, layout, name):
    field, per_prompt = {"hpsv2": ("style", 1), "dpg-bench": ("id", 4)}[layout]
    source = TensorSource(torch.zeros(2 * per_prompt, 3, 8, 8, dtype=torch.uint8))
    records = [{"prompt": "a", field: "fine-1 (x)"}, {"prompt": "b", field: name}]
    goal = tmp_path / "inner" / "out"
    with pytest.raises(
        InputError, match=f"record 1 has the {field} .*: expected a plain file name"
    ):
        export_layout(layout, source, records, goal, per_prompt=per_prompt)
    assert not list(tmp_path.iterdir())
    records[1][field] = "fine-2"
    export_layout(layout, source, records, goal, per_prompt=per_prompt)
    assert len([p for p in goal.rglob("*") if p.is_file()]) == 2
