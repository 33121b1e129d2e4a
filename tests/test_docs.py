"""Code in the documentation runs, and what it names exists."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from arvision import list_samplers

ROOT = Path(__file__).resolve().parent.parent
NEEDS_OFFICIAL_FILES = ("from_official(", "zai-org/GLM-Image")
"""What blocks hold that need the authors' files; `test_image_pipeline.py` runs those of the README
that name repositories, on tiny models."""


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), flags=re.DOTALL)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = [
    path
    for path in sorted((ROOT / "examples").glob("*.py"))
    # One asks for the authors' files, the other for Ray; tests/serving/test_ray_slow.py runs that.
    if path.name not in ("official_checkpoint.py", "ray_serve.py")
]

RUNNER = """
import contextlib, io, json, sys, traceback

found = {}
for name, source in json.load(sys.stdin):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            exec(compile(source, name, "exec"), {"__name__": "__main__", "__file__": name})
        except BaseException:
            found[name] = {"failed": traceback.format_exc()}
            continue
    found[name] = {"printed": printed.getvalue()}
print(json.dumps(found))
"""


def run_all(sources: list[tuple[str, str]], folder: Path) -> dict[str, dict[str, str]]:
    """Run programs one after the other in one new process, each with names of its own."""
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(sources),
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=400,
        check=True,
    )
    return json.loads(done.stdout)


def test_python_blocks_and_examples_run(tmp_path):
    sources = []
    for page in PAGES:
        found = blocks(page, "python")
        runnable = [b for b in found if not any(name in b for name in NEEDS_OFFICIAL_FILES)]
        sources.append((page.name, "\n".join(runnable)))
    sources += [(str(example), example.read_text()) for example in EXAMPLES]
    assert {Path(name).stem for name, source in sources if source} >= {
        *("README", "extending", "evaluation", "mar", "var", "text", "kernels", "distillation"),
        *("sample", "same_picture", "swap_the_sampler", "your_own_model"),
    }
    sources.append(("a page that fails", "import arvision\nassert arvision.nothing"))
    found = run_all(sources, tmp_path)
    assert "no attribute 'nothing'" in found.pop("a page that fails")["failed"]
    assert len(found) == len(PAGES) + len(EXAMPLES)
    failed = [one["failed"] for one in found.values() if "failed" in one]
    assert not failed, "\n".join(failed)
    assert all(found[str(example)]["printed"] for example in EXAMPLES)


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


def test_the_site_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    assert "ARPipeline" in (tmp_path / "site" / "api" / "index.html").read_text()


def test_every_sampler_has_a_page_with_a_picture():
    pages = ROOT / "docs" / "samplers"
    names = {str(name) for name in list_samplers()}
    assert {path.stem for path in pages.glob("*.md")} == names
    for name in names:
        text = (pages / f"{name}.md").read_text()
        assert text.startswith(f"# `{name}`: ")
        assert f"](../images/samplers/{name}.png)" in text
        assert (ROOT / "docs" / "images" / "samplers" / f"{name}.png").stat().st_size > 5000
