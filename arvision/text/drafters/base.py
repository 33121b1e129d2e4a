"""What drafters of text share: each row's history, the registry, and the union of two drafters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...contracts import Conditions
from ...decoding.noise import Noise
from ...decoding.tree import TokenTree, join_rows
from ...decoding.verify import Round, Verdict
from ...errors import InputError
from ...registry import Registry

DRAFTERS: Registry[type[TextDrafter]] = Registry("drafter", entry_point_group="arvision.drafters")

DRAWS = ("chosen", "independent", "distinct")
"""How drafts come about: chosen (no law), siblings drawn independently from one law, or drawn from
it one after another without replacement. Rules ask."""


def register(name: str, *, summary: str) -> Any:
    """Class decorator: file a drafter under `name`, with a line on it."""
    return DRAFTERS.register(name, summary=summary)


class TextDrafter:
    """A drafter that knows what each row's text is so far.

    Subclasses implement `tree_of`, for one row, or `propose`, for all. What a drafter has learned
    stays with the object; what belongs to one run begins anew with `start`.

    Attributes:
        draws: see `DRAWS`.
        branches: whether what it drafts may branch.
        takes_rows: whether it learns rightly from passes in which a row had fewer candidates than it
            proposed, the first ones.
        num_draft: candidates that it drafts per pass when nothing else is asked.
        needs_hidden: whether it drafts from what the target's last layer says.
        histories: each active row's prompt and final tokens; up to the prefill's where `is_fixed`.
        is_fixed: whether passes of fixed shapes run: then nobody tells what became final, and
            `observe` and `propose` may do no more than what the device does by itself.
    """

    draws: ClassVar[str] = "chosen"
    branches: ClassVar[bool] = True
    needs_hidden: ClassVar[bool] = False
    takes_rows: ClassVar[bool] = True
    num_draft: int = 10
    unread = ("histories", "_fresh", "_seen", "_is_told")
    histories: list[list[int]]
    is_fixed: bool = False

    def start(self, noise: Noise, vocab_size: int, num_tokens: int) -> None:
        """A new batch begins."""
        self.noise, self.vocab_size, self.num_tokens = noise, vocab_size, num_tokens
        self.histories = [[] for _ in range(len(noise))]
        self.is_fixed = False

    def watches(self, model: Any) -> tuple[int, ...]:
        """The layers of the target whose inputs it drafts from, see `HFState.features`."""
        return ()

    def attach(self, state: Any, conditions: Conditions) -> None:
        """The prompts were read; `state` is the target's."""
        self.histories = [torch.as_tensor(ids).tolist() for ids in conditions]
        self._fresh = [[] for _ in self.histories]
        self._seen, self._is_told = [0] * len(self.histories), False
        self.begin(state)

    def begin(self, state: Any) -> None:
        """Prepare for the prompts in `histories`."""

    def learn(self, row: int, new: list[int]) -> None:
        """Active row `row` has `new` tokens, which `histories[row]` already ends with."""

    def asks(self, batch: Round, verdict: Verdict) -> Sequence[Tensor]:
        """See `arvision.decoding.drafter.Hears`."""
        return ()

    def hear(self, new: Sequence[list[int]], told: Sequence[list[int]]) -> None:
        """Write down what became final; see `arvision.decoding.drafter.Hears`."""
        self._is_told = True
        self._fresh = [own + more for own, more in zip(self._fresh, new, strict=True)]

    def follow(self, tokens: Tensor, lengths: Tensor) -> None:
        """Add what became final to the histories, and learn from it.

        Outside of the decoding loop nobody tells what it is, and it is read here.
        """
        if self.is_fixed:
            return
        if not self._is_told:
            known = zip(tokens.tolist(), lengths.tolist(), self._seen, strict=True)
            self._fresh = [row[seen:length] for row, length, seen in known]
        for row, new in enumerate(self._fresh):
            if new:
                self.histories[row] += new
                self._seen[row] += len(new)
                self.learn(row, new)
        self._fresh = [[] for _ in self._fresh]

    @property
    def why_not_fixed(self) -> str | None:
        """Why its drafts are not made by a function of fixed shapes, in words; None where they are."""
        return f"the drafts of {type(self).__name__} are made on the host"

    @property
    def has_fixed_shapes(self) -> bool:
        """See `arvision.decoding.drafter.FixedDrafter`."""
        return self.why_not_fixed is None

    def fix(self, num: int) -> None:
        """Passes of fixed shapes follow, see `arvision.decoding.drafter.Carries`."""
        self.is_fixed = True

    def carry(self) -> list[Tensor]:
        """What a pass leaves for the next one besides its drafts; nothing by default."""
        return []

    def restore(self, carried: list[Tensor]) -> None:
        """Go on from what `carry` gave."""

    def tree_of(self, row: int, num: int) -> tuple[list[int], list[int]]:
        """Tokens and parents of at most `num` candidates for an active row."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it drafts")

    def propose(self, tokens: Tensor, lengths: Tensor, num: int, round_number: int) -> TokenTree:
        """See `arvision.decoding.loop.Drafter`."""
        self.follow(tokens, lengths)
        rows = [self.tree_of(row, num) for row in range(len(lengths))]
        return join_rows(rows, tokens.device)

    def observe(self, batch: Round, verdict: Verdict) -> None:
        """Learn from a pass."""

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows`."""
        keep = rows.tolist()
        self.noise = self.noise.select(rows)
        self.histories = [self.histories[row] for row in keep]
        self._fresh = [self._fresh[row] for row in keep]
        self._seen = [self._seen[row] for row in keep]


