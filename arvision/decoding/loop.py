"""The one decoding loop of token models: draft, extend, verify, commit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from ..contracts import (
    Advances,
    AdvancesAlong,
    Conditions,
    DropsRows,
    Editable,
    Overruns,
    Samples,
    TakesFixedChains,
    TellsHidden,
    TokenModel,
    TokenState,
)
from .fixed_step import FixedStep
from .noise import Noise
from .run import Run
from .tree import TokenTree, Topology, is_chain, is_no_tree, listed, topology, topology_of
from .verify import Round, Rule, Verdict


class Drafter(Protocol):
    """Proposes the tokens that the target verifies; see also `Attached`."""

    def start(self, noise: Noise, vocab_size: int, num_tokens: int) -> None:
        """A new batch of images begins."""
        ...

    def propose(self, tokens: Tensor, lengths: Tensor, num: int, round_number: int) -> TokenTree:
        """Drafts for the positions after the known ones: a chain or a tree of at most `num`.

        Where a row has fewer than others there is -1.

        Args:
            tokens: [B, N], of which `tokens[b, :lengths[b]]` are final.
            lengths: [B].
            num: drafts wanted.
            round_number: of this round; the prefill is 0.
        """
        ...

    def observe(self, batch: Round, verdict: Verdict, /) -> None:
        """Learn from a round."""
        ...

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows`, the others are finished."""
        ...


@runtime_checkable
class Attached(Protocol):
    """A drafter that looks at the prompts, or drafts with the help of the target's own state."""

    def attach(self, state: Any, conditions: Conditions) -> None:
        """Called once, after the prefill."""
        ...


@runtime_checkable
class Hears(Protocol):
    """A drafter that works on the host, with what comes there in a round's one read."""

    def asks(self, batch: Round, verdict: Verdict, /) -> Sequence[Tensor]:
        """Integers that it wants to know of a round, besides the tokens that became final."""
        ...

    def hear(self, new: Sequence[list[int]], told: Sequence[list[int]], /) -> None:
        """After `observe`: the tokens of each row that became final, and what was asked for."""
        ...


@runtime_checkable
class Branches(Protocol):
    """A drafter whose candidates may outnumber the positions left: it keeps its depth to these."""

    branches: bool


@runtime_checkable
class FixedDrafter(Protocol):
    """A drafter whose drafts follow from the last verdict alone, by a function of fixed shapes."""

    has_fixed_shapes: bool


class NoDrafter:
    """Drafts nothing: the loop is then plain autoregressive sampling."""

    has_fixed_shapes = True

    def start(self, noise: Noise, vocab_size: int, num_tokens: int) -> None:
        """Nothing to prepare."""

    def propose(self, tokens: Tensor, lengths: Tensor, num: int, round_number: int) -> TokenTree:
        """No drafts, [B, 0]."""
        return TokenTree(tokens[:, :0])

    def observe(self, chain: Round, verdict: Verdict) -> None:
        """Nothing to learn."""

    def select(self, rows: Tensor) -> None:
        """Nothing to drop."""


LARGEST_TREE = 64
"""Candidates of a tree that branches: the room that models keep behind the last token."""


class WindowPolicy(Protocol):
    """How many candidates, the last known token included, a pass may hold."""

    def next(self, num_rows: int, most: int) -> int:
        """Candidates of the next pass of `num_rows` images, at most `most`."""
        ...

    def observe(self, num_candidates: int, counts: Sequence[int], room: Sequence[int]) -> None:
        """How many tokens a pass made final in each row, and how many the row still needed."""
        ...


class FixedWindow:
    """The same number of candidates in every pass."""

    def __init__(self, window: int) -> None:
        self.window = window

    def next(self, num_rows: int, most: int) -> int:
        """The window, cut to what the images still need."""
        return min(self.window, most)

    def observe(self, num_candidates: int, counts: Sequence[int], room: Sequence[int]) -> None:
        """Nothing to adapt."""


StopCheck = Callable[[Sequence[int], Sequence[Sequence[int]]], "tuple[list[int], list[bool]]"]
"""Ends rows before their last token: rows of the batch and the new tokens of each, to how many of
these stay and which rows are finished."""


