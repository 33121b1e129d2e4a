"""Run the core tests on the oldest packages that `pyproject.toml` declares: `make test-floor`.

By hand, since it installs torch a second time (about 6 GB): `.venv-floor` gets the declared minimum
of every dependency, and what these themselves need as pip chooses it. A floor that fails is raised
in `pyproject.toml`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    import tomllib  # pyright: ignore[reportMissingImports]
except ImportError:  # Python 3.10
    tomllib = None

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("eval", "train", "text", "plot")
TOOLS = ("pytest>=8", "pytest-xdist>=3.5")
CORE = (
    *("test_assets.py", "test_checkpoint.py", "test_cli.py", "test_conformance.py"),
    *("test_dependencies.py", "test_files.py", "test_folders.py", "test_front_door.py"),
    *("test_pipeline.py", "decoding", "eval", "kernels", "models", "samplers", "text"),
)
"""Tests and folders of tests of the core; documents and training are left to `make test`."""


def declared(project: dict) -> list[str]:
    """Every requirement of the package and its extras, such as "torch>=2.6"."""
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *(line for extra in EXTRAS for line in extras[extra])]


def floors(requirements: list[str]) -> list[str]:
    """The same, each pinned to its minimum.

    Raises:
        ValueError: one without a minimum.
    """
    pinned = []
    for line in requirements:
        found = re.fullmatch(r"([\w.-]+)\s*[>=]=\s*([\w.]+)", line)
        if found is None:
            raise ValueError(f"{line!r} declares no minimum")
        pinned.append(f"{found[1]}=={found[2]}")
    return sorted(set(pinned))


def main() -> int:
    """Install, say what was installed, test."""
    parser = argparse.ArgumentParser(description="The core tests on the oldest packages.")
    parser.add_argument("--env", type=Path, default=ROOT / ".venv-floor")
    parser.add_argument("--no-install", action="store_true", help="the environment is there")
    parser.add_argument("tests", nargs="*", default=CORE, help="below tests/; the core if none")
    chosen = parser.parse_args()
    if tomllib is None:
        parser.error("Python 3.11 or newer reads pyproject.toml")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = floors(declared(project))
    python = chosen.env / "bin" / "python"
    if not chosen.no_install:
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", chosen.env], check=True)
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as limits:
            limits.write("\n".join(pins))
            limits.flush()
            pip = [python, "-m", "pip", "install", "--quiet", "-c", limits.name, *TOOLS]
            subprocess.run([*pip, "-e", f"{ROOT}[{','.join(EXTRAS)}]"], check=True)
    print("floors:", *pins, flush=True)
    marks = "not slow and not gpu and not network"
    # Old libraries warn of what others no longer do; that is between them.
    quiet = ["-p", "no:anyio", "-o", "filterwarnings="]
    names = [f"tests/{name}" for name in chosen.tests]
    test = [python, "-m", "pytest", "-q", *quiet, "-m", marks, *names]
    return subprocess.run(test, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
