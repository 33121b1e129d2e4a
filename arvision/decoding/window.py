"""How long a pass should be: the window with the most final tokens per second.

The cost of a pass comes from a table, what a pass gives from the table and the acceptances of the
run so far. Nothing here reads a clock while images are drawn, so a run with the same table repeats.

Paper: Liu et al., "Optimizing Speculative Decoding for Serving Large Language Models Using
Goodput", 2024 (SmartSpec), sections 4.2-4.3: goodput is expected accepted tokens over pass time.
There the accepted length is geometric in one acceptance rate; a Jacobi window gets better drafts by
being longer, so here the table may also say what each window gave when it was measured.
"""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..contracts import Conditions, TellsCost, device_of
from ..contracts import Sampler as SamplerLike
from ..errors import InputError
from .costs import MEASURING, CostFile, Table, check_entry

WINDOWS = (1, 4, 8, 16, 32, 64)
"""Windows that `window="auto"` chooses from."""

PRIOR_ACCEPTANCE = 0.7
"""Chance that a draft is accepted, where a table does not say what its windows gave."""

PRIOR_DRAFTS = 16.0
"""Expected accepted drafts that the table's word weighs against the run's own count."""

ROW_PRIOR = 2.0
"""The same for the count of one row."""

MEMORY = 0.95
"""Share of a row's acceptances that still counts a round later; the table's word takes the rest."""

MAX_SECONDS = 2.0
"""Time spent on one entry of a table that is measured, beyond the fewest passes needed."""


class CostTable:
    """Seconds of a pass by images in the batch and window, and tokens that a pass gave.

    Args:
        entries: rows [images, window, seconds] or [images, window, seconds, tokens per pass], or a
            dict of windows to seconds (for any number of images).

    Raises:
        InputError: another layout, no entry, or a number out of range.
    """

    def __init__(self, entries: Any) -> None:
        if isinstance(entries, dict):
            # As a saved configuration has them, windows are texts.
            entries = [
                [1, int(window) if str(window).isdecimal() else window, seconds]
                for window, seconds in entries.items()
            ]
        if not isinstance(entries, Sequence) or isinstance(entries, str):
            raise InputError(f"cost table {entries!r}: expected a list of entries or a dict")
        self._seconds: dict[int, dict[int, float]] = {}
        gains: dict[int, list[float]] = {}
        for entry in entries:
            numbers = check_entry(entry)
            images, window = int(numbers[0]), int(numbers[1])
            self._seconds.setdefault(images, {})[window] = numbers[2]
            if len(numbers) == 4:
                gains.setdefault(window, []).append(numbers[3])
        if not self._seconds:
            raise InputError("empty cost table: expected at least one [images, window, seconds]")
        self._gains = {window: sum(values) / len(values) for window, values in gains.items()}
        if self._gains:
            self._gains[1] = 1.0
        self.windows = sorted({window for costs in self._seconds.values() for window in costs})
        """Windows of the table, ascending."""
        self._of_rows: dict[int, dict[int, float]] = {}

    def seconds(self, num_rows: int, window: int) -> float:
        """Cost of a pass, interpolated in both directions and held beyond the ends."""
        if num_rows not in self._of_rows:  # asked before every pass of a run
            self._of_rows[num_rows] = {
                known: _interpolate(
                    {rows: _interpolate(costs, known) for rows, costs in self._seconds.items()},
                    num_rows,
                )
                for known in self.windows
            }
        return _interpolate(self._of_rows[num_rows], window)

    def tokens(self, window: int) -> float:
        """Final tokens that a pass of this window is expected to give before a run begins."""
        if self._gains:
            return max(1.0, _interpolate(self._gains, window))
        return (1 - PRIOR_ACCEPTANCE**window) / (1 - PRIOR_ACCEPTANCE)


def tables_by_tree(entries: Any) -> dict[str | None, CostTable]:
    """A table for chains (None) and for each kind of tree that the entries name.

    Args:
        entries: as `CostTable` takes them; a row may end with the name of a tree.

    Raises:
        InputError: see `CostTable`.
    """
    rows: dict[str | None, list[Any]] = {}
    if isinstance(entries, Sequence) and not isinstance(entries, str):
        for entry in entries:
            last = entry[-1] if isinstance(entry, Sequence) and len(entry) else None
            is_named = isinstance(last, str) and last.isidentifier() and entry != last
            rows.setdefault(last if is_named else None, []).append(
                entry[:-1] if is_named else entry
            )
    return {tree: CostTable(own) for tree, own in (rows or {None: entries}).items()}