def decode_tokens(
    model: TokenModel,
    conditions: Conditions,
    run: Run,
    *,
    drafter: Drafter,
    rule: Rule,
    shape: Callable[[Tensor], Tensor],
    policy: WindowPolicy,
    stop: StopCheck | None = None,
) -> Samples:
    """Draw one image per condition.

    A round drafts a chain or a tree behind the last known token, asks the model for the laws along it in one
    pass, lets the rule decide what is final, and commits that, row by row. Finished rows leave the
    batch where the state can drop rows.

    Args:
        model: a token model.
        conditions: one per image.
        run: the ledger; its `num_tokens` is how many tokens of a row are drawn. Tokens that are not
            drawn because `on_step` stopped the run stay 0.
        drafter: proposes chains or trees.
        rule: decides what is final.
        shape: guided logits to log-probabilities.
        policy: length of a pass.
        stop: ends rows early.

    Returns:
        Tokens [B, N]; the statistics of `Run.stats`, `candidates` (tokens fed, all rows and passes)
        and `windows` (candidates per image of each pass).

    Raises:
        InputError: a law made of NaN or infinity.
    """
    state, logits = model.start(conditions, run.guidance_scale)
    run.begin(logits.device)
    rows = _Rows(run, state, stop)
    drafter.start(run.noise, model.vocab_size, run.num_tokens)
    if isinstance(drafter, Attached):
        drafter.attach(state, conditions)
    # Asked once: a protocol's answer takes as long as a small operator.
    tells_hidden = isinstance(state, TellsHidden)
    hidden = cast(TellsHidden, state).hidden if tells_hidden else None
    prefill = _prefill_chain(logits, shape, run.noise, hidden)
    run.watch_laws(prefill.target_logp)
    rows.learn(drafter, prefill, rule(prefill))
    rows.leave(drafter)
    candidates = 0
    windows: list[int] = []
    if run.steps is not None and run.steps.drives(logits.device):
        why_not = _no_fixed_shapes(state, drafter, stop)
        if why_not is None:
            candidates, windows = _fixed_rounds(rows, state, drafter, rule, shape, policy)
            told = {"step": run.steps.mode, "warm_up": run.warm_up}
            return run.samples(candidates=candidates, windows=windows, **told)
        warnings.warn(
            f"compiled for {run.steps.mode!r}, and the ordinary loop runs: {why_not}", stacklevel=2
        )
    can_overrun = isinstance(state, Overruns) and state.allows_overrun
    while rows.num_active and not run.stopped:
        known, lengths = rows.known()
        room = rows.room
        most = _most(room, rows, can_overrun, drafter)
        num = max(1, policy.next(rows.num_active, most))
        run.noise.reserve(run.num_tokens - min(room) + num)
        tree = drafter.propose(known, lengths, num - 1, run.num_passes + 1)
        if tree.logq is not None and not isinstance(drafter, FixedDrafter):
            run.watch_laws(tree.logq)  # of another model
        # A drafter may have less to say than asked: the pass shrinks to what there is.
        num = tree.tokens.shape[1] + 1
        run.next_pass(rows.active)
        root = known.gather(1, lengths[:, None] - 1)
        fed = rows.spread(torch.cat([root, tree.tokens.clamp(min=0)], dim=1))
        branches = _topology(tree, lengths.device, run)
        logits = rows.extend(fed, branches, tree.edit)
        laws = shape(logits[rows.in_state])
        run.watch_laws(laws)
        candidates += laws.shape[0] * num
        windows.append(num)
        hidden = cast(TellsHidden, state).hidden if tells_hidden else None
        batch = Round(
            tree.tokens,
            tree.logq,
            laws,
            lengths[:, None] + _offsets(branches, num, lengths.device),
            rows.noise,
            run.num_passes,
            branches,
            None if hidden is None else hidden[rows.in_state],
        )
        verdict = rows.learn(drafter, batch, rule(batch))
        policy.observe(num, verdict.given or (), room)
        rows.commit(verdict, num)
        rows.leave(drafter)
    return run.samples(candidates=candidates, windows=windows, step="loop")


def _no_fixed_shapes(state: TokenState, drafter: Drafter, stop: StopCheck | None) -> str | None:
    """Why a run cannot be made of fixed steps; None where it can."""
    if not isinstance(state, TakesFixedChains):
        return "this model has no passes of fixed shapes"
    if not isinstance(drafter, FixedDrafter) or not drafter.has_fixed_shapes:
        return "the sampler's drafts are made on the host"
    return None if stop is None else "what ends a row is looked up on the host"


