"""Code in the documentation runs, and what it names exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEEDS_OFFICIAL_FILES = ("from_official(",)


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), flags=re.DOTALL)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run(page, tmp_path):
    runnable = [b for b in blocks(page, "python") if not any(n in b for n in NEEDS_OFFICIAL_FILES)]
    if not runnable:
        return
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(runnable)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_commands_in_the_readme_are_known():
    from typer.main import get_command

    from arvision.cli import app

    known = get_command(app)
    text = (ROOT / "README.md").read_text()
    lines = re.findall(r"^arvision (.*)$", text, flags=re.MULTILINE)
    assert lines
    for line in lines:
        words = line.split()
        command = known
        while words and words[0] in getattr(command, "commands", {}):
            command = vars(command)["commands"][words.pop(0)]
        options = {name for parameter in command.params for name in parameter.opts}
        for word in words:
            if word.startswith("--"):
                assert word.split("=")[0] in options, f"{word} in: arvision {line}"


@pytest.mark.parametrize(
    "example", ["sample", "same_picture", "swap_the_sampler", "your_own_model"]
)
def test_examples_run(example, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{example}.py")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout
