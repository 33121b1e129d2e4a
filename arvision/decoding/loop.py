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
    AdvancesAlong,
    Conditions,
    DropsRows,
    Edit,
    Editable,
    Overruns,
    Samples,
    Seeds,
    TellsHidden,
    TokenModel,
    TokenState,
)
from .drafter import (
    LARGEST_TREE,
    Attached,
    Drafter,
    FixedDrafter,
    FixedWindow,
    Hears,
    Joins,
    NoDrafter,
    WindowPolicy,
    most_candidates,
)
from .fixed_step import fixed_rounds, why_no_fixed_rounds
from .given import Front, KeepsGiven, read_beginning
from .run import Run
from .tree import Topology, is_no_tree
from .verify import Round, Rule, Verdict, first_round

__all__ = ["LARGEST_TREE", "Drafter", "FixedWindow", "NoDrafter", "TokenLoop", "WindowPolicy"]
__all__ += ["StopCheck", "decode_tokens"]

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
        drafter.start(rows.noise, model.vocab_size, run.num_tokens)
        if isinstance(drafter, Attached):
            drafter.attach(state, conditions)
        hidden = state.hidden if isinstance(state, TellsHidden) else None
        if rows.given is not None:
            if isinstance(drafter, KeepsGiven):
                drafter.keep(rows.given)
            logits, hidden = read_beginning(state, rows.given, logits, hidden)
        shape = self._shape if shape is None else shape
        prefill = first_round(logits, shape, rows.noise, rows.lengths, hidden)
        run.watch_laws(prefill.target_logp)
        rows.learn(drafter, prefill, self._rule(prefill), rows.num_read)
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

    def drop(self, places: Sequence[int]) -> None:
        """Draw the images in these places no further."""
        self.rows.end(places)
        self.rows.leave(self._drafter)

    def round(self) -> None:
        """Draft, ask the model, decide and commit; finished images leave."""
        run, rows, state, drafter = self.run, self.rows, self._state, self._drafter
        known, lengths = rows.known()
        room = rows.room
        least = min(*room, rows.frozen_room)
        most = most_candidates(room, least, self._can_overrun, drafter)
        num = max(1, self._policy.next(rows.num_active, most))
        run.noise.reserve(run.num_tokens - min(room) + num)
        run.next_pass(rows.active)
        # Of images that entered later, a round has another number.
        number: Any = run.passes[rows.active][:, None] if self._is_mixed else run.num_passes
        front = rows.front
        if front is not None and not front.leaves_room(run.num_tokens, room, num, drafter):
            num = 1
        tree = drafter.propose(known, lengths, num - 1, number)
        if tree.logq is not None and not isinstance(drafter, FixedDrafter):
            run.watch_laws(tree.logq)  # of another model
        # A drafter may have less to say than asked: the pass shrinks to what there is.
        num = tree.tokens.shape[1] + 1
        root = known.gather(1, lengths[:, None] - 1)
        if tree.parents is not None and not tree.parents.is_cpu:
            run.watch_tree(is_no_tree(tree.parents))
        branches = tree.topology(lengths.device)
        order = torch.arange(num, device=lengths.device)
        positions = lengths[:, None] + (order if branches is None else branches.rooted.depths)
        if rows.given is not None:
            tree = rows.given.fill(tree, positions[:, 1:])
        fed = torch.cat([root, tree.tokens.clamp(min=0)], dim=1)
        if front is not None:
            fed = front.feed(known, lengths, fed)
        self.candidates += fed.numel()
        self.windows.append(num)
        logits = rows.extend(fed, branches, front, tree.edit)
        hidden = cast(TellsHidden, state).hidden if self._tells_hidden else None
        hidden, logits = None if hidden is None else hidden[rows.in_state], logits[rows.in_state]
        if front is not None:
            logits = front.pick(logits, num)
            hidden = None if hidden is None else front.pick(hidden, num)
        laws = self._shape(logits)
        run.watch_laws(laws)
        batch = Round(tree.tokens, tree.logq, laws, positions, rows.noise, number, branches, hidden)
        judged = batch
        if rows.given is not None:
            judged = replace(batch, target_logp=rows.given.pin(laws, positions))
        verdict = rows.learn(drafter, batch, self._rule(judged))
        self._policy.observe(num, verdict.given or (), room)
        rows.commit(verdict, num, front)
        rows.leave(drafter)


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
        self._goes_along = isinstance(state, AdvancesAlong)
        self.images = list(range(run.batch) if places is None else places)
        self.active = torch.tensor(self.images, device=run.tokens.device)
        self.noise = run.noise if places is None else run.noise.select(self.active)
        self._is_whole = places is None
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
        self._going, self._is_whole = self._going + other._going, False
        self.num_in_state += other.num_in_state

    def end(self, places: Sequence[int]) -> None:
        """Count the images in these places of the run as finished."""
        self._going = [image not in places for image in self.images]

    def known(self) -> tuple[Tensor, Tensor]:
        """Tokens [B', N] and lengths [B'] of the active rows."""
        tokens = self.run.tokens
        return (tokens if self._is_whole else tokens[self.active]), self.lengths

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

    def extend(
        self, fed: Tensor, shape: Topology | None, front: Front | None, edit: Edit | None
    ) -> Tensor:
        """Logits of the state's rows behind what is fed for the active ones.

        Args:
            fed: [B', T], root in front, and before that the given tokens of `front`.
            shape: of the drafts; None for a chain.
            front: see above.
            edit: of this pass.
        """
        fed, rooted, state = self.spread(fed), None if shape is None else shape.rooted, self._state
        is_whole = isinstance(self.in_state, slice)
        if edit is None and front is None and is_whole and self._goes_along:
            return cast(AdvancesAlong, state).extend_along(fed, rooted)
        parents = None if rooted is None else rooted.laws - 1
        if parents is not None and front is not None:
            parents = front.parents(parents)
        if parents is not None and parents.dim() == 2:
            parents = self.spread(parents + 1) - 1
        if edit is not None:
            if rooted is not None and rooted.listed is not None and front is None:
                parents = torch.tensor(rooted.listed)
            return cast(Editable, state).extend_edited(fed, parents, edit)
        return state.extend(fed) if parents is None else state.extend(fed, parents)

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

    def learn(
        self,
        drafter: Drafter,
        batch: Round,
        verdict: Verdict,
        num_read: Sequence[int] | None = None,
    ) -> Verdict:
        """Settle a round and show it to the drafter; what is left of the verdict."""
        if not isinstance(drafter, Hears):
            verdict = self.settle(verdict, num_read)[0]
            drafter.observe(batch, verdict)
            return verdict
        wanted = [verdict.tokens, *drafter.asks(batch, verdict)]
        verdict, (tokens, *told) = self.settle(verdict, num_read, wanted)
        drafter.observe(batch, verdict)
        width = verdict.tokens.shape[1]
        new = [tokens[row * width : row * width + n] for row, n in enumerate(verdict.given or ())]
        drafter.hear(new, told)
        return verdict

    def settle(
        self,
        verdict: Verdict,
        num_read: Sequence[int] | None = None,
        wanted: Sequence[Tensor] = (),
    ) -> tuple[Verdict, list[list[int]]]:
        """Write what is final into the ledger; what is left of a verdict where a row ends.

        Given tokens right behind what became final are final with it. The one place where a round
        waits for the device.

        Args:
            verdict: of the rule.
            num_read: given tokens of each row that were read before its first round.
            wanted: integers that come to the host as well.
        """
        run, counts, tokens = self.run, verdict.counts, verdict.tokens
        counts = torch.minimum(counts, run.num_tokens - self.lengths)
        stopped = [False] * self.num_active
        if self._stop is not None and not wanted:
            wanted = [tokens]
        given, *read = run.read(counts, *wanted)
        if self._stop is not None:
            width = tokens.shape[1]
            new = [read[0][row * width : row * width + num] for row, num in enumerate(given)]
            stays, stopped = self._stop(self.images, new)
            if stays != given:
                given, counts = stays, torch.tensor(stays, device=counts.device)
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
        run.report(moved, self.active, told, tokens=run.tokens, lengths=run.lengths)
        return Verdict(tokens, counts, verdict.path, given, known), read

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
            path = torch.nn.functional.pad(verdict.path + 1, (1, 0))
            kept = self.spread(path if front is None else front.path(path))
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
        self.images, self._is_whole = [self.images[place] for place in places], False
        self.room = [self.room[place] for place in places]
        self._skipped = [self._skipped[place] for place in places]
        self.given = None if self.given is None else self.given.select(places)
        self._going = [True] * len(places)
        self.noise = self.noise.select(keep)
