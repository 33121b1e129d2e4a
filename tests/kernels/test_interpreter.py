"""The `test_triton_*` files pass through Triton's interpreter, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from forms import slow

HERE = Path(__file__).parent
WITHOUT = ("-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:anyio")


@pytest.mark.parametrize("marks", ["not slow", slow("slow")])
def test_triton_equals_the_references(marks):
    files = sorted(str(path) for path in HERE.glob("test_triton_*.py"))
    assert len(files) == 9
    done = subprocess.run(
        # Without the plug-in of anyio, whose older releases break pytest.
        [sys.executable, "-m", "pytest", "-q", *WITHOUT, "-m", marks, *files],
        capture_output=True,
        text=True,
        cwd=HERE.parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        timeout=480,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " skipped" not in done.stdout.splitlines()[-1], done.stdout[-2000:]
