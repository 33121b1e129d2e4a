"""What drawing costs: models x samplers x batches x dtypes, alternating in one process.

Beside times stand what does not depend on a machine's load (passes, reads, operator calls, bytes) and the
share of the limit: the time of reading once what a pass must read, over the time that it takes.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .api import load
from .counting import count_calls
from .decoding.cache import KVCache
from .errors import InputError, as_integer, optional, unknown_name
from .files import read_regular, replacing, write_text
from .official import official_draw
from .pipeline import ARPipeline
from .samplers import BaseSampler, get_sampler

FORMAT = 1
PROBE_BYTES = 1 << 28
"""Size of the buffer whose reading tells the bandwidth; larger than any cache of a processor."""

AGAINST = ("official",)
LARGEST_FILE = 1 << 26
NOISE = 0.03
"""Medians closer than this share are called equal, whatever their spread."""


@dataclass
class Row:
    """What one case cost.

    Attributes:
        model: as the user wrote it.
        sampler: likewise.
        batch: images drawn together.
        dtype: of the networks.
        passes: model calls of a draw.
        seconds: of a draw without the decoder, one for each round; CPU seconds on a CPU, where load
            disturbs the clock, else wall time.
        reads: reads that the host waits for, per pass.
        operators: calls of operators, per pass.
        bytes: that a pass must read: the weights once, and half a cache; None where it is not known.
        peak_memory: bytes above the weights, on a CUDA device; else None.
    """

    model: str
    sampler: str
    batch: int
    dtype: str
    passes: int
    seconds: list[float] = field(default_factory=list)
    reads: float = 0.0
    operators: float = 0.0
    bytes: int | None = None
    peak_memory: int | None = None

    @property
    def key(self) -> tuple[str, str, int, str]:
        """What is compared with the same case of another file."""
        return self.model, self.sampler, self.batch, self.dtype

    @property
    def per_pass(self) -> float:
        """Median seconds of a pass."""
        return statistics.median(self.seconds) / max(1, self.passes)

    def share(self, bandwidth: float) -> float | None:
        """Share of the limit, for a bandwidth in bytes per second."""
        return None if self.bytes is None else self.bytes / bandwidth / self.per_pass


@dataclass
class Bench:
    """Rows, and the machine that they were measured on."""

    machine: dict[str, Any]
    rows: list[Row]

    def record(self) -> dict[str, Any]:
        """What `read` takes."""
        return {"format": FORMAT, "machine": self.machine, "rows": [asdict(r) for r in self.rows]}

    def markdown(self, old: Bench | None = None) -> str:
        """A table; with `old` also what changed beyond noise."""
        head = ["model", "sampler", "batch", "dtype", "passes", "ms per pass", "ms per image"]
        head += ["share of the limit", "reads", "operators", "peak MiB"]
        known = {} if old is None else {row.key: row for row in old.rows}
        head += ["against the other"] if known else []
        lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
        for row in self.rows:
            cells = self._cells(row)
            if known:
                cells.append(change(row, known[row.key]) if row.key in known else "new")
            lines.append("| " + " | ".join(cells) + " |")
        about = ", ".join(f"{name} {value}" for name, value in self.machine.items() if value)
        return "\n".join([*lines, "", f"Machine: {about}."])

    def _cells(self, row: Row) -> list[str]:
        share = row.share(self.machine["bandwidth"])
        times = sorted(1e3 * each / row.batch for each in row.seconds)
        spread = f"{statistics.median(times):.1f} ({times[0]:.1f} to {times[-1]:.1f})"
        peak = "" if row.peak_memory is None else f"{row.peak_memory / 2**20:.0f}"
        cells = [f"`{row.model}`", f"`{row.sampler}`", str(row.batch), row.dtype, str(row.passes)]
        cells += [f"{1e3 * row.per_pass:.2f}", spread, "" if share is None else f"{share:.0%}"]
        return [*cells, f"{row.reads:.1f}", f"{row.operators:.0f}", peak]

    def write(self, out: Path, old: Bench | None = None) -> list[Path]:
        """`bench.json`, `bench.md` and, with matplotlib, `bench.png` in a folder."""
        write_text(out / "bench.json", json.dumps(self.record(), indent=1))
        write_text(out / "bench.md", self.markdown(old) + "\n")
        with replacing(out / "bench.png") as path:
            self.plot().savefig(path, format="png", dpi=120)
        return [out / name for name in ("bench.json", "bench.md", "bench.png")]

    def plot(self) -> Any:
        """Time of an image against the batch, and share of the limit against the window."""
        with optional("plot", "the plot of arvision bench"):
            from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        lines: dict[str, list[Row]] = {}
        for row in self.rows:
            lines.setdefault(f"{row.model} {row.sampler} {row.dtype}", []).append(row)
        for name, rows in lines.items():
            rows = sorted(rows, key=lambda row: row.batch)
            times = [1e3 * row.per_pass * row.passes / row.batch for row in rows]
            left.plot([row.batch for row in rows], times, marker="o", label=name)
        left.set(xlabel="images in a batch", ylabel="ms per image", ylim=(0, None))
        left.set_xscale("log", base=2)
        left.legend(fontsize=7)
        windows: dict[str, list[tuple[int, float]]] = {}
        for row in self.rows:
            share = row.share(self.machine["bandwidth"])
            if share is not None:
                name = f"{row.model} batch {row.batch} {row.dtype}"
                windows.setdefault(name, []).append((window_of(row.sampler), 100 * share))
        for name, points in windows.items():
            right.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        right.set(xlabel="candidates in a pass", ylabel="share of the limit, %", ylim=(0, None))
        right.legend(fontsize=7)
        return figure


def window_of(sampler: str) -> int:
    """Candidates of a pass of a sampler, 1 where it does not say."""
    if sampler.partition(" ")[0] in AGAINST:
        return 1
    window = get_sampler(sampler).config.get("window", 1)
    return window if isinstance(window, int) else 1


def change(new: Row, old: Row) -> str:
    """What changed between two measurements of a case, beyond noise."""
    words = []
    for name in ("passes", "reads", "operators"):
        before, after = getattr(old, name), getattr(new, name)
        if round(before, 2) != round(after, 2):
            words.append(f"{name} {before:g} to {after:g}")
    ratio = old.per_pass * old.passes / (new.per_pass * new.passes)
    is_apart = max(new.seconds) < min(old.seconds) or max(old.seconds) < min(new.seconds)
    if is_apart and abs(ratio - 1) > NOISE:
        words.append(f"{ratio:.2f}x as fast")
    return ", ".join(words) or "the same"


def read(path: Path) -> Bench:
    """A `bench.json`.

    Raises:
        InputError: another kind of file.
    """
    try:
        found = json.loads(read_regular(path, LARGEST_FILE))
        if found["format"] != FORMAT:
            raise InputError(f"{path}: format {found['format']!r:.20}, expected {FORMAT}")
        return Bench(found["machine"], [Row(**row) for row in found["rows"]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected a bench.json of arvision bench ({error})") from error


def run(
    models: Sequence[str],
    samplers: Sequence[str],
    *,
    batches: Sequence[int] = (1,),
    dtypes: Sequence[str] = ("float32",),
    device: str | None = None,
    compile: str | None = None,
    rounds: int = 5,
    seed: int = 0,
    against: str | None = None,
    on_case: Callable[[], object] = lambda: None,
) -> Bench:
    """Measure all combinations at the recommended settings of each model.

    Args:
        models: names, folders or hub ids.
        samplers: names with options, see `get_sampler`.
        batches: images drawn together.
        dtypes: of the networks.
        device: None for an accelerator where there is one, else the CPU.
        compile: a mode of `ARPipeline.compile`, or None.
        rounds: measured draws of each case; one more warms up.
        seed: of the draws, the same for all.
        against: "official" for the authors' own code with the same weights, a case of every model, dtype
            and batch; see `arvision.official`.
        on_case: called after each draw.

    Raises:
        InputError: an unknown name, a sampler that does not drive a model, a number below 1, or no
            code of the authors.
    """
    if against not in (None, *AGAINST):
        raise unknown_name("against", against, AGAINST)
    for name, numbers in (("batch", batches), ("rounds", [rounds])):
        for number in numbers:
            if (as_integer(number) or 0) < 1:
                raise InputError(f"{name} {number!r}: expected an integer >= 1")
    cases: list[tuple[Row, Callable[[], Any], ARPipeline]] = []
    for name, dtype in product(models, dtypes):
        pipe = load(name, device=device, dtype=dtype, compile=compile)
        for spec, batch in product(samplers, batches):
            sampler = pipe.bind(get_sampler(spec), pipe.model)
            pipe.check_sampler(sampler)
            row = Row(name, spec, batch, dtype, 0)
            cases.append((row, _task(pipe, sampler, batch, seed), pipe))
        for batch in batches if against is not None else ():
            cases.append((Row(name, f"{against} ar", batch, dtype, 0), _theirs(pipe, batch), pipe))
    for row, task, pipe in cases:
        _count(row, task, pipe)
        on_case()
    for number in range(rounds):
        for row, task, pipe in cases if number % 2 == 0 else reversed(cases):
            row.seconds.append(_seconds(task, pipe.device))
            on_case()
    place = cases[0][2].device if cases else torch.device("cpu")
    return Bench(machine(place), [row for row, _, _ in cases])


def _task(pipe: ARPipeline, sampler: BaseSampler, batch: int, seed: int) -> Callable[[], Any]:
    prompts = list(pipe.config["class_names"] or ["a bag"])
    given = [prompts[image % len(prompts)] for image in range(batch)]
    seeds = [(seed, image) for image in range(batch)]

    def draw() -> Any:
        return pipe(given, sampler=sampler, seed=seeds, output_type="latent", progress=False)

    return draw


def _theirs(pipe: ARPipeline, batch: int) -> Callable[[], Any]:
    """The same draw by the authors' code."""
    draw = official_draw(pipe)
    classes = [image % len(pipe.config["class_names"] or [0]) for image in range(batch)]
    return lambda: SimpleNamespace(stats={"forward_passes": draw(classes, None)})


