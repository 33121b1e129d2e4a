"""`arvision eval demo`: every sampler of a Fashion-MNIST model, drawn, scored and compared."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import typer

from .fashion import FashionFolder
from .output import expanded, tell

EPILOG = """Example:

arvision eval demo --out out/eval-demo
"""


@dataclass(frozen=True)
class Entry:
    """A sampler of the demo.

    Attributes:
        name: in the table.
        sampler: registered name.
        options: of the sampler.
        seed: of the samples; ar's own only where the very same pictures are promised.
        draw: options for drawing many at once that change no law, only the time.
    """

    name: str
    sampler: str
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 1
    draw: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return self.name.replace(" ", "-")


def plan(samplers: list[str]) -> list[Entry]:
    """Plain sampling, the three couplings of sjd, and what else there is with its defaults."""
    small = {"window": 2}
    known = [
        Entry("ar", "ar", seed=0),
        Entry("sjd gumbel", "sjd", {"coupling": "gumbel"}, 0, small),
        Entry("sjd maximal", "sjd", {"coupling": "maximal"}, draw=small),
        Entry("sjd independent", "sjd", {"coupling": "independent"}, draw=small),
    ]
    # On a CPU a window of 8 is as fast as these samplers' 16, and cheaper in a batch.
    windowed = [name for name in ("gsd", "lantern") if name in samplers]
    known += [Entry(f"{name} window 8", name, {"window": 8}) for name in windowed]
    known += [Entry("draft", "draft", draw={"max_draft": 1}), Entry("pjd", "pjd", draw=small)]
    done = {entry.sampler for entry in known}
    others = [Entry(name, name) for name in samplers if name not in done]
    return [entry for entry in known if entry.sampler in samplers] + others


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder; a broken-off run goes on.", callback=expanded)
    ] = Path("out/eval-demo"),
    model: Annotated[str, typer.Option(help="A class-conditional Fashion-MNIST model.")] = (
        "llamagen-fashion"
    ),
    num: Annotated[int, typer.Option(help="Samples of each sampler.")] = 2000,
    samplers: Annotated[
        str | None, typer.Option(help="Some of the samplers, with commas; all if left.")
    ] = None,
    num_real: Annotated[int, typer.Option(help="Test images to compare with.")] = 10_000,
    size: Annotated[int, typer.Option(help="Input side of lite0.")] = 64,
    timed: Annotated[int, typer.Option(help="Images drawn one at a time for passes, time.")] = 10,
    workers: Annotated[int | None, typer.Option(help="Processes; the cores if left.")] = None,
    fashion_mnist: FashionFolder = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Evaluate every sampler of a Fashion-MNIST model against the 10,000 test images."""
    import torch

    from ..catalog import list_samplers
    from ..errors import check_count, optional, unknown_name
    from ..eval import get_extractor
    from ..eval.demo import Judge, Row, compare, to_table, write_demo
    from ..eval.sources import ShardSource, TensorSource
    from ..files import check_out
    from ..training.data import fashion_folder, load_fashion

    check_out(out, is_folder=True)
    for name, value in (("num", num), ("num-real", num_real), ("timed", timed)):
        check_count(name, value, 1_000_000)
    if workers is not None:
        check_count("workers", workers, 1024)
    fashion_folder()
    with optional("plot", "the plot of arvision eval demo"):
        import matplotlib  # noqa: F401
    started = time.perf_counter()
    listed = list_samplers(model)
    lossless = {str(name): bool(name.facts["lossless"]) for name in listed}
    names = [str(name) for name in listed]
    wanted = names if samplers is None else ["ar", *samplers.split(",")]
    for name in wanted:
        if name not in names:
            raise unknown_name("sampler", name, names)
    entries, left_out = _draw(plan(wanted), model, out, num, workers, not quiet)
    drawn = time.perf_counter() - started
    images, labels = load_fashion("test")
    images, labels = images[:num_real], labels[:num_real]
    real = TensorSource(images.unsqueeze(1), labels.tolist(), "the Fashion-MNIST test images")
    networks = [get_extractor("lite0", size=size), get_extractor("fashion-classifier")]
    torch.set_num_threads(workers or os.cpu_count() or 1)
    judge = Judge(real, networks, progress=not quiet)
    sources = [_training_images(num)]
    sources += [ShardSource(out / "samples" / entry.folder) for entry in entries]
    judged = _judge(judge, sources, workers, not quiet)
    rows = [Row(sources[0].name, "", num, judged[0][0])]
    likelihood = _likelihoods(model, out / "samples" / "ar")
    with ThreadPoolExecutor(workers or os.cpu_count(), initializer=_one_thread) as pool:
        compared = [s for s, e in zip(sources[1:], entries, strict=True) if _is_tested(e)]
        list(pool.map(likelihood, [source.shards for source in compared]))
    for entry, source, (scores, features) in zip(entries, sources[1:], judged[1:], strict=True):
        row = Row(entry.name, "exact" if lossless[entry.sampler] else "lossy", num, scores)
        if entry.name != "ar":
            baseline = sources[1].shards, judged[1][1]
            row.tests, row.verdict = compare(baseline, (source.shards, features), likelihood)
        rows.append(row)
    _time(entries, rows, model, timed, not quiet)
    facts = {
        "model": model,
        "num": num,
        "timed": timed,
        "left_out": left_out,
        "drawing_seconds": drawn,
        "seconds": time.perf_counter() - started,
    }
    report = write_demo(rows, judge, out, facts)
    distances = [name for name in rows[0].scores if name.startswith("frechet_")]
    tell(json.dumps(report) if as_json else to_table(rows, distances))
    if not as_json:
        tell(f"{facts['seconds']:.0f} s -> {out / 'report.md'}, {out / 'quality-speed.png'}")


