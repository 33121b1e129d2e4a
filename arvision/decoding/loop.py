"""The one decoding loop of token models: draft, extend, verify, commit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from ..contracts import (
    Conditions,
    DropsRows,
    Editable,
    Overruns,
    Samples,
    TellsHidden,
    TokenModel,
    TokenState,
)
from .noise import Noise
from .run import Run
from .tree import TokenTree, Topology, is_chain, topology_of
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
class Branches(Protocol):
    """A drafter whose candidates may outnumber the positions left: it keeps its depth to these."""

    branches: bool


class NoDrafter:
    """Drafts nothing: the loop is then plain autoregressive sampling."""

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

    def observe(self, num_candidates: int, counts: Tensor, num_useful: Tensor) -> None:
        """Counts [B] of final tokens that a pass gave, of at most `num_useful` [B] possible."""
        ...


class FixedWindow:
    """The same number of candidates in every pass."""

    def __init__(self, window: int) -> None:
        self.window = window

    def next(self, num_rows: int, most: int) -> int:
        """The window, cut to what the images still need."""
        return min(self.window, most)

    def observe(self, num_candidates: int, counts: Tensor, num_useful: Tensor) -> None:
        """Nothing to adapt."""


StopCheck = Callable[[Tensor, Tensor, Tensor], "tuple[Tensor, Tensor]"]
"""Ends rows before their last token: rows [B'] of the batch, new tokens [B', K] and their counts
[B'] to the counts that stay, and which rows are finished, [B'] bool."""


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
    prefill = _prefill_chain(logits, shape, run.noise, _hidden(state))
    run.watch_laws(prefill.target_logp)
    first = rows.settle(rule(prefill))
    drafter.observe(prefill, first)
    rows.leave(drafter)
    can_overrun = isinstance(state, Overruns) and state.allows_overrun
    candidates = 0
    windows: list[int] = []
    while rows.num_active and not run.stopped:
        known, lengths = rows.known()
        room = run.num_tokens - lengths
        most = _most(room, rows, can_overrun, drafter)
        num = max(1, policy.next(rows.num_active, most))
        tree = drafter.propose(known, lengths, num - 1, run.num_passes + 1)
        # A drafter may have less to say than asked: the pass shrinks to what there is.
        num = tree.tokens.shape[1] + 1
        run.next_pass(rows.active)
        root = known.gather(1, lengths[:, None] - 1)
        fed = rows.spread(torch.cat([root, tree.tokens.clamp(min=0)], dim=1))
        parents, offsets, branches = _layout(tree, lengths.device)
        if tree.edit is not None:
            logits = cast(Editable, state).extend_edited(fed, parents, tree.edit)
        else:
            logits = state.extend(fed) if parents is None else state.extend(fed, parents)
        laws = shape(logits[rows.in_state])
        run.watch_laws(laws)
        candidates += laws.shape[0] * num
        windows.append(num)
        hidden = _hidden(state)
        batch = Round(
            tree.tokens,
            tree.logq,
            laws,
            lengths[:, None] + offsets,
            rows.noise,
            run.num_passes,
            branches,
            None if hidden is None else hidden[rows.in_state],
        )
        verdict = rule(batch)
        useful = room.clamp(max=num)
        counts = torch.minimum(verdict.counts, useful)
        verdict = rows.settle(Verdict(verdict.tokens, counts, verdict.path))
        policy.observe(num, verdict.counts, useful)
        drafter.observe(batch, verdict)
        rows.commit(verdict, num)
        rows.leave(drafter)
    return run.samples(candidates=candidates, windows=windows)


def _most(room: Tensor, rows: _Rows, can_overrun: bool, drafter: Drafter) -> int:
    """Candidates that a pass may hold at most, where rows have `room` [B] for more tokens."""
    if not can_overrun:
        return min(int(room.min()), rows.frozen_room)
    if isinstance(drafter, Branches) and drafter.branches:
        return LARGEST_TREE
    # With a draft even for the last token, an image does not depend on how long others take.
    return int(room.max()) + 1


def _hidden(state: TokenState) -> Tensor | None:
    return state.hidden if isinstance(state, TellsHidden) else None


def _layout(tree: TokenTree, device: torch.device) -> tuple[Tensor | None, Tensor, Topology | None]:
    """How a pass is laid out: parents [1 + T] of the root and the drafts (None for a chain), how
    far behind the known tokens each law stands [1 + T], and the topology of the drafts; the first
    two [B, 1 + T] where rows have trees of their own."""
    above = tree.parents
    if above is None or (above.dim() == 1 and is_chain(above.tolist())):
        return None, torch.arange(tree.tokens.shape[1] + 1, device=device), None
    shape = topology_of(above.to(device))
    root = shape.laws.new_zeros(*shape.laws.shape[:-1], 1)
    parents = torch.cat([root - 1, shape.laws], dim=-1)
    return parents, torch.cat([root, shape.depths + 1], dim=-1), shape


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
        self._run, self._state, self._stop = run, state, stop
        self.noise = run.noise
        self.active = torch.arange(run.batch, device=run.tokens.device)
        self.lengths = torch.zeros_like(self.active)
        self.in_state: Any = slice(None)
        self.num_in_state = run.batch
        self.frozen_room = run.num_tokens
        self._going = self.active >= 0

    @property
    def num_active(self) -> int:
        """Rows that are not finished."""
        return len(self.active)

    def known(self) -> tuple[Tensor, Tensor]:
        """Tokens [B', N] and lengths [B'] of the active rows."""
        tokens = self._run.tokens
        return (tokens if self.num_active == len(tokens) else tokens[self.active]), self.lengths

    def spread(self, rows: Tensor) -> Tensor:
        """Values of the active rows [B', ...] laid out over the rows of the state, 0 elsewhere."""
        if isinstance(self.in_state, slice):
            return rows
        out = rows.new_zeros(self.num_in_state, *rows.shape[1:])
        out[self.in_state] = rows
        return out

    def settle(self, verdict: Verdict) -> Verdict:
        """Write what is final into the ledger; what is left of a verdict where `stop` ends a row."""
        stopped = None
        if self._stop is not None:
            counts, stopped = self._stop(self.active, verdict.tokens, verdict.counts)
            verdict = Verdict(verdict.tokens, counts, verdict.path)
        offsets = torch.arange(verdict.tokens.shape[1], device=self.lengths.device)
        rows, places = (offsets < verdict.counts[:, None]).nonzero(as_tuple=True)
        positions = self.lengths[rows] + places
        self._run.record(self.active[rows], positions, verdict.tokens[rows, places])
        self.lengths = self.lengths + verdict.counts
        self._going = self.lengths < self._run.num_tokens
        if stopped is not None:
            self._going &= ~stopped
        run = self._run
        run.report(verdict.counts, self.active, tokens=run.tokens, lengths=run.lengths)
        return verdict

    def commit(self, verdict: Verdict, num: int) -> None:
        """Keep the root and the accepted drafts; the last final token is the root of the next round.

        Rows that are finished keep nothing: they leave, or wait where they are.
        """
        counts = torch.where(self._going, verdict.counts, 0)
        if verdict.path is None:
            kept = torch.arange(num, device=counts.device).expand(self.num_in_state, num)
        else:
            root = verdict.path.new_zeros(len(verdict.path), 1)
            path = torch.cat([root, verdict.path + 1], dim=1)
            kept = self.spread(path)
        self._state.commit(kept, self.spread(counts))

    def leave(self, drafter: Drafter) -> None:
        """Let finished rows leave the state and the drafter, or wait in the state where they are."""
        if self._run.check(self._going) == self.num_active:
            return
        keep = self._going.nonzero()[:, 0]
        drafter.select(keep)
        if isinstance(self._state, DropsRows):
            self._state.select(keep)
            self.num_in_state = len(keep)
        else:
            # They stay in the batch with what they had committed before their last pass.
            if isinstance(self.in_state, slice):
                self.in_state = torch.arange(self.num_in_state, device=keep.device)
            self.in_state = self.in_state[keep]
            self.frozen_room = self._run.num_tokens - 1 - int(self._state.lengths.max())
        self.active, self.lengths = self.active[keep], self.lengths[keep]
        self.noise = self.noise.select(keep)
