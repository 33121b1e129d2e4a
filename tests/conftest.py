"""Shared fixtures; small models run fastest on one thread."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

torch.set_num_threads(1)
GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _free_precision():
    """Accelerate keeps the precision of its first use; a test shall not inherit another's."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


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