class Trie:
    """Candidates of one row: paths are added until there are `num` nodes."""

    def __init__(self, num: int) -> None:
        self.num = num
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self._children: dict[tuple[int, int], int] = {}

    @property
    def is_full(self) -> bool:
        """Whether no node can be added."""
        return len(self.tokens) >= self.num

    def child(self, parent: int, token: int) -> int | None:
        """The child of `parent` with this token, made if there is room, else None."""
        node = self._children.get((parent, token))
        if node is None and not self.is_full:
            node = self._children[parent, token] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(parent)
        return node

    def add(self, path: list[int]) -> None:
        """Add a path from the root, as far as there is room."""
        above = -1
        for token in path:
            node = self.child(above, token)
            if node is None:
                return
            above = node

    @property
    def tree(self) -> tuple[list[int], list[int]]:
        """Tokens and parents."""
        return self.tokens, self.parents


def union(first: TokenTree, second: TokenTree, num: int) -> TokenTree:
    """Both trees in one, at most `num` candidates per row; those of `first` come first.

    Candidates of `second` that stand on a path of `first` are that path's.
    """
    rows = []
    sides = [_on_host(tree) for tree in (first, second)]
    for row in range(len(first.tokens)):
        trie = Trie(num)
        for side in sides:
            place: list[int | None] = []
            for token, parent in zip(*side[row], strict=True):
                above = -1 if parent < 0 else place[parent]
                node = None if token < 0 or above is None else trie.child(above, token)
                place.append(node)
        rows.append(trie.tree)
    return join_rows(rows, first.tokens.device)


def _on_host(tree: TokenTree) -> Sequence[tuple[list[int], list[int]]]:
    """Tokens and parents of each row."""
    if tree.rows is not None:
        return tree.rows
    parents = tree.parents
    if parents is None:
        parents = torch.arange(-1, tree.tokens.shape[1] - 1)
    above = parents.expand(tree.tokens.shape).tolist()
    return list(zip(tree.tokens.tolist(), above, strict=True))


class Combined(TextDrafter):
    """The trees of two drafters merged: the first one's candidates, then the second's.

    Args:
        first: takes what it needs of the candidates.
        second: fills up.
        share: part of the candidates that the first one may take.

    Raises:
        InputError: a drafter that draws its candidates: a rule would have to know both laws.
    """

    def __init__(self, first: TextDrafter, second: TextDrafter, share: float = 0.6) -> None:
        for part in (first, second):
            if part.draws != "chosen":
                raise InputError(
                    f"{type(part).__name__} draws its candidates: only drafters that choose them "
                    "can be combined"
                )
        self.first, self.second, self.share = first, second, share
        self.num_draft = max(first.num_draft, second.num_draft)

    @property
    def parts(self) -> tuple[TextDrafter, TextDrafter]:
        """Both drafters."""
        return self.first, self.second

    def watches(self, model: Any) -> tuple[int, ...]:
        """What its parts draft from.

        Raises:
            InputError: two parts that look at different layers.
        """
        found = {part.watches(model) for part in self.parts} - {()}
        if len(found) > 1:
            names = " and ".join(type(part).__name__ for part in self.parts)
            raise InputError(f"{names} look at different layers: expected one such drafter")
        return found.pop() if found else ()

    def start(self, noise: Noise, vocab_size: int, num_tokens: int) -> None:
        """A new batch begins."""
        for part in self.parts:
            part.start(noise, vocab_size, num_tokens)

    def attach(self, state: Any, conditions: Conditions) -> None:
        """The prompts were read."""
        for part in self.parts:
            part.attach(state, conditions)

    def propose(self, tokens: Tensor, lengths: Tensor, num: int, round_number: int) -> TokenTree:
        """See `arvision.decoding.loop.Drafter`."""
        few = max(1, round(self.share * num))
        first = self.first.propose(tokens, lengths, min(few, num), round_number)
        second = self.second.propose(tokens, lengths, num, round_number)
        return union(first, second, num)

    def asks(self, batch: Round, verdict: Verdict) -> Sequence[Tensor]:
        """What either asks for."""
        asked = [list(part.asks(batch, verdict)) for part in self.parts]
        self._num_asked = len(asked[0])
        return asked[0] + asked[1]

    def hear(self, new: Sequence[list[int]], told: Sequence[list[int]]) -> None:
        """Both write it down."""
        self.first.hear(new, told[: self._num_asked])
        self.second.hear(new, told[self._num_asked :])

    def observe(self, batch: Round, verdict: Verdict) -> None:
        """Both learn from the pass."""
        for part in self.parts:
            part.observe(batch, verdict)

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows`."""
        for part in self.parts:
            part.select(rows)


def combine(first: TextDrafter, second: TextDrafter, share: float = 0.6) -> Combined:
    """One drafter out of two; see `Combined`."""
    return Combined(first, second, share)
