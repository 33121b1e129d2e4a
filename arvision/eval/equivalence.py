"""Is an accelerated sampler equal to its baseline? Tests in order of strength.

1. tokens: the share of images with the very same tokens (for couplings that promise that);
2. token law: a two-sample G-test at every position, Holm-corrected;
3. log-likelihood of the sequences under the base model: Kolmogorov-Smirnov and means;
4. images: a permutation test on the maximum mean discrepancy of features (independent seeds only),
   and equivalence of the Frechet distances within a margin.

1 shows equality; 2 to 4 can only fail to find a difference, so each says how large one it
would have found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from ..errors import InputError, optional
from .moments import check_features
from .score import Score
from .scores import polynomial_kernel

with optional("eval", "a test of equivalence"):
    from scipy import stats as _scipy_stats

stats: Any = _scipy_stats  # its stubs lack the results' fields
ALPHA = 0.01
MARGIN = 0.013  # relative gap of FIDs that retraining and reseeding make (arXiv 2606.20536)


@dataclass
class TestResult:
    """One test.

    Attributes:
        name: of the test.
        passed: whether it found no difference (or, for equivalence, showed closeness).
        p_value: of the null hypothesis, or None.
        statistic: its figure.
        num: samples of each side.
        meaning: in words.
        details: further figures.
    """

    __test__ = False
    name: str
    passed: bool
    p_value: float | None
    statistic: float
    num: int
    meaning: str
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON types."""
        return asdict(self)


