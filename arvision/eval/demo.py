"""The evaluation demo: several samplers of one model, scored alike, in one table and one plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import optional
from ..files import replacing, user_path, write_json, write_text
from .classifier import class_consistency
from .equivalence import TestResult, log_likelihoods, permutation_mmd, same_tokens, token_law
from .equivalence import verdict as verdict_of
from .evaluate import score_features
from .extract import FeatureSet, extract
from .features import Extractor
from .reference import Reference, load_reference
from .report import git_commit, machine, package_versions
from .score import Score
from .shards import ShardFolder
from .sources import Source

METRICS = ("frechet", "precision", "recall")


@dataclass
class Row:
    """One line of the table.

    Attributes:
        name: sampler and options, or what the images are.
        law: "exact", "lossy", or "" for real images.
        num: images scored.
        scores: by name.
        tests: against plain sampling.
        verdict: one sentence about them.
        passes: model calls per image, drawn one at a time.
        seconds: per image, drawn one at a time.
    """

    name: str
    law: str
    num: int
    scores: dict[str, Score]
    tests: list[TestResult] = field(default_factory=list)
    verdict: str = ""
    passes: float | None = None
    seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The line as JSON types."""
        own = {"name": self.name, "law": self.law, "num": self.num, "verdict": self.verdict}
        scores = {name: score.to_dict() for name, score in self.scores.items()}
        tests = [test.to_dict() for test in self.tests]
        return {
            **own,
            "passes": self.passes,
            "seconds": self.seconds,
            "scores": scores,
            "tests": tests,
        }


class Judge:
    """Scores sources with several extractors against one reference, whose features it keeps.

    Args:
        reference: real images.
        extractors: the first one's features also serve the image test.
        progress: bars on stderr while the reference is read.
    """

    def __init__(
        self, reference: Source, extractors: Sequence[Extractor], progress: bool = True
    ) -> None:
        self.extractors = list(extractors)
        self.goals: list[Reference] = []
        for network in self.extractors:
            goal = load_reference(reference, network, need_rows=True, progress=progress)
            assert goal is not None, "one process"
            self.goals.append(goal)
        _ = self.goals[0].radii  # before threads ask for it

    def score(self, source: Source) -> tuple[dict[str, Score], FeatureSet]:
        """All scores of a labelled source, and its features under the first extractor.

        Precision and recall come from the first extractor; the others add their distance. Several
        threads may score at once.
        """
        scores: dict[str, Score] = {}
        first: FeatureSet | None = None
        for network, goal in zip(self.extractors, self.goals, strict=True):
            found = extract(source, network, progress=False)
            assert found is not None, "one process"
            wanted = METRICS if first is None else METRICS[:1]
            scores |= score_features(found, goal, network, wanted)
            first = first or found
        if source.labels is not None:
            images = source.read(0, len(source))
            scores["class_consistency"] = class_consistency(images, list(source.labels))
        assert first is not None
        return scores, first


def compare(
    baseline: tuple[ShardFolder, FeatureSet],
    other: tuple[ShardFolder, FeatureSet],
    log_likelihood: Callable[[ShardFolder], np.ndarray] | None = None,
) -> tuple[list[TestResult], str]:
    """Tests of one run against plain sampling: tokens for the same seed, else laws and images."""
    (first, features_a), (second, features_b) = baseline, other
    a, b = (shards.read_tokens(0, shards.num) for shards in (first, second))
    if first.config["seed"] == second.config["seed"]:
        tests = [same_tokens(a, b)]
        share = f"{100 * tests[0].statistic:.1f} % of images have ar's very tokens"
        return tests, "same picture: all tokens are ar's" if tests[0].passed else share
    tests = [token_law(a, b)]
    if log_likelihood is not None:
        tests.append(log_likelihoods(log_likelihood(first), log_likelihood(second)))
    tests.append(permutation_mmd(features_a.features, features_b.features))
    return tests, verdict_of(tests)


def _half(score: Score) -> float:
    """Half of the 95 % interval, also where it was cut at 0."""
    if score.standard_error is not None:
        return 1.96 * score.standard_error
    assert score.interval is not None
    return (score.interval[1] - score.interval[0]) / 2


def _cell(score: Score | None, digits: int = 2) -> str:
    if score is None:
        return ""
    text = f"{score.value:.{digits}f}"
    if score.interval is not None and score.method is not None:
        text += f" ± {_half(score):.{digits}f}"
    return text


def to_table(rows: Sequence[Row], frechet: Sequence[str]) -> str:
    """Rows as a Markdown table; `frechet` names the distances to show."""
    heads = ["sampler", "law", "passes", "s per image", "speed"]
    heads += [*frechet, "precision", "recall", "class consistency", "against ar"]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join(["---"] * len(heads)) + " |"]
    base = next((row.seconds for row in rows if row.name == "ar"), None)
    for row in rows:
        speed = f"{base / row.seconds:.2f}x" if base and row.seconds else ""
        cells = [
            row.name,
            row.law,
            f"{row.passes:.1f}" if row.passes else "",
            f"{row.seconds:.3f}" if row.seconds else "",
            speed,
            *(_cell(row.scores.get(name), 3) for name in frechet),
            *(_cell(row.scores.get(name)) for name in ("precision", "recall")),
            _cell(row.scores.get("class_consistency"), 3),
            row.verdict,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Row], distance: str, path: str | Path) -> Path:
    """Quality against speed: a point per sampler, with the distance's 95 % interval."""
    with optional("plot", "the plot of quality against speed"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row in rows:
        score = row.scores.get(distance)
        if score is None:
            continue
        if row.seconds is None:
            axes.axhline(score.value, color="0.6", linestyle="--", linewidth=1)
            axes.annotate(row.name, (0.01, score.value), xycoords=("axes fraction", "data"))
            continue
        half = 0.0 if score.interval is None else _half(score)
        colour = "tab:blue" if row.law == "exact" else "tab:orange"
        axes.errorbar(1 / row.seconds, score.value, half, fmt="o", color=colour, capsize=3)
        axes.annotate(
            row.name,
            (1 / row.seconds, score.value),
            xytext=(5, 5),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set_xlabel("images per second, one at a time")
    axes.set_ylabel(f"{distance} (95 % interval), lower is better")
    axes.set_title("quality against speed: exact samplers blue, lossy ones orange", fontsize=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
    return user_path(path)


def write_demo(
    rows: Sequence[Row], judge: Judge, out: str | Path, facts: dict[str, Any]
) -> dict[str, Any]:
    """`report.json`, `report.md` and `quality-speed.png` in `out`; returns the report."""
    place = user_path(out)
    distances = [name for name in rows[0].scores if name.startswith("frechet_")]
    plot(rows, distances[0], place / "quality-speed.png")
    report = {
        "rows": [row.to_dict() for row in rows],
        **facts,
        "extractors": [network.facts.to_dict() for network in judge.extractors],
        "reference": {"name": judge.goals[0].name, "count": judge.goals[0].count},
        "machine": machine(),
        "versions": package_versions(),
        "commit": git_commit(),
    }
    write_json(place / "report.json", report, indent=2)
    title = f"# {facts['model']}: samplers compared\n\n"
    note = (
        f"{facts['num']:,} samples of each against {judge.goals[0].name} "
        f"({judge.goals[0].count:,} images). Distances are **not FID**: they compare rows of this "
        "table only. ± is half of the 95 % interval. Passes and seconds are of one image at a "
        "time.\n\n"
    )
    picture = "\n![quality against speed](quality-speed.png)\n"
    write_text(place / "report.md", title + note + to_table(rows, distances) + picture)
    return report
