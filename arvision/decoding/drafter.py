"""What proposes tokens to the decoding loop, and what decides how many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ..contracts import Conditions
from .noise import Noise
from .tree import TokenTree
from .verify import Round, Verdict

LARGEST_TREE = 64
"""Candidates of a tree that branches: the room that models keep behind the last token."""


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

    def join(self, other: NoDrafter) -> None:
        """Nothing to take in."""


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
class Joins(Protocol):
    """A drafter that takes in the rows of another of its kind, of images of the same run."""

    def join(self, other: Any) -> None:
        """Its rows come behind the own ones."""
        ...


@runtime_checkable
class Branches(Protocol):
    """A drafter whose candidates may outnumber the positions left: it keeps its depth to these."""

    branches: bool


@runtime_checkable
class FixedDrafter(Protocol):
    """A drafter whose drafts follow from the last verdict alone, by a function of fixed shapes."""

    has_fixed_shapes: bool


@runtime_checkable
class NeedsHidden(Protocol):
    """A drafter or a rule that may look at `Round.hidden`."""

    needs_hidden: bool


@runtime_checkable
class RepeatsLaws(Protocol):
    """A drafter whose laws are the model's own, of an earlier pass: nobody need look at them again."""

    repeats_laws: bool


@runtime_checkable
class Carries(Protocol):
    """A fixed drafter whose passes leave more for the next one than drafts and their laws."""

    def fix(self, num: int) -> None:
        """Passes of `num` candidates follow: what is kept takes the shapes that they have."""
        ...

    def carry(self) -> list[Tensor]:
        """What a pass leaves, always of the same shapes, the newest first."""
        ...

    def restore(self, carried: list[Tensor]) -> None:
        """Go on from what `carry` gave."""
        ...


class WindowPolicy(Protocol):
    """How many candidates, the last known token included, a pass may hold."""

    def next(self, num_rows: int, most: int) -> int:
        """Candidates of the next pass of `num_rows` images, at most `most`."""
        ...

    def observe(self, num_candidates: int, counts: Sequence[int], room: Sequence[int]) -> None:
        """How many tokens a pass made final in each row, and how many the row still needed."""
        ...


@runtime_checkable
class RowPolicy(Protocol):
    """A policy that gives every row a length of its own; a pass is as long as the longest."""

    def next_of(self, rows: Sequence[int], most: int) -> list[int]:
        """Candidates of each row in the next pass, at most `most`; rows are places of the run."""
        ...

    def observe_of(
        self, rows: Sequence[int], given: Sequence[int], counts: Sequence[int], room: Sequence[int]
    ) -> None:
        """How many tokens a pass made final in each of `rows`, which had `given` candidates."""
        ...
