"""The one decoding loop of token models: draft, extend, verify, commit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from ..contracts import (
    Advances,
    Conditions,
    DropsRows,
    Editable,
    Overruns,
    Samples,
    Seeds,
    TellsHidden,
    TokenModel,
    TokenState,
)
from .drafter import LARGEST_TREE, Attached, Branches, Drafter, Joins, WindowPolicy
from .fixed_step import fixed_rounds, why_no_fixed_rounds
from .given import Front, KeepsGiven, read_beginning
from .noise import Noise
from .run import Run
from .tree import layout_of
from .verify import Round, Rule, Verdict


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
    loop = TokenLoop(model, run, rule=rule, shape=shape, policy=policy, stop=stop)
    state = loop.enter(conditions, drafter)
    if run.steps is not None and run.steps.drives(run.tokens.device):
        why_not = why_no_fixed_rounds(run, state, drafter, stop)
        if why_not is None:
            candidates, windows = fixed_rounds(loop.rows, state, drafter, rule, shape, policy)
            told = {"step": run.steps.mode, "warm_up": run.warm_up}
            return run.samples(candidates=candidates, windows=windows, **told)
        warnings.warn(
            f"compiled for {run.steps.mode!r}, and the ordinary loop runs: {why_not}", stacklevel=2
        )
    while loop.rows.num_active and not run.stopped:
        loop.round()
    return run.samples(candidates=loop.candidates, windows=loop.windows, step="loop")


class TokenLoop:
    """The loop as an object: images enter, rounds are made, finished images leave.

    Between rounds, further images may enter places of the run that are free, where the state is one
    of those that take rows in (`TakesRows`) and the drafter `Joins`; each has a prompt, a seed, a
    guidance scale and a law of its own, and is drawn as if it were alone.

    Args:
        model: a token model.
        run: the ledger, with a place for every image that is drawn at a time.
        rule: decides what is final.
        shape: guided logits of the images in `places` to log-probabilities.
        policy: length of a pass.
        stop: ends rows early.

    Attributes:
        candidates: tokens fed so far, all rows and passes.
        windows: candidates per image of each pass.
    """

    rows: _Rows
    _state: Any
    _drafter: Drafter

    def __init__(
        self,
        model: TokenModel,
        run: Run,
        *,
        rule: Rule,
        shape: Callable[[Tensor], Tensor],
        policy: WindowPolicy,
        stop: StopCheck | None = None,
    ) -> None:
        self._model, self.run, self._rule, self._shape = model, run, rule, shape
        self._policy, self._stop = policy, stop
        self.candidates = 0
        self.windows: list[int] = []
        self._is_open = self._is_mixed = False

    @property
    def places(self) -> list[int]:
        """Places of the run whose images are being drawn, in the order of the loop's rows."""
        return self.rows.images if self._is_open else []

    def enter(
        self,
        conditions: Conditions,
        drafter: Drafter,
        places: Sequence[int] | None = None,
        *,
        seeds: Seeds = (),
        guidance_scale: Any = None,
        shape: Callable[[Tensor], Tensor] | None = None,
    ) -> TokenState:
        """Begin to draw images: their prefill and their first tokens.

        Args:
            conditions: one per image.
            drafter: of these images, which nothing was asked yet.
            places: of the run, free ones; None for all at once, as the run says.
            seeds: one per image, where `places` are given.
            guidance_scale: of these images; None for the run's.
            shape: guided logits of these images to log-probabilities; None for the loop's.

        Returns:
            The state in which they stand before they join the others.

        Raises:
            InputError: a condition that the model does not know, or a law made of NaN or infinity.
        """
        run, model = self.run, self._model
        scale = run.guidance_scale if guidance_scale is None else guidance_scale
        state, logits = model.start(conditions, scale)
        if not self._is_open:
            run.begin(logits.device)
        if places is not None:
            run.reopen(places, seeds)
        rows = _Rows(run, state, self._stop, places)
        rows.reserve(1)
        drafter.start(rows.noise, model.vocab_size, run.num_tokens)
        if isinstance(drafter, Attached):
            drafter.attach(state, conditions)
        hidden = state.hidden if isinstance(state, TellsHidden) else None
        if rows.given is not None:
            if isinstance(drafter, KeepsGiven):
                drafter.keep(rows.given)
            logits, hidden = read_beginning(state, rows.given, logits, hidden)
        shape = self._shape if shape is None else shape
        prefill = _prefill_chain(logits, shape, rows.noise, rows.lengths, hidden)
        run.watch_laws(prefill.target_logp)
        first = rows.settle(self._rule(prefill), rows.num_read)
        drafter.observe(prefill, first)
        rows.leave(drafter)
        if not self.places:
            self._take(rows, state, drafter)
        elif rows.num_active:
            self._state.join(state)
            cast(Joins, self._drafter).join(drafter)
            self.rows.join(rows)
            self._is_mixed = True
        return state

    def _take(self, rows: _Rows, state: TokenState, drafter: Drafter) -> None:
        """Go on with these rows alone."""
        self.rows, self._state, self._drafter = rows, state, drafter
        self._is_open, self._is_mixed = True, False
        # Asked once: a protocol's answer takes as long as a small operator.
        self._tells_hidden = isinstance(state, TellsHidden)
        self._can_overrun = isinstance(state, Overruns) and state.allows_overrun
        self._can_branch = isinstance(drafter, Branches)

    def drop(self, places: Sequence[int]) -> None:
        """Draw the images in these places no further."""
        self.rows.end(places)
        self.rows.leave(self._drafter)

    def _most(self, room: Sequence[int]) -> int:
        """Candidates that a pass may hold at most, where rows have `room` for more tokens."""
        if not self._can_overrun:
            return min(*room, self.rows.frozen_room)
        if self._can_branch and cast(Branches, self._drafter).branches:
            return LARGEST_TREE
        # With a draft even for the last token, an image does not depend on how long others take.
        return max(room) + 1

    def round(self) -> None:
        """Draft, ask the model, decide and commit; finished images leave."""
        run, rows, state, drafter = self.run, self.rows, self._state, self._drafter
        known, lengths = rows.known()
        room = rows.room
        num = max(1, self._policy.next(rows.num_active, self._most(room)))
        rows.reserve(num)
        run.next_pass(None if rows.is_whole else rows.active)
        # Of images that entered later, a round has another number.
        number: Any = run.passes[rows.active][:, None] if self._is_mixed else run.num_passes
        front = rows.front
        if front is not None and not front.leaves_room(run.num_tokens, room, num, drafter):
            num = 1
        tree = drafter.propose(known, lengths, num - 1, number)
        # A drafter may have less to say than asked: the pass shrinks to what there is.
        num = tree.tokens.shape[1] + 1
        parents, offsets, topology = layout_of(tree, lengths.device)
        positions = rows.places(num) if offsets is None else lengths[:, None] + offsets
        if rows.given is not None:
            tree = rows.given.fill(tree, positions[:, 1:])
        fed = rows.roots(known)
        if num > 1:
            fed = torch.cat([fed, tree.tokens.clamp(min=0)], dim=1)
        if front is not None:
            fed = front.feed(known, lengths, fed)
            parents = None if parents is None else front.parents(parents)
        self.candidates += fed.numel()
        self.windows.append(num)
        fed = rows.spread(fed)
        if tree.edit is not None:
            logits = cast(Editable, state).extend_edited(fed, parents, tree.edit)
        else:
            logits = state.extend(fed) if parents is None else state.extend(fed, parents)
        hidden = cast(TellsHidden, state).hidden if self._tells_hidden else None
        hidden, logits = None if hidden is None else rows.gather(hidden), rows.gather(logits)
        if front is not None:
            logits = front.pick(logits, num)
            hidden = None if hidden is None else front.pick(hidden, num)
        laws = self._shape(logits)
        run.watch_laws(laws)
        batch = Round(tree.tokens, tree.logq, laws, positions, rows.noise, number, topology, hidden)
        judged = batch
        if rows.given is not None:
            judged = replace(batch, target_logp=rows.given.pin(laws, positions))
        verdict = rows.settle(self._rule(judged))
        self._policy.observe(num, verdict.given or (), room)
        drafter.observe(batch, verdict)
        rows.commit(verdict, num, front)
        rows.leave(drafter)


