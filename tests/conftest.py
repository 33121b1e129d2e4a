"""Shared fixtures; small models run fastest on one thread.

A test sees the files of this repository only, whatever the machine holds: the environment below
names the piece of Fashion-MNIST that lies beside the tests and empty caches of weights, and
`offline/sitecustomize.py` closes the network, here and in the processes that tests start.
"""

from __future__ import annotations

import os
import runpy
import shutil
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CACHES = tempfile.mkdtemp(prefix="arvision-tests-")
os.environ |= {
    "ARVISION_FASHION_MNIST": str(HERE / "data" / "fashion-mnist"),
    "PYTHONPATH": os.pathsep.join(
        filter(None, [str(HERE / "offline"), os.environ.get("PYTHONPATH")])
    ),
    **dict.fromkeys(("HF_HOME", "HF_HUB_CACHE", "TORCH_HOME"), CACHES),
}

network = runpy.run_path(str(HERE / "offline" / "sitecustomize.py"))

# Libraries read the environment when they are imported.
import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402

torch.set_num_threads(1)
GOLDENS = HERE / "goldens"


LONGEST = (
    "kernels/test_interpreter.py",
    "text/test_fitting.py",
    "test_compiled.py",
    "decoding/test_reads.py",
    "test_docs.py",
    "test_notebooks.py",
    "test_cli.py",
    "eval/test_commands.py",
    "test_image_pipeline.py",
)
"""Files that begin first, so that at the end no process is left with one of them alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]):
    order = {HERE / name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_sessionfinish():
    shutil.rmtree(CACHES, ignore_errors=True)


@pytest.fixture(autouse=True)
def _network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    if request.node.get_closest_marker("network"):
        monkeypatch.setenv(network["VARIABLE"], "1")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _free_precision():
    """Accelerate keeps the precision of its first use; a test shall not inherit another's."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@dataclass
class Ended:
    """What a command left, as `subprocess.run` tells it."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs `arvision ARGUMENTS` from its entry point, in this process: imports cost seconds."""
    from arvision.cli import main

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["arvision", *map(str, arguments)])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
            main()
        code = end.value.code
        assert code is None or isinstance(code, int)
        out, err = capsys.readouterr()
        return Ended(code or 0, str(out), str(err))

    return run


@pytest.fixture(scope="session")
def goldens() -> Path:
    return GOLDENS


@pytest.fixture(scope="session")
def fashion():
    """The embedded class-conditional pipeline, float32."""
    import arvision

    return arvision.load("llamagen-fashion", device="cpu")


@pytest.fixture(scope="session")
def tiny_pipeline():
    """A pipeline around a tiny random network."""
    from arvision import ARPipeline
    from arvision.testing import tiny_llamagen

    return ARPipeline.from_model(tiny_llamagen())