def _fixed_rounds(
    rows: _Rows,
    state: Any,
    drafter: Drafter,
    rule: Rule,
    shape: Callable[[Tensor], Tensor],
    policy: WindowPolicy,
) -> tuple[int, list[int]]:
    """The rounds after the prefill, made of fixed steps; candidates and windows of `decode_tokens`."""
    run, candidates, windows = rows.run, 0, []
    run.noise.reserve(2 * run.num_tokens)
    ready, step = None, None
    while rows.num_going and not run.stopped:
        rows.shrink(drafter)
        window = max(1, policy.next(rows.num_active, run.num_tokens))
        if ready is None or step is None or step.is_other(rows.active, window):
            known, lengths = rows.known()
            tree = drafter.propose(known, lengths, window - 1, run.num_passes + 1)
            first = tree.tokens, tree.logq
            step = FixedStep(
                state, drafter, rule, shape, run, rows.active, rows.noise, window, first
            )
            ready = run.steps.ready(step)
        for _ in range(run.steps.reads_every):
            ready()
            run.num_passes += 1
            windows.append(window)
        candidates += run.steps.reads_every * rows.num_active * window
        room = rows.room
        rows.catch_up(step.lengths)
        policy.observe(window, [a - b for a, b in zip(room, rows.room, strict=True)], room)
    return candidates, windows


def _most(room: Sequence[int], rows: _Rows, can_overrun: bool, drafter: Drafter) -> int:
    """Candidates that a pass may hold at most, where rows have `room` for more tokens."""
    if not can_overrun:
        return min(*room, rows.frozen_room)
    if isinstance(drafter, Branches) and drafter.branches:
        return LARGEST_TREE
    # With a draft even for the last token, an image does not depend on how long others take.
    return max(room) + 1


def _topology(tree: TokenTree, device: torch.device, run: Run) -> Topology | None:
    """How the drafts of a pass hang together; None for a chain."""
    above = tree.parents
    if above is None:
        return None
    if above.dim() == 1:
        own = listed(above)
        return None if is_chain(own) else topology(own, device)
    if not above.is_cpu:
        run.watch_tree(is_no_tree(above))
    return topology_of(above.to(device), tree.num_levels, tree.most_children)


def _offsets(shape: Topology | None, num: int, device: torch.device) -> Tensor:
    """How far behind the known tokens each of `num` laws stands, [T + 1] or [B, T + 1]."""
    return torch.arange(num, device=device) if shape is None else shape.rooted.depths


def _prefill_chain(
    logits: Tensor, shape: Callable[[Tensor], Tensor], noise: Noise, hidden: Tensor | None
) -> Round:
    """A chain without drafts: the prefill's law of the first token."""
    laws = shape(logits)[:, None]
    positions = torch.zeros(len(logits), 1, dtype=torch.int64, device=logits.device)
    return Round(positions[:, :0], laws[:, :0], laws, positions, noise, 0, hidden=hidden)