def _prefill_chain(
    logits: Tensor,
    shape: Callable[[Tensor], Tensor],
    noise: Noise,
    lengths: Tensor,
    hidden: Tensor | None,
) -> Round:
    """A chain without drafts: the prefill's law of the first token that is drawn."""
    laws, positions = shape(logits)[:, None], lengths[:, None]
    return Round(positions[:, :0], laws[:, :0], laws, positions, noise, 0, hidden=hidden)


class _Rows:
    """Which images of the run are still being drawn, and in which rows of the state they stand."""

    def __init__(
        self,
        run: Run,
        state: TokenState,
        stop: StopCheck | None,
        places: Sequence[int] | None = None,
    ) -> None:
        self.run, self._state, self._stop = run, state, stop
        self._advances = isinstance(state, Advances)
        self.images = list(range(run.batch) if places is None else places)
        self.active = torch.tensor(self.images, device=run.tokens.device)
        self.noise = run.noise if places is None else run.noise.select(self.active)
        self.is_whole = places is None  # all images of the run, in its order
        self.given = run.given
        self.num_read = [0] * len(self.images)
        if run.given is not None:
            self.num_read = run.given.num_leading
            run.skip(self.num_read)
        self.lengths = run.lengths[self.active]
        self.room = [run.num_tokens - num for num in self.num_read]
        self._skipped = [0] * len(self.images)
        self.in_state: Any = slice(None)
        self.num_in_state = len(self.images)
        self.frozen_room = run.num_tokens
        self._going = [True] * len(self.images)

    @property
    def num_active(self) -> int:
        """Rows that are not finished."""
        return len(self.images)

    def join(self, other: _Rows) -> None:
        """Take in the rows of another group, behind the own ones."""
        self.noise = self.noise.join(other.noise)
        self.active = torch.cat([self.active, other.active])
        self.lengths = torch.cat([self.lengths, other.lengths])
        self.images, self.room = self.images + other.images, self.room + other.room
        self._skipped = self._skipped + other._skipped
        self._going, self.is_whole = self._going + other._going, False
        self.num_in_state += other.num_in_state

    def end(self, places: Sequence[int]) -> None:
        """Count the images in these places of the run as finished."""
        self._going = [image not in places for image in self.images]

    def known(self) -> tuple[Tensor, Tensor]:
        """Tokens [B', N] and lengths [B'] of the active rows."""
        tokens = self.run.tokens
        return (tokens if self.is_whole else tokens[self.active]), self.lengths

    @property
    def is_even(self) -> bool:
        """Whether all images of the run are being drawn and stand at the same place."""
        return self.is_whole and len(set(self.room)) == 1

    def reserve(self, num: int) -> None:
        """Nothing but the noise of the next `num` positions of each row is asked for now."""
        self.noise.reserve([self.run.num_tokens - room for room in self.room], num)

    def places(self, num: int) -> Tensor:
        """The `num` positions behind the known tokens, [B', num]."""
        if self.is_even:
            return self.noise.places(self.run.num_tokens - self.room[0], num)
        return self.lengths[:, None] + torch.arange(num, device=self.lengths.device)

    def roots(self, known: Tensor) -> Tensor:
        """The last known token of each active row, [B', 1], of tokens [B', N]."""
        if not self.is_even:
            return known.gather(1, self.lengths[:, None] - 1)
        length = self.run.num_tokens - self.room[0]
        return known[:, length - 1 : length]

    def gather(self, rows: Tensor) -> Tensor:
        """The active rows [B', ...] of what the state says of all of its rows."""
        return rows if isinstance(self.in_state, slice) else rows[self.in_state]

    @property
    def front(self) -> Front | None:
        """Given tokens that the state has not read yet; None where there are none."""
        if not any(self._skipped):
            return None
        return Front(self._skipped, torch.tensor(self._skipped, device=self.active.device))

    def spread(self, rows: Tensor) -> Tensor:
        """Values of the active rows [B', ...] laid out over the rows of the state, 0 elsewhere."""
        if isinstance(self.in_state, slice):
            return rows
        out = rows.new_zeros(self.num_in_state, *rows.shape[1:])
        out[self.in_state] = rows
        return out

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

    def settle(self, verdict: Verdict, num_read: Sequence[int] | None = None) -> Verdict:
        """Write what is final into the ledger; what is left of a verdict where a row ends.

        Given tokens right behind what became final are final with it. The one place where a round
        waits for the device.

        Args:
            verdict: of the rule.
            num_read: given tokens of each row that were read before its first round.
        """
        run, counts, tokens = self.run, verdict.counts, verdict.tokens
        stopped = [False] * self.num_active
        found, *read = run.read(*([counts] if self._stop is None else [counts, tokens]))
        given = list(map(min, found, self.room))
        if self._stop is not None:
            width = tokens.shape[1]
            new = [read[0][row * width :][:count] for row, count in enumerate(given)]
            given, stopped = self._stop(self.images, new)
        if given != found:
            counts = torch.tensor(given, device=counts.device)
        if self.is_even and len(set(given)) == 1:
            run.record_block(run.num_tokens - self.room[0], tokens, given[0])
        else:
            run.record_rows(self.active, self.lengths, tokens, counts)
        self.room = [room - count for room, count in zip(self.room, given, strict=True)]
        moved, told, known = counts, given, None
        if self.given is not None:
            places = [run.num_tokens - room for room in self.room]
            known = self._skipped = list(map(self.given.run_at, range(len(places)), places))
            self.room = [room - count for room, count in zip(self.room, known, strict=True)]
            moved = counts + torch.tensor(known, device=counts.device)
            told = [count + more for count, more in zip(given, known, strict=True)]
            if num_read is not None:
                known = [count + more for count, more in zip(known, num_read, strict=True)]
        self.lengths = self.lengths + moved
        self._going = [room > 0 and not end for room, end in zip(self.room, stopped, strict=True)]
        if self.is_whole:
            run.lengths = self.lengths
            run.tell(moved, told, tokens=run.tokens, lengths=run.lengths)
        else:
            run.report(moved, self.active, told, tokens=run.tokens, lengths=run.lengths)
        return Verdict(tokens, counts, verdict.path, given, known)

    def commit(self, verdict: Verdict, num: int, front: Front | None) -> None:
        """Keep the root and the accepted drafts; the last final token is the root of the next round.

        Given tokens that were read in front of these `num` candidates stay. Rows that are finished
        keep nothing: they leave, or wait where they are.
        """
        counts, given = verdict.counts, verdict.given or []
        if front is not None:
            counts, num = counts + front.counts, num + front.most
            given = [count + more for count, more in zip(given, front.nums, strict=True)]
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
            root = verdict.path.new_zeros(len(verdict.path), 1)
            path = torch.cat([root, verdict.path + 1], dim=1)
            kept = self.spread(path if front is None else front.path(path))
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
        self.images, self.is_whole = [self.images[place] for place in places], False
        self.room = [self.room[place] for place in places]
        self._skipped = [self._skipped[place] for place in places]
        self.given = None if self.given is None else self.given.select(places)
        self._going = [True] * len(places)
        self.noise = self.noise.select(keep)