def _tokens(a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(a), np.asarray(b)
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        shapes = f"{list(first.shape)} and {list(second.shape)}"
        raise InputError(f"tokens of shape {shapes}: expected [N, L] and [M, L]")
    if not (np.issubdtype(first.dtype, np.integer) and np.issubdtype(second.dtype, np.integer)):
        raise InputError(f"tokens of dtype {first.dtype} and {second.dtype}: expected integers")
    return first, second


def same_tokens(a: Any, b: Any) -> TestResult:
    """Share of images whose tokens [N, ...] are all equal, for runs with the same seeds."""
    first, second = (np.asarray(x) for x in (a, b))
    if first.shape != second.shape:
        raise InputError(f"tokens of shape {first.shape} and {second.shape}: expected the same")
    first, second = (x.reshape(len(x), -1) for x in (first, second))
    equal = (first == second).all(1)
    share = float(equal.mean())
    return TestResult(
        "same tokens",
        share == 1.0,
        None,
        share,
        len(first),
        f"{int(equal.sum())} of {len(first)} images have the very same tokens",
        {"equal_tokens": float((first == second).mean())},
    )


def g_test(counts_a: Any, counts_b: Any, smallest: float = 5.0) -> tuple[float, float, int]:
    """Two-sample G-test of counts [V], with cells pooled until each expects at least `smallest`.

    Returns:
        Statistic, p-value, degrees of freedom (p is 1 where one cell is left).
    """
    a, b = np.asarray(counts_a, dtype=float), np.asarray(counts_b, dtype=float)
    pooled = a + b
    share = min(a.sum(), b.sum()) / pooled.sum()
    order = np.argsort(pooled)[::-1]
    rare = pooled[order] * share < smallest
    big = order[~rare]
    cells_a, cells_b = list(a[big]), list(b[big])
    rest_a, rest_b = a.sum() - sum(cells_a), b.sum() - sum(cells_b)
    if rest_a + rest_b > 0:
        if (rest_a + rest_b) * share >= smallest or not cells_a:
            cells_a.append(rest_a)
            cells_b.append(rest_b)
        else:
            cells_a[-1] += rest_a
            cells_b[-1] += rest_b
    if len(cells_a) < 2:
        return 0.0, 1.0, 0
    found = stats.chi2_contingency([cells_a, cells_b], correction=False, lambda_="log-likelihood")
    return float(found.statistic), float(found.pvalue), int(found.dof)


def g_test_law(counts: Any, law: Any, smallest: float = 5.0) -> tuple[float, float, int]:
    """One-sample G-test of counts [K] against probabilities [K], with pooled rare cells.

    Returns:
        Statistic, p-value, degrees of freedom (p is 1 where one cell is left).
    """
    observed, law = np.asarray(counts, dtype=float), np.asarray(law, dtype=float)
    expected = law / law.sum() * observed.sum()
    big = expected >= smallest
    cells = [np.append(x[big], x[~big].sum()) for x in (observed, expected)]
    if cells[1][-1] <= 0 and cells[0][-1] > 0:
        return float("inf"), 0.0, int(big.sum())
    if cells[1][-1] < smallest:  # too little for a cell of its own: into the smallest one
        rest = int(np.argmin(cells[1][:-1]))
        for x in cells:
            x[rest] += x[-1]
        cells = [x[:-1] for x in cells]
    observed, expected = cells
    if len(observed) < 2:
        return 0.0, 1.0, 0
    found = stats.power_divergence(observed, expected, lambda_="log-likelihood")
    return float(found.statistic), float(found.pvalue), len(observed) - 1


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm-adjusted p-values. Paper: Holm 1979."""
    values = np.asarray(p_values)
    order = np.argsort(values)
    steps = np.maximum.accumulate(values[order] * (len(values) - np.arange(len(values))))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(steps, 1.0)
    return adjusted


def token_law(a: Any, b: Any, alpha: float = ALPHA) -> TestResult:
    """G-test of the token law at every position of tokens [N, L] and [M, L], Holm-corrected.

    The sides must be independent of each other: with the same seeds they are not, the test then
    finds too few differences.
    """
    first, second = _tokens(a, b)
    size = int(max(first.max(), second.max())) + 1
    p_values = []
    for position in range(first.shape[1]):
        one, other = (np.bincount(s[:, position], minlength=size) for s in (first, second))
        p_values.append(g_test(one, other)[1])
    adjusted = holm(p_values)
    worst, num = int(np.argmin(adjusted)), min(len(first), len(second))
    return TestResult(
        "token law per position",
        bool(adjusted.min() >= alpha),
        float(adjusted.min()),
        float((adjusted < alpha).sum()),
        num,
        f"{int((adjusted < alpha).sum())} of {len(adjusted)} positions differ at {alpha:g} (Holm)",
        {"worst_position": worst, "combined_p": float(stats.combine_pvalues(p_values).pvalue)},
    )


def log_likelihoods(a: Any, b: Any, alpha: float = ALPHA) -> TestResult:
    """Kolmogorov-Smirnov and Welch's t on the log-likelihoods [N] and [M] of sequences.

    The likelihood is the base model's, for both sides.
    """
    first, second = (np.asarray(x, dtype=float) for x in (a, b))
    if min(len(first), len(second)) < 2 or not np.isfinite([first.sum(), second.sum()]).all():
        raise InputError("log-likelihoods: expected at least 2 finite numbers on each side")
    shape = stats.ks_2samp(first, second)
    mean = stats.ttest_ind(first, second, equal_var=False)
    p_value = min(1.0, 2 * min(float(shape.pvalue), float(mean.pvalue)))
    gap = float(first.mean() - second.mean())
    error = float((first.var(ddof=1) / len(first) + second.var(ddof=1) / len(second)) ** 0.5)
    return TestResult(
        "log-likelihood",
        p_value >= alpha,
        p_value,
        float(shape.statistic),
        min(len(first), len(second)),
        f"means differ by {gap:.3f} nats, with a standard error of {error:.3f}",
        {"ks_p": float(shape.pvalue), "mean_p": float(mean.pvalue), "mean_gap": gap},
    )


def permutation_mmd(
    a: Any,
    b: Any,
    *,
    num_permutations: int = 500,
    max_rows: int = 1000,
    seed: int = 0,
    alpha: float = ALPHA,
) -> TestResult:
    """Permutation test on the unbiased MMD of features [N, D] and [M, D].

    Rows are scaled by the pooled spread first. For independent seeds only: pairs with the same
    seed make the MMD negative and the test blind.

    Paper: Gretton et al. 2012, "A Kernel Two-Sample Test", section 5.
    """
    first, second = check_features(a)[:max_rows], check_features(b)[:max_rows]
    if min(len(first), len(second)) < 2 or first.shape[1] != second.shape[1]:
        shapes = f"{list(first.shape)} and {list(second.shape)}"
        raise InputError(f"features of shape {shapes}: expected 2 rows of one width")
    rows = torch.cat([first, second])
    rows = (rows - rows.mean(0)) / rows.std(0).clamp_min(1e-12)
    kernel = polynomial_kernel(rows.shape[1])(rows, rows).fill_diagonal_(0.0)
    count, other = len(first), len(second)
    total = float(kernel.sum())

    def statistic(sides: torch.Tensor) -> torch.Tensor:
        product = kernel @ sides
        across, crossing = (sides * product).sum(0), ((1 - sides) * product).sum(0)
        rest = total - across - 2 * crossing
        within = across / (count * (count - 1)) + rest / (other * (other - 1))
        return within - 2 * crossing / (count * other)

    draw = torch.Generator().manual_seed(seed)
    own = torch.zeros(len(rows), 1, dtype=torch.float64)
    own[:count] = 1
    observed = float(statistic(own))
    shuffled = torch.stack(
        [own[torch.randperm(len(rows), generator=draw), 0] for _ in range(num_permutations)], 1
    )
    null = statistic(shuffled)
    p_value = (1 + int((null >= observed).sum())) / (1 + num_permutations)
    return TestResult(
        "permutation MMD",
        p_value >= alpha,
        p_value,
        observed,
        min(count, other),
        f"MMD {observed:.2e}; 95 % of {num_permutations} shuffles lie below "
        f"{float(null.quantile(0.95)):.2e}",
    )


def frechet_equivalence(a: Score, b: Score, margin: float = MARGIN) -> TestResult:
    """Two one-sided tests: do two distances differ by less than a relative `margin`?

    Passing shows closeness; failing may just mean too few samples, and `details["needed"]` says
    how small the standard error would have to be.

    Paper: Schuirmann 1987, "A comparison of the two one-sided tests procedure".
    """
    if a.standard_error is None or b.standard_error is None:
        raise InputError("expected distances with standard errors (a jackknife)")
    gap, allowed = b.value - a.value, margin * a.value
    error = (a.standard_error**2 + b.standard_error**2) ** 0.5
    low, high = gap - 1.6449 * error, gap + 1.6449 * error
    p_value = float(
        max(stats.norm.sf((gap + allowed) / error), stats.norm.cdf((gap - allowed) / error))
    )
    return TestResult(
        "Frechet equivalence",
        bool(-allowed < low and high < allowed),
        p_value,
        gap,
        min(a.num_images, b.num_images),
        f"distances {a.value:.3f} and {b.value:.3f}: gap {gap:+.3f} (90 %: {low:+.3f} to "
        f"{high:+.3f}), allowed {allowed:.3f}",
        {"margin": margin, "standard_error": error, "needed": allowed / 2 / 1.6449},
    )


def verdict(results: Sequence[TestResult]) -> str:
    """One sentence from all tests."""
    by_name = {result.name: result for result in results}
    same = by_name.get("same tokens")
    if same is not None and same.passed:
        return "equal: every image has the very same tokens"
    tests = [r for r in results if r.name not in ("same tokens", "Frechet equivalence")]
    failed = [r.name for r in tests if not r.passed]
    if failed:
        return f"different: {', '.join(failed)}"
    if not tests:
        return "undecided: no test of the law was run"
    return f"no difference found by {', '.join(r.name for r in tests)}"
