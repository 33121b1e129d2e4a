"""Which images of a run a token loop still draws: their places, their ends, the one read of a round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..contracts import Advances, AdvancesAlong, DropsRows, Edit, Editable, TokenState
from .drafter import Drafter, Hears
from .fixed_step import FixedStep
from .given import Front
from .run import Run
from .tree import Topology
from .verify import Round, Verdict

StopCheck = Callable[[Sequence[int], Sequence[Sequence[int]]], "tuple[list[int], list[bool]]"]
"""Ends rows before their last token: rows of the batch and the new tokens of each, to how many of
these stay and which rows are finished."""


class Rows:
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

    def join(self, other: Rows) -> None:
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

    def catch_up(self, step: FixedStep) -> None:
        """Read how far passes that kept the books themselves have come, and end rows there."""
        run, every = self.run, self.run.steps.reads_every
        before = [run.num_tokens - room for room in self.room]
        wanted, width = [step.lengths], step.window * every
        if self._stop is not None:
            places = torch.tensor(before, device=step.lengths.device)[:, None]
            places = places + torch.arange(width, device=places.device)
            known = run.tokens[self.active]
            wanted.append(known.gather(1, places.clamp(max=run.num_tokens - 1)))
        found, *read = run.read(*wanted)
        given = [now - then for now, then in zip(found, before, strict=True)]
        going = [old and now < run.num_tokens for old, now in zip(self._going, found, strict=True)]
        if self._stop is not None:
            new = [read[0][row * width : row * width + num] for row, num in enumerate(given)]
            given, stopped = self._stop(self.images, new)
            stands = [then + num for then, num in zip(before, given, strict=True)]
            going = [goes and not end for goes, end in zip(going, stopped, strict=True)]
            if going != self._going:
                ends = [run.num_tokens if g else at for g, at in zip(going, stands, strict=True)]
                step.end(stands, ends)
                run.forget(self.active, step.lengths)
            found = stands
        self.room, self._going = [run.num_tokens - length for length in found], going
        self.lengths = step.lengths
        run.tell(step.lengths, given, tokens=run.tokens, lengths=run.lengths)

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
        waits for the device; what is `wanted` comes with it.

        Args:
            verdict: of the rule.
            num_read: given tokens of each row that were read before its first round.
            wanted: integers.
        """
        run, counts, tokens = self.run, verdict.counts, verdict.tokens
        stopped = [False] * self.num_active
        if self._stop is not None and not wanted:
            wanted = [tokens]
        found, *read = run.read(counts, *wanted)
        given = list(map(min, found, self.room))
        if self._stop is not None:
            width = tokens.shape[1]
            new = [read[0][row * width : row * width + num] for row, num in enumerate(given)]
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
        self.images, self.is_whole = [self.images[place] for place in places], False
        self.room = [self.room[place] for place in places]
        self._skipped = [self._skipped[place] for place in places]
        self.given = None if self.given is None else self.given.select(places)
        self._going = [True] * len(places)
        self.noise = self.noise.select(keep)