class _Rows:
    """Which images of the run are still being drawn, and in which rows of the state they stand."""

    def __init__(self, run: Run, state: TokenState, stop: StopCheck | None) -> None:
        self.run, self._state, self._stop = run, state, stop
        self._advances = isinstance(state, Advances)
        self._goes_along = isinstance(state, AdvancesAlong)
        self.noise = run.noise
        self.active = torch.arange(run.batch, device=run.tokens.device)
        self.lengths = torch.zeros_like(self.active)
        self.room = [run.num_tokens] * run.batch
        self.in_state: Any = slice(None)
        self.num_in_state = run.batch
        self.frozen_room = run.num_tokens
        self._images = list(range(run.batch))
        self._going = [True] * run.batch

    @property
    def num_active(self) -> int:
        """Rows that are not finished."""
        return len(self._images)

    def known(self) -> tuple[Tensor, Tensor]:
        """Tokens [B', N] and lengths [B'] of the active rows."""
        tokens = self.run.tokens
        return (tokens if self.num_active == len(tokens) else tokens[self.active]), self.lengths

    def spread(self, rows: Tensor) -> Tensor:
        """Values of the active rows [B', ...] laid out over the rows of the state, 0 elsewhere."""
        if isinstance(self.in_state, slice):
            return rows
        out = rows.new_zeros(self.num_in_state, *rows.shape[1:])
        out[self.in_state] = rows
        return out

    def extend(self, fed: Tensor, shape: Topology | None, edit: Any = None) -> Tensor:
        """Logits of the state's rows behind what is fed, root in front; `shape` is of the drafts."""
        rooted = None if shape is None else shape.rooted
        if edit is None and self._goes_along and isinstance(self.in_state, slice):
            return cast(AdvancesAlong, self._state).extend_along(fed, rooted)
        parents = None
        if rooted is not None:
            parents = rooted.laws - 1 if rooted.is_shared else self.spread(rooted.laws) - 1
        if edit is not None:
            if rooted is not None and rooted.listed is not None:
                parents = torch.tensor(rooted.listed)
            return cast(Editable, self._state).extend_edited(fed, parents, edit)
        return self._state.extend(fed) if parents is None else self._state.extend(fed, parents)

    @property
    def num_going(self) -> int:
        """Images that need more tokens; finished ones may wait in the batch."""
        return sum(self._going)

    def catch_up(self, lengths: Tensor) -> None:
        """Read how far passes that kept the books themselves have come, lengths [B']."""
        run = self.run
        (found,) = run.read(lengths)
        before, self.room = self.room, [run.num_tokens - length for length in found]
        given = [old - new for old, new in zip(before, self.room, strict=True)]
        self._going = [room > 0 for room in self.room]
        self.lengths = lengths
        run.tell(lengths, given, tokens=run.tokens, lengths=run.lengths)

    def shrink(self, drafter: Drafter) -> None:
        """Let finished rows leave once they are half of the batch: shapes change seldom."""
        if 2 * self.num_going <= self.num_active:
            self.leave(drafter)

    def learn(self, drafter: Drafter, batch: Round, verdict: Verdict) -> Verdict:
        """Settle a round and show it to the drafter; what is left of the verdict."""
        if not isinstance(drafter, Hears):
            verdict = self.settle(verdict)[0]
            drafter.observe(batch, verdict)
            return verdict
        wanted = [verdict.tokens, *drafter.asks(batch, verdict)]
        verdict, (tokens, *told) = self.settle(verdict, wanted)
        drafter.observe(batch, verdict)
        width = verdict.tokens.shape[1]
        new = [tokens[row * width : row * width + n] for row, n in enumerate(verdict.given or ())]
        drafter.hear(new, told)
        return verdict

    def settle(
        self, verdict: Verdict, wanted: Sequence[Tensor] = ()
    ) -> tuple[Verdict, list[list[int]]]:
        """Write what is final into the ledger; what is left of a verdict where a row ends.

        The one place where a round waits for the device. With it comes what is `wanted`.
        """
        run, counts, tokens = self.run, verdict.counts, verdict.tokens
        counts = torch.minimum(counts, run.num_tokens - self.lengths)
        stopped = [False] * self.num_active
        if self._stop is not None and not wanted:
            wanted = [tokens]
        given, *read = run.read(counts, *wanted)
        if self._stop is not None:
            width = tokens.shape[1]
            new = [read[0][row * width : row * width + count] for row, count in enumerate(given)]
            stays, stopped = self._stop(self._images, new)
            if stays != given:
                given, counts = stays, torch.tensor(stays, device=counts.device)
        run.record_rows(self.active, self.lengths, tokens, counts)
        self.lengths = self.lengths + counts
        self.room = [room - count for room, count in zip(self.room, given, strict=True)]
        self._going = [room > 0 and not end for room, end in zip(self.room, stopped, strict=True)]
        run.report(counts, self.active, given, tokens=run.tokens, lengths=run.lengths)
        return Verdict(tokens, counts, verdict.path, given), read

    def commit(self, verdict: Verdict, num: int) -> None:
        """Keep the root and the accepted drafts; the last final token is the root of the next round.

        Rows that are finished keep nothing: they leave, or wait where they are.
        """
        counts, given = verdict.counts, verdict.given or []
        if not all(self._going):
            given = [count if going else 0 for count, going in zip(given, self._going, strict=True)]
            counts = torch.tensor(given, device=counts.device)
        is_whole = isinstance(self.in_state, slice)
        if verdict.path is None and is_whole and self._advances:
            cast(Advances, self._state).advance(counts, given)
            return
        if verdict.path is None:
            kept = torch.arange(num, device=counts.device).expand(self.num_in_state, num)
        else:
            kept = self.spread(torch.nn.functional.pad(verdict.path + 1, (1, 0)))
        if is_whole and self._goes_along:
            cast(AdvancesAlong, self._state).advance_along(kept, counts, given)
            return
        self._state.commit(kept, self.spread(counts))

    def leave(self, drafter: Drafter) -> None:
        """Let finished rows leave the state and the drafter, or wait in the state where they are."""
        if all(self._going):
            return
        places = [place for place, going in enumerate(self._going) if going]
        keep = torch.tensor(places, dtype=torch.int64, device=self.active.device)
        drafter.select(keep)
        if isinstance(self._state, DropsRows):
            self._state.select(keep)
            self.num_in_state = len(keep)
        else:
            # They stay in the batch with what they had committed before their last pass.
            if isinstance(self.in_state, slice):
                self.in_state = torch.arange(self.num_in_state, device=keep.device)
            self.in_state = self.in_state[keep]
            self.frozen_room = self.run.num_tokens - 1 - int(self._state.lengths.max())
        self.active, self.lengths = self.active[keep], self.lengths[keep]
        self._images = [self._images[place] for place in places]
        self.room = [self.room[place] for place in places]
        self._going = [True] * len(places)
        self.noise = self.noise.select(keep)