def _interpolate(points: dict[int, float], at: int) -> float:
    """Piecewise linear through `points`, constant beyond them."""
    if at in points:
        return points[at]
    places = sorted(points)
    below = max((x for x in places if x <= at), default=places[0])
    above = min((x for x in places if x >= at), default=places[-1])
    if below == above or not below <= at <= above:
        return points[below if at >= below else above]
    share = (at - below) / (above - below)
    return points[below] + share * (points[above] - points[below])


class GoodputWindow:
    """The window with the most expected final tokens per second; see `decoding.loop.WindowPolicy`.

    Expected tokens of window w are 1 + r * (t(w) - 1): t(w) is the table's word, and r how many
    more drafts than the table promised were accepted in this run so far. A function of the table
    and of the acceptances, never of a clock.

    Args:
        table: costs and, where known, gains.
    """

    def __init__(self, table: CostTable) -> None:
        self._table = table
        self._accepted = self._promised = PRIOR_DRAFTS

    def next(self, num_rows: int, most: int) -> int:
        """The best window, at most `most`; the shorter one of equals."""
        windows = sorted({min(window, most) for window in self._table.windows})
        return max(windows, key=lambda window: (self.goodput(num_rows, window), -window))

    def best(self, num_rows: int, most: int) -> float:
        """Expected final tokens per second with the best window of at most `most`."""
        return self.goodput(num_rows, self.next(num_rows, most))

    def goodput(self, num_rows: int, window: int) -> float:
        """Expected final tokens per second of a pass."""
        drafts = (self._table.tokens(window) - 1) * self._accepted / self._promised
        return num_rows * (1 + min(drafts, window - 1)) / self._table.seconds(num_rows, window)

    def observe(self, num_candidates: int, counts: Sequence[int], room: Sequence[int]) -> None:
        """Compare what a pass gave with what the table promised, where the image left room."""
        promised = self._table.tokens(num_candidates) - 1
        for count, useful in zip(counts, room, strict=True):
            if useful >= num_candidates:
                self._accepted += count - 1
                self._promised += promised


class RowGoodput(GoodputWindow):
    """A window for each row: what promises the most tokens per second by its own acceptances.

    The longest window is the one with the most expected tokens of all rows together per second of a
    pass. Up to it, a row takes as many candidates as pay for themselves: those with the most expected
    tokens beyond what its share of such a pass would give at the best rate. Acceptances are moving
    averages, so that a row whose drafts failed tries again. A pass is a rectangle here: shorter rows
    are padded, and what they save is candidates, not time.

    Paper: that of `decoding.window`, section 4 (there from acceptance rates of requests).
    """

    def __init__(self, table: CostTable) -> None:
        super().__init__(table)
        self._of: dict[int, tuple[float, float]] = {}

    def expected(self, row: int, window: int) -> float:
        """Final tokens of a row in a pass."""
        accepted, promised = self._of.get(row, (ROW_PRIOR, ROW_PRIOR))
        drafts = (self._table.tokens(window) - 1) * accepted / promised
        return 1 + min(drafts, window - 1)

    def next_of(self, rows: Sequence[int], most: int) -> list[int]:
        """See `arvision.decoding.drafter.RowPolicy`."""
        windows = sorted({min(window, most) for window in self._table.windows})
        seconds = {window: self._table.seconds(len(rows), window) for window in windows}
        rates = {
            window: sum(self.expected(row, window) for row in rows) / seconds[window]
            for window in windows
        }
        longest = max(windows, key=lambda window: (rates[window], -window))
        price, allowed = rates[longest] / len(rows), [w for w in windows if w <= longest]

        def gain(row: int, window: int) -> float:
            return self.expected(row, window) - price * seconds[window]

        return [max(allowed, key=lambda window: (gain(row, window), -window)) for row in rows]

    def observe_of(
        self, rows: Sequence[int], given: Sequence[int], counts: Sequence[int], room: Sequence[int]
    ) -> None:
        """See `arvision.decoding.drafter.RowPolicy`."""
        for row, window, count, useful in zip(rows, given, counts, room, strict=True):
            seen = (0.0, 0.0)
            if useful >= window:
                seen = (count - 1.0, self._table.tokens(window) - 1)
            old = self._of.get(row, (ROW_PRIOR, ROW_PRIOR))
            prior = (1 - MEMORY) * ROW_PRIOR
            self._of[row] = (
                MEMORY * old[0] + prior + seen[0],
                MEMORY * old[1] + prior + seen[1],
            )


_MEASURED: dict[str, Table] = {}