def _count(row: Row, task: Callable[[], Any], pipe: ARPipeline) -> None:
    """One draw that warms up and one that is counted."""
    task()
    is_cuda = pipe.device.type == "cuda"
    before = torch.cuda.memory_allocated() if is_cuda else 0
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    with count_calls() as calls:
        stats = task().stats
    if is_cuda:
        row.peak_memory = torch.cuda.max_memory_allocated() - before
    row.passes = stats["forward_passes"]
    row.reads = round(calls.num_reads / max(1, row.passes), 2)
    row.operators = round(calls.num_operators / max(1, row.passes), 1)
    row.bytes = bytes_of_pass(pipe, row.batch)


def bytes_of_pass(pipe: ARPipeline, batch: int) -> int | None:
    """Bytes that a pass must read: all weights but looked-up tables, and half a full cache.

    None for continuous models, whose head runs many times in a pass.
    """
    if pipe.kind == "continuous":
        return None
    tables = {id(m.weight) for m in pipe.transformer.modules() if isinstance(m, nn.Embedding)}
    weights = [p for p in pipe.transformer.parameters() if id(p) not in tables]
    total = sum(weight.numel() * weight.element_size() for weight in weights)
    if pipe.kind != "token":
        return total
    prompt = (pipe.config["class_names"] or ["a bag"])[0]
    state: Any = pipe.model.start([prompt], pipe.config["guidance_scale"])[0]
    cache = getattr(state, "cache", None)
    if not isinstance(cache, KVCache):
        return total
    prefix = cache.host_lengths[0]
    visible = prefix + pipe.model.num_tokens / 2
    size = cache.keys.numel() * cache.keys.element_size()
    return total + int(2 * size / cache.capacity * visible * batch)


def _seconds(task: Callable[[], Any], device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    _wait(device)
    started = clock()
    task()
    _wait(device)
    return clock() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device) -> dict[str, Any]:
    """The machine, its versions, and how many bytes a second it reads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "bandwidth": bandwidth(device),
    }


def bandwidth(device: torch.device) -> float:
    """Bytes per second of the best of some sums over a large buffer."""
    buffer: Tensor = torch.ones(PROBE_BYTES // 4, device=device)
    times = []
    for _ in range(6):
        _wait(device)
        started = time.perf_counter()
        buffer.sum()
        _wait(device)
        times.append(time.perf_counter() - started)
    return PROBE_BYTES / min(times)
