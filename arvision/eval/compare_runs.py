"""All equivalence tests on two runs of `arvision eval generate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .equivalence import (
    MARGIN,
    TestResult,
    frechet_equivalence,
    log_likelihoods,
    permutation_mmd,
    same_tokens,
    token_law,
    verdict,
)
from .extract import extract
from .features import Extractor
from .frechet import frechet_jackknife
from .reference import load_reference
from .shards import ShardFolder
from .sources import ShardSource

SAME_FOR_BOTH = ("num_classes", "model", "prompts_sha256", "pixels")
BATCH = 100


def compare_runs(
    a: str | Path | ShardSource,
    b: str | Path | ShardSource,
    extractor: Extractor,
    *,
    log_likelihood: Callable[[np.ndarray, list[Any]], np.ndarray] | None = None,
    reference: Any = None,
    margin: float = MARGIN,
    progress: bool = True,
) -> tuple[list[TestResult], str]:
    """Run every test that the two runs allow, strongest first.

    Runs with the same seed are compared token by token; if they differ somewhere, or their seeds
    differ, laws are tested too. The image test needs independent seeds and is left out otherwise.

    Args:
        a: baseline: its folder, or opened.
        b: accelerated, likewise.
        extractor: of the image tests.
        log_likelihood: of tokens [n, L] with labels under the base model; None leaves that out.
        reference: for the Frechet equivalence; None leaves it out.
        margin: relative gap allowed.
        progress: bars on stderr.

    Returns:
        Results and a sentence.

    Raises:
        InputError: runs of different models or classes.
    """
    first, second = (s if isinstance(s, ShardSource) else ShardSource(s) for s in (a, b))
    for key in SAME_FOR_BOTH:
        values = first.shards.config.get(key), second.shards.config.get(key)
        if values[0] != values[1]:
            raise InputError(
                f"{first.name} has {key}={values[0]!r}, {second.name} {values[1]!r}: expected the same"
            )
    same_seed = first.shards.config["seed"] == second.shards.config["seed"]
    results: list[TestResult] = []
    if all(s.shards.tokens_path(0).exists() for s in (first, second)):
        results += _token_tests(first.shards, second.shards, same_seed, log_likelihood)
        if results and results[0].name == "same tokens" and results[0].passed:
            return results, verdict(results)
    found = [extract(s, extractor, progress=progress) for s in (first, second)]
    sides = [f for f in found if f is not None and f.features is not None]
    assert len(sides) == 2, "one process"
    if not same_seed:
        results.append(permutation_mmd(sides[0].features, sides[1].features))
    if reference is not None:
        goal = load_reference(
            reference, extractor, need_rows=False, progress=progress, allow_jpeg=True
        )
        assert goal is not None, "one process"
        distances = [frechet_jackknife(s.parts, goal.mean, goal.covariance) for s in sides]
        results.append(frechet_equivalence(distances[0], distances[1], margin))
    return results, verdict(results)


def _token_tests(
    first: ShardFolder,
    second: ShardFolder,
    same_seed: bool,
    log_likelihood: Callable[[np.ndarray, list[Any]], np.ndarray] | None,
) -> list[TestResult]:
    """Tests on tokens; those of laws only where tokens are integers (not MAR's latents)."""
    a, b = (s.read_tokens(0, s.num) for s in (first, second))
    results = []
    if same_seed and len(a) == len(b):
        results.append(same_tokens(a, b))
        if results[0].passed:
            return results
    if not np.issubdtype(a.dtype, np.integer):
        return results
    results.append(token_law(a, b))
    if log_likelihood is not None:
        classes = first.config["num_classes"]
        if classes is None:
            raise InputError(
                "the likelihood test takes class labels: expected runs without prompts"
            )
        sides = []
        for tokens in (a, b):
            labels = [i % classes for i in range(len(tokens))]
            pieces = [
                log_likelihood(tokens[i : i + BATCH], labels[i : i + BATCH])
                for i in range(0, len(tokens), BATCH)
            ]
            sides.append(np.concatenate(pieces))
        results.append(log_likelihoods(*sides))
    return results