def _is_tested(entry: Entry) -> bool:
    """Whether laws are compared: plain sampling, and runs with other seeds than its."""
    return entry.name == "ar" or entry.seed != 0


def _training_images(num: int) -> Any:
    """As many training images: what a perfect model would score."""
    from ..eval.sources import TensorSource
    from ..training.data import load_fashion

    images, labels = load_fashion("train")
    name = f"{num:,} training images"
    return TensorSource(images[:num].unsqueeze(1), labels[:num].tolist(), name)


def _judge(judge: Any, sources: list[Any], workers: int | None, progress: bool) -> list[Any]:
    """Scores and features of all sources, a thread for each core."""
    from tqdm import tqdm

    # Samples of a sampler that draws ar's very pictures are judged with ar's.
    marks = [source.read(0, len(source)).numpy().tobytes() for source in sources]
    kinds = list(dict.fromkeys(marks))
    with ThreadPoolExecutor(workers or os.cpu_count(), initializer=_one_thread) as pool:
        found = pool.map(judge.score, [sources[marks.index(mark)] for mark in kinds])
        bar = tqdm(found, "scoring", len(kinds), file=sys.stderr, disable=not progress)
        scored = dict(zip(kinds, bar, strict=True))
    return [scored[mark] for mark in marks]


def _draw(
    entries: list[Entry], model: str, out: Path, num: int, workers: int | None, progress: bool
) -> tuple[list[Entry], dict[str, str]]:
    """Draw the samples of all entries, some at a time, each in its own process.

    Returns:
        The entries that worked, and why the others did not.
    """
    from tqdm import tqdm

    from ..errors import ArvisionError, InputError
    from ..eval.shards import BLOCK_SIZE

    places = {entry.name: out / "samples" / entry.folder for entry in entries}
    total, failed = len(entries) * -(-num // BLOCK_SIZE), {}
    count = workers or os.cpu_count() or 1
    with (
        ProcessPoolExecutor(count, get_context("spawn"), _one_thread) as pool,
        tqdm(total=total, desc="blocks of 500", file=sys.stderr, disable=not progress) as bar,
    ):
        jobs = {pool.submit(_generate, e, model, places[e.name], num): e for e in entries}
        waiting = set(jobs)
        while waiting:
            ended, waiting = wait(waiting, timeout=0.5)
            for job in ended:
                try:
                    job.result()
                except ArvisionError as error:
                    failed[jobs[job].name] = str(error)
            found = [list((p / "blocks").glob("*[0-9].npy")) for p in places.values()]
            bar.update(sum(map(len, found)) - bar.n)
    if "ar" in failed:
        raise InputError(f"{model} cannot be drawn from: {failed['ar']}")
    for name, reason in failed.items():
        print(f"arvision: {name} is left out: {reason}", file=sys.stderr)  # noqa: T201
    return [entry for entry in entries if entry.name not in failed], failed


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _generate(entry: Entry, model: str, out: Path, num: int) -> None:
    """What `arvision eval generate` does, in this process."""
    from ..evaluation import draw_samples

    options = entry.options | entry.draw
    draw_samples(
        model,
        out,
        entry.sampler,
        protocol="fashion",
        num=num,
        seed=entry.seed,
        options=options,
        batch_size=100,
        progress=False,
    )


LIKELIHOOD_IMAGES = 500
"""Images whose tokens are read again for the test of log-likelihoods; the first ones."""


def _likelihoods(model: str, baseline: Path) -> Callable[[Any], Any]:
    """Log-likelihoods of a run's tokens under plain sampling's law, kept once computed."""
    import numpy as np

    from ..evaluation import likelihood

    score, known = likelihood(model, baseline), {}

    def of(shards: Any) -> Any:
        if shards.folder not in known:
            num = min(shards.num, LIKELIHOOD_IMAGES)
            tokens, classes = shards.read_tokens(0, num), shards.config["num_classes"]
            pieces = []
            for start in range(0, len(tokens), 20):  # as many as a core's cache holds
                part = tokens[start : start + 20]
                pieces.append(score(part, [i % classes for i in range(start, start + len(part))]))
            known[shards.folder] = np.concatenate(pieces)
        return known[shards.folder]

    return of


def _time(entries: list[Entry], rows: list[Any], model: str, timed: int, progress: bool) -> None:
    """Fill in passes and median seconds per image, drawn one at a time, samplers in turn."""
    import torch
    from tqdm import tqdm

    from .. import api

    by_name = {row.name: row for row in rows}
    pipe = api.load(model)
    torch.set_num_threads(pipe.config["num_threads"] or 1)
    seconds: dict[str, list[float]] = {entry.name: [] for entry in entries}
    passes: dict[str, list[int]] = {entry.name: [] for entry in entries}
    for image in tqdm(range(-1, timed), desc="timing", file=sys.stderr, disable=not progress):
        for entry in entries:
            out = api.sample(
                pipe,
                max(image, 0) % 10,
                entry.sampler,
                seed=[(7, image + 1)],
                progress=False,
                output_type="pt",
                **entry.options,
            )
            if image >= 0:  # the first round warms up
                seconds[entry.name].append(float(out.stats["seconds"]))
                passes[entry.name].append(int(out.stats["forward_passes"]))
    for name, values in seconds.items():
        by_name[name].seconds = statistics.median(values)
        by_name[name].passes = statistics.fmean(passes[name])
