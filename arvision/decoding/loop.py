"""The one decoding loop of token models: draft, extend, verify, commit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from ..contracts import (
    Conditions,
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
    Branches,
    Drafter,
    Joins,
    NoDrafter,
    RepeatsLaws,
    RowPolicy,
    WindowPolicy,
)
from .fixed_step import fixed_rounds, why_no_fixed_rounds
from .given import KeepsGiven, read_beginning
from .logits import joined, laws_of, leave_guidance, written
from .rows import Rows, StopCheck
from .run import Run
from .tree import is_no_tree
from .verify import Round, Rule, first_round

__all__ = ["LARGEST_TREE", "Drafter", "FixedWindow", "NoDrafter", "TokenLoop", "WindowPolicy"]
__all__ += ["StopCheck", "decode_tokens"]


class FixedWindow:
    """The same number of candidates in every pass."""

    def __init__(self, window: int) -> None:
        self.window = window

    def next(self, num_rows: int, most: int) -> int:
        """The window, cut to what the images still need."""
        return min(self.window, most)

    def observe(self, num_candidates: int, counts: Sequence[int], room: Sequence[int]) -> None:
        """Nothing to adapt."""


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
        why_not = why_no_fixed_rounds(run, state, drafter)
        if why_not is None:
            candidates, windows = fixed_rounds(loop.rows, state, drafter, rule, shape, policy)
            return run.samples(candidates=candidates, windows=windows, **run.told)
        run.warn_of_loop(why_not)
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

    rows: Rows
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
        self._by_row = policy if isinstance(policy, RowPolicy) else None

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
        rows = Rows(run, state, self._stop, places)
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
        prefill = first_round(logits, shape, rows.noise, rows.lengths, hidden)
        verdict = self._rule(prefill)
        run.watch_laws(prefill.target)
        rows.learn(drafter, prefill, verdict, rows.num_read)
        rows.leave(drafter)
        if not self.places:
            self._take(rows, state, drafter)
        elif rows.num_active:
            self._state.join(state)
            cast(Joins, self._drafter).join(drafter)
            self.rows.join(rows)
            self._is_mixed = True
        return state

    def _take(self, rows: Rows, state: TokenState, drafter: Drafter) -> None:
        """Go on with these rows alone."""
        self.rows, self._state, self._drafter = rows, state, drafter
        self._is_open, self._is_mixed = True, False
        leave_guidance(state, rows.lengths)
        # Asked once: a protocol's answer takes as long as a small operator.
        self._tells_hidden = isinstance(state, TellsHidden)
        self._can_overrun = isinstance(state, Overruns) and state.allows_overrun
        self._can_branch = isinstance(drafter, Branches)
        self._repeats_laws = isinstance(drafter, RepeatsLaws)

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
        own = None
        if self._by_row is not None:
            own = self._by_row.next_of(rows.images, self._most(room))
        num = max(1, max(own) if own else self._policy.next(rows.num_active, self._most(room)))
        rows.reserve(num)
        run.next_pass(None if rows.is_whole else rows.active)
        # Of images that entered later, a round has another number.
        number: Any = run.passes[rows.active][:, None] if self._is_mixed else run.num_passes
        front = rows.front
        if front is not None and not front.leaves_room(run.num_tokens, room, num, drafter):
            num = 1
        tree = drafter.propose(known, lengths, num - 1, number)
        if tree.logq is not None and not self._repeats_laws:
            run.watch_laws(tree.logq)  # of another model
        if own is not None and min(own) < num:
            tree = tree.shortened([length - 1 for length in own])
        # A drafter may have less to say than asked: the pass shrinks to what there is.
        num = tree.tokens.shape[1] + 1
        if tree.parents is not None and not tree.parents.is_cpu:
            run.watch_tree(is_no_tree(tree.parents))
        topology = tree.topology(lengths.device)
        positions = (
            rows.places(num) if topology is None else lengths[:, None] + topology.rooted.depths
        )
        if rows.given is not None:
            tree = rows.given.fill(tree, positions[:, 1:])
        fed = rows.roots(known)
        if num > 1:
            fed = torch.cat([fed, tree.tokens.clamp(min=0)], dim=1)
        if front is not None:
            fed = front.feed(known, lengths, fed)
        self.candidates += fed.numel()
        self.windows.append(num)
        logits = rows.extend(fed, topology, front, tree.edit)
        hidden = cast(TellsHidden, state).hidden if self._tells_hidden else None
        hidden, logits = None if hidden is None else rows.gather(hidden), rows.gather(logits)
        if front is not None:
            logits = front.pick(joined(logits), num)
            hidden = None if hidden is None else front.pick(hidden, num)
        laws = laws_of(self._shape, logits)
        batch = Round(tree.tokens, tree.logq, laws, positions, rows.noise, number, topology, hidden)
        judged = batch
        if rows.given is not None:
            judged = replace(batch, target=rows.given.pin(written(laws), positions))
        verdict = self._rule(judged)
        run.watch_laws(laws)
        verdict = rows.learn(drafter, batch, verdict)
        if self._by_row is None or own is None:
            self._policy.observe(num, verdict.given or (), room)
        else:
            fed_of = [min(length, num) for length in own]
            self._by_row.observe_of(rows.images, fed_of, verdict.given or (), room)
        rows.commit(verdict, num, front)
        rows.leave(drafter)
