"""The state of a draft model that follows its target's final tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..contracts import (
    Advances,
    AdvancesAlong,
    Conditions,
    DropsRows,
    Overruns,
    TakesFixedChains,
    TokenModel,
)
from .fixed_step import MakesRoom
from .tree import Topology


class FollowingState:
    """A draft model's state, kept where the target's final tokens are.

    What became final is committed at the start of the next round, in the same call that gives the
    law after it. Drafts stay candidates and are fed again with each new one: any token model will
    do, and nothing has to be taken back after a rejection.

    Args:
        draft: the draft model.
        conditions: one per row.
        guidance_scale: of the draft.
        shape: guided logits to log-probabilities.
        num_tokens: of a row.
    """

    def __init__(
        self,
        draft: TokenModel,
        conditions: Conditions,
        guidance_scale: float,
        shape: Callable[[Tensor], Tensor],
        num_tokens: int,
    ) -> None:
        self.state: Any
        self.state, self.first_logits = draft.start(conditions, guidance_scale)
        self._shape, self._num_tokens = shape, num_tokens
        self._vocab_size = draft.vocab_size
        self.rows = torch.arange(len(conditions), device=self.state.lengths.device)
        self._done = [0] * len(conditions)
        self.passes = 0

    def follow(self, tokens: Tensor, lengths: Tensor, given: Sequence[int] | None = None) -> Tensor:
        """Commit all known tokens but the last, and give the law [B, V] after that one.

        The last known token stays a candidate, so that a state can always be asked again.

        Args:
            tokens: [B, N].
            lengths: [B], known tokens of each row.
            given: the same on the host, where it is known there.
        """
        given = lengths.tolist() if given is None else given
        while True:
            own = self.state.lengths[self.rows]
            pending = lengths - own
            waiting = [known - done for known, done in zip(given, self._done, strict=True)]
            num = min(max(waiting), self.most())
            index = own[:, None] + torch.arange(num, device=own.device)
            fed = tokens.gather(1, index.clamp(max=tokens.shape[1] - 1))
            law = self.extend(fed)
            kept = [min(count - 1, num) for count in waiting]
            self._commit((pending - 1).clamp(max=num), kept, num)
            self._done = [done + count for done, count in zip(self._done, kept, strict=True)]
            if max(waiting) <= num:
                last = (pending - 1)[:, None, None].expand(-1, 1, law.shape[-1])
                return law.gather(1, last)[:, 0]

    @property
    def hidden(self) -> Tensor:
        """What the draft's last layer made of the last candidates, [B, T, C], where it tells."""
        return self.state.hidden[self.rows]

    def most(self) -> int:
        """Candidates that the state takes in one call, at least one."""
        if isinstance(self.state, Overruns) and self.state.allows_overrun:
            return self._num_tokens
        lengths: Tensor = self.state.lengths  # pyright: ignore[reportAttributeAccessIssue]
        return self._num_tokens - 1 - int(lengths.max())

    def extend(self, fed: Tensor, tree: Topology | None = None) -> Tensor:
        """Laws [B, T, V] after candidates [B, T] of the rows that are still going."""
        self.passes += 1
        spread = fed.new_zeros(len(self.state.lengths), fed.shape[1])
        # A target of a larger, padded vocabulary may have tokens that the draft cannot read.
        spread[self.rows] = fed.clamp(max=self._vocab_size - 1)
        if len(fed) == len(spread) and isinstance(self.state, AdvancesAlong):
            logits = self.state.extend_along(spread, tree)
        elif tree is None:
            logits = self.state.extend(spread)
        else:
            laws = tree.laws
            if not tree.is_shared:
                laws = laws.new_zeros(spread.shape).index_copy_(0, self.rows, laws)
            logits = self.state.extend(spread, laws - 1)
        return self._shape(logits[self.rows])

    def _commit(self, counts: Tensor, given: list[int], num: int) -> None:
        if len(given) == len(self.state.lengths) and isinstance(self.state, Advances):
            self.state.advance(counts, given)
            return
        spread = counts.new_zeros(len(self.state.lengths))
        spread[self.rows] = counts
        order = torch.arange(num, device=counts.device)
        self.state.commit(order.expand(len(spread), num), spread)

    @property
    def why_not_fixed(self) -> str | None:
        """Why it cannot go on in passes of fixed shapes, in words; None where it can."""
        state = self.state
        if not (isinstance(state, TakesFixedChains) and isinstance(state, DropsRows)):
            return "the draft model has no passes of fixed shapes"
        return getattr(state, "why_not_fixed", None)

    def fixed(self, num: int) -> FixedFollowing:
        """The same state, followed by a function of fixed shapes from now on.

        Args:
            num: tokens that become final in a pass at most.
        """
        return FixedFollowing(self, num)

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows`."""
        self._done = [self._done[row] for row in rows.tolist()]
        if isinstance(self.state, DropsRows):
            self.state.select(rows)
            self.rows = torch.arange(len(rows), device=rows.device)
        else:
            self.rows = self.rows[rows]


class FixedFollowing:
    """A draft model's state that follows its target where only the device knows how far that is.

    In every round the last `num` known tokens are read again, of which at least one is new: where
    they stand nothing changes. Drafts of a chain are read once, each behind the ones before.

    Args:
        before: what followed so far.
        num: see above.
    """

    renewed = ("_begin",)

    def __init__(self, before: FollowingState, num: int) -> None:
        self.state, self._shape = before.state, before._shape
        self._vocab_size, self._num = before._vocab_size, 0
        self._begin = self.state.lengths
        self.fixed(num)

    why_not_fixed = None

    def fixed(self, num: int) -> FixedFollowing:
        """The same for other passes; those before may have made more tokens final."""
        self._num = max(self._num, num)
        if isinstance(self.state, MakesRoom):
            for width in (self._num, 1):
                self.state.make_room(width, None)
        return self

    def follow(self, tokens: Tensor, lengths: Tensor, given: Sequence[int] | None = None) -> Tensor:
        """The law [B, V] after the last known token; see `FollowingState.follow`."""
        start = (lengths - self._num).clamp(min=0)
        index = start[:, None] + torch.arange(self._num, device=lengths.device)
        fed = tokens.gather(1, index.clamp(max=tokens.shape[1] - 1))
        logits = self._pass(fed, start)
        last = (lengths - 1 - start)[:, None, None].expand(-1, 1, logits.shape[-1])
        self._begin = lengths - 1
        return self._shape(logits.gather(1, last)[:, 0])

    def extend(self, fed: Tensor, tree: Topology | None = None) -> Tensor:
        """Laws [B, T, V] after the last known token and drafts, [B, T]; [B, 1, V] of chains.

        The drafts of a chain but the last were read in the calls before.
        """
        if tree is not None:
            return self._shape(self._pass(fed, self._begin, tree))
        return self._shape(self._pass(fed[:, -1:], self._begin + fed.shape[1] - 1))

    def _pass(self, fed: Tensor, begin: Tensor, *tree: Topology) -> Tensor:
        return self.state.extend_fixed(fed.clamp(max=self._vocab_size - 1), begin, *tree)

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows`."""
        self.state.select(rows)
        self._begin = self._begin[rows]