def measured_costs(
    make: Callable[[int], SamplerLike],
    label: str,
    model: Any,
    conditions: Conditions,
    guidance_scale: float,
    file: str | Path | None = None,
) -> list[list[float]]:
    """The cost table of a model on this machine: remembered, read from a file, or measured now.

    Tables are made for 1, 4, 16, ... images up to the first number that is not less than the batch;
    each pass of a real run is timed whole, drafting and verification included, with `WINDOWS` cut
    to the image. A model with a `cost_key` has its table saved, see `CostFile`; otherwise it is kept
    in memory. Of two processes that measure at once the first to save has the last word.

    Args:
        make: a sampler with a given fixed window.
        label: what of the sampler's options the cost depends on.
        model: a token model.
        conditions: of the run; the first one is used for measuring.
        guidance_scale: of the run; guidance costs second rows.
        file: where tables are saved, None for `default_file()`.

    Returns:
        Rows [images, window, seconds, tokens per pass].
    """
    guided = guidance_scale not in (0, 1)
    windows = sorted({min(window, model.num_tokens) for window in WINDOWS})
    key = f"{model_key(model)} {machine_key(model)} {label} {'guided' if guided else 'plain'}"
    path = default_file() if file is None else Path(file)
    costs = CostFile(path) if _told_cost(model) is not None else None
    remembered = f"{path} {key}"
    wanted = [1]
    while wanted[-1] < len(conditions):
        wanted.append(4 * wanted[-1])
    with MEASURING:
        if remembered not in _MEASURED:
            _MEASURED[remembered] = {} if costs is None else costs.read(key, windows)
        known = _MEASURED[remembered]
        missing = [rows for rows in wanted if rows not in known]
        for rows in missing:
            batch = list(conditions[:1]) * rows
            known[rows] = [
                [rows, window, *time_passes(make(window), model, batch, guidance_scale)]
                for window in windows
            ]
        if missing and costs is not None:
            known.update(costs.add(key, known, windows))
    # Always the rows that this batch asks for, whatever other batches have added.
    return [entry for rows in wanted for entry in known[rows]]


def time_passes(
    sampler: SamplerLike, model: Any, conditions: Conditions, guidance_scale: float
) -> tuple[float, float]:
    """Median seconds of a pass, and mean final tokens of a pass and image."""
    rows = len(conditions)
    times: list[float] = []
    gains: list[float] = []

    def on_step(number: int, progress: dict[str, Any]) -> bool:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        gains.extend(progress["accepted"])
        return number >= 4 and times[-1] - times[0] > MAX_SECONDS / rows**0.5

    seeds = [(0, row) for row in range(rows)]
    sampler(model, conditions, seeds=seeds, guidance_scale=guidance_scale, on_step=on_step)
    # The full batch is what counts: the first passes, before images are finished.
    steps = [b - a for a, b in pairwise(times)] or [times[0]]
    steps = sorted(steps[: max(2, len(steps) // 2)])
    return steps[len(steps) // 2], sum(gains) / len(gains)


def default_file() -> Path:
    """Where tables are saved unless a path is given: in the user's cache folder."""
    return Path.home() / ".cache" / "arvision" / "pass-costs.json"


def model_key(model: Any) -> str:
    """What the cost of a model depends on: its `cost_key`, or failing that its sizes."""
    sizes = (type(model).__name__, model.vocab_size, model.num_tokens, model.grid)
    return _told_cost(model) or " ".join(map(str, sizes))


def _told_cost(model: Any) -> str | None:
    return model.cost_key if isinstance(model, TellsCost) else None


def machine_key(model: Any) -> str:
    """What the cost of a pass depends on besides the model: device and threads."""
    device = device_of(model)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.get_num_threads()} threads"


def check_window(window: object, cost_table: Any = None) -> None:
    """Refuse a window that is neither a positive integer nor "auto", or a bad cost table.

    Raises:
        InputError: see above, or a cost table without "auto".
    """
    is_number = isinstance(window, int) and not isinstance(window, bool) and window >= 1
    if window != "auto" and not is_number:
        raise InputError(f'window {window!r}: expected an integer >= 1 or "auto"')
    if cost_table is not None:
        if window != "auto":
            raise InputError(f'cost_table with window {window!r}: expected window "auto"')
        tables_by_tree(cost_table)


@cache
def clamp_window(window: int, num_tokens: int) -> int:
    """`window`, cut to the image with a warning (once for each pair of numbers)."""
    if window > num_tokens:
        warnings.warn(
            f"window {window}: the image has {num_tokens} tokens, so {num_tokens} are used",
            stacklevel=2,
        )
    return min(window, num_tokens)
