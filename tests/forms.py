"""The short form of a test, which always runs, and the long one, which runs with the slow tests.

A test of a law sees a fault of 10 % in 25,000 draws as well as one of 5 % in 100,000: the deviation
counts squared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

import pytest

SHORT, LONG = 25_000, 100_000
"""Draws of a test of a law."""


def slow(*values: Any, id: str | None = None) -> Any:
    """A row of parameters that runs with the slow tests."""
    return pytest.param(*values, marks=pytest.mark.slow, id=id)


by_draws = pytest.mark.parametrize("num", [pytest.param(SHORT, id="short"), slow(LONG, id="long")])
"""Gives a test of a law its number of draws."""

by_fault = pytest.mark.parametrize(
    ("num", "off"), [pytest.param(SHORT, 0.1, id="short"), slow(LONG, 0.05, id="long")]
)
"""Gives a test of a mutant the number of draws, and how far the mutant is off."""


def short_where(is_short: Callable[..., bool], cases: Iterable[Sequence[Any]]) -> list[Any]:
    """Rows of parameters, those slow for which `is_short` is false."""
    return [pytest.param(*case) if is_short(*case) else slow(*case) for case in cases]


def covered(*axes: Iterable[Any]) -> list[Any]:
    """All combinations, those slow that no value needs: each value of an axis has a short one."""
    listed = [list(axis) for axis in axes]
    most = max(map(len, listed))
    needed = [[axis[at % len(axis)] for axis in listed] for at in range(most)]
    return short_where(lambda *case: list(case) in needed, product(*listed))
