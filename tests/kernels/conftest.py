"""Triton against the references: natively on a GPU, else in a child process by the interpreter.

Triton reads TRITON_INTERPRET when it is imported, and importing the package imports Triton; so
`test_interpreter.py` starts a process that runs the `test_triton_*` files with the variable set.
Without it these files are `gpu` tests.
"""

from __future__ import annotations

import pytest
import torch

from arvision.kernels.dispatch import is_interpreted


def pytest_collection_modifyitems(items):
    if is_interpreted():
        return
    for item in items:
        if item.path.parent.name == "kernels" and item.path.name.startswith("test_triton_"):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device is present"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if is_interpreted() else "cuda")


@pytest.fixture
def _poisoned():
    """Fresh memory holds NaN, or the largest integer: an output that is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore
    yield
    torch.use_deterministic_algorithms(False)
