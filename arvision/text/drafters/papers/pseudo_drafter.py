"""Drafts from pseudo tokens: guesses of one pass are the candidates of the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....decoding.tree import TokenTree, is_chain
from ....decoding.verify import Round, Verdict
from ....decoding.window import CostTable
from ....errors import InputError, unknown_name
from ...costs import width_costs
from ..base import TextDrafter, register
from .guess_tree import SIZES, GuessTree, Rates, best_size, dynamic_trees, unit_trees
from .pseudo import NUM_RANKS, load_pseudo

SHAPES = ("tree", "chain", "unit")


@dataclass(frozen=True)
class Layout:
    """The trees of a batch as tensors: of one row where all are the same, and of all rows otherwise.

    Attributes:
        parents: of all places but the first, see `TokenTree`.
        pseudo: [R, T], numbers of pseudo tokens and their members; -1 for other places.
        guesses: [R, T], which guess a candidate is; -1 for other places.
        owners, numbers: [R, T + 1], see `GuessTree`.
        carried: [R, C + 1], likewise.
        speakers: [R, C + 1, K, E], likewise.
    """

    parents: Tensor | None
    pseudo: Tensor
    guesses: Tensor
    owners: Tensor
    numbers: Tensor
    carried: Tensor
    speakers: Tensor


@lru_cache(maxsize=256)
def laid_out(trees: tuple[GuessTree, ...], width: int, device: torch.device) -> Layout:
    """Trees side by side, the smaller ones padded with a chain behind their last place.

    Args:
        trees: of all rows, or one for all.
        width: guesses of a pseudo token.
        device: of the tensors.
    """
    size = max(tree.size for tree in trees)
    tokens = max(len(tree.carried) for tree in trees)
    rows: dict[str, list[Any]] = {name: [] for name in ("parents", "pseudo", "guesses", "owners")}
    rows |= {name: [] for name in ("numbers", "carried", "speakers")}
    for tree in trees:
        more, num = range(tree.size, size), len(tree.guesses)
        members = tree.speakers.shape[2]
        told = zip(tree.numbers[1 + num :], tree.members[1 + num :], strict=True)
        fewer = tokens - len(tree.carried)
        rows["parents"].append([*tree.parents, *(place - 1 for place in more)])
        rows["pseudo"].append([-1] * num + [n * members + m for n, m in told] + [-1] * len(more))
        own = [level * width + rank for level, rank in tree.guesses]
        rows["guesses"].append(own + [-1] * (size - num))
        rows["owners"].append([*tree.owners, *(place + 1 for place in more)])
        rows["numbers"].append([*tree.numbers, *(-1 for _ in more)])
        rows["carried"].append([*tree.carried, *([0] * fewer)])
        rows["speakers"].append(np.pad(tree.speakers, ((0, fewer), (0, 0), (0, 0))))
    parents = torch.tensor(rows.pop("parents"))
    above = parents.to(device) if len(trees) > 1 else parents[0]
    shares_chain = len(parents) == 1 and is_chain(parents[0].tolist())
    tables = {name: torch.from_numpy(np.array(row)).to(device) for name, row in rows.items()}
    return Layout(None if shares_chain else above, **tables)


@register("pseudo", summary="pseudo tokens of `arvision train-draft`: PPD, hidden transfer, LUD")
class PseudoDrafter(TextDrafter):
    """A tree of the guesses that the last pass made at its pseudo tokens.

    Shapes: "tree" holds the guesses most often right in combination, by the acceptances that were
    measured when the pseudo tokens were fitted, and its candidates carry the next pseudo tokens where
    they are worth the most; its size is that of the most tokens per second by what passes cost on
    this machine. "chain" is the same with first guesses alone. "unit" is a chain of the best guesses up to the first whose confidence is below
    `threshold`: with rule "unverified" it becomes text unseen, with any other one the target verifies
    it.

    Args:
        module: pseudo tokens, or the folder of `arvision train-draft`.
        shape: see above; None for that of the module.
        threshold: see above; None for that of the module.
        num_draft: candidates and pseudo tokens of a pass; None for the best size.
        cost_table: see `arvision.decoding.window.CostTable`; None to measure the passes once per model
            and machine.

    Raises:
        InputError: a value out of range; at use, another width or fewer layers than the module was
            fitted for, or a model without pseudo tokens.
    """

    takes_rows = False  # the guesses of the next round stand behind the last candidates
    rule: str = "greedy"
    """What judges the drafts; `arvision.generate` tells."""

    def __init__(
        self,
        module: Any,
        shape: str | None = None,
        threshold: float | None = None,
        num_draft: int | None = None,
        cost_table: Any = None,
    ) -> None:
        self.module = load_pseudo(module) if isinstance(module, str | Path) else module
        self.shape = self.module.shape if shape is None else shape
        self.threshold = self.module.threshold if threshold is None else threshold
        if self.shape not in SHAPES:
            raise unknown_name("shape", self.shape, SHAPES)
        if not 0 <= self.threshold <= 1 or (num_draft is not None and num_draft < 1):
            raise InputError(
                f"threshold {self.threshold}, num_draft {num_draft}: expected a probability and a "
                "number >= 1"
            )
        self._costs = None if cost_table is None else CostTable(cost_table)
        self._given = num_draft
        count, members = self.module.num_guesses, self.module.num_ensemble
        largest = unit_trees(count, members, True)[-1].size if self.shape == "unit" else SIZES[-1]
        self.num_draft = num_draft or largest

    @property
    def rules(self) -> tuple[str, ...]:
        """Rules that suit the shape."""
        return ("greedy", "gumbel", "unverified") if self.shape == "unit" else ("greedy", "gumbel")

    def begin(self, state: Any) -> None:
        """Hand the pseudo tokens to the target's state, and choose a size.

        Raises:
            InputError: see the class.
        """
        if not hasattr(state, "pseudo"):
            raise InputError(
                "this model's state takes no pseudo tokens: expected a language model of transformers"
            )
        sizes = state.model.sizes
        if sizes.hidden_size != self.module.hidden_size:
            raise InputError(
                f"pseudo tokens of width {self.module.hidden_size}: the model has "
                f"{sizes.hidden_size}"
            )
        deepest = max(getattr(self.module, "layers", (0,)))
        if deepest >= sizes.num_layers:
            raise InputError(
                f"pseudo tokens of layer {deepest}: the model has {sizes.num_layers} layers"
            )
        self.module.to(state.model.device)
        state.pseudo = self.module.vectors().detach()
        self._states = [0] * len(self.histories)
        self._guesses: Tensor | None = None
        self._layout: Layout | None = None
        self._width = min(NUM_RANKS, self.vocab_size) if self.shape == "tree" else 1
        ranks = self.module.ranks[:, : self._width].double().nan_to_num(nan=0.0).clamp(0, 1)
        self._rates: Rates = tuple(map(tuple, ranks.cummin(dim=1).values.tolist()))
        self._size = self.num_draft
        if self._given is None and self.shape != "unit":
            rows = len(self.histories)
            costs = self._costs or CostTable(width_costs(state.model, rows))
            members = self.module.num_ensemble
            self._size = best_size(self._rates, members, lambda n: costs.seconds(rows, n))

    def trees(self, num: int) -> tuple[GuessTree, ...]:
        """A tree of at most `num` places for each number of guesses at hand."""
        count, members = self.module.num_guesses, self.module.num_ensemble
        if self.shape != "unit":
            return dynamic_trees(self._rates, num, members)
        trees = unit_trees(count, members, self.rule != "unverified")
        fitting = [tree for tree in trees if tree.size <= num]
        return tuple(fitting[min(n, len(fitting) - 1)] for n in range(count + 1)) if fitting else ()

    def propose(self, tokens: Tensor, lengths: Tensor, num: int, round_number: int) -> TokenTree:
        """See `arvision.decoding.loop.Drafter`."""
        self.follow(tokens, lengths)
        trees = self.trees(min(num, self._size)) if num else ()
        if not trees:
            self._layout, self._states = None, [0] * len(tokens)
            return TokenTree(tokens[:, :0])
        own = tuple(trees[state] for state in self._states)
        own = own if len(set(own)) > 1 else own[:1]
        layout = self._layout = laid_out(own, self._width, tokens.device)
        pseudo, guesses = (part.expand(len(tokens), -1) for part in (layout.pseudo, layout.guesses))
        drafts = torch.where(pseudo >= 0, pseudo + self.vocab_size, -1)
        if self._guesses is not None:
            found = self._guesses.flatten(1).gather(1, guesses.clamp(min=0))
            drafts = torch.where(guesses >= 0, found, drafts)
        owners, numbers = (part.expand(len(tokens), -1) for part in (layout.owners, layout.numbers))
        return TokenTree(
            drafts,
            parents=layout.parents,
            edit=self.module.edit(owners, numbers),
            num_levels=self.module.num_guesses,
        )

    def asks(self, batch: Round, verdict: Verdict) -> Sequence[Tensor]:
        """Read the guesses behind each row's last accepted candidate; how many there are."""
        if batch.drafts.shape[1] == 0 or self._layout is None:  # the prefill
            return ()
        last = verdict.counts - 1
        rows = torch.arange(len(last), device=last.device)
        if verdict.path is not None:
            node = verdict.path[rows, (last - 1).clamp(min=0)] + 1
            last = torch.where(last > 0, node, 0)
        speakers, carried = self._layout.speakers, self._layout.carried
        speakers = speakers.expand(len(last), *speakers.shape[1:])[rows, last]
        carried = carried.expand(len(last), -1)[rows, last]
        said = batch.target_logp[rows[:, None, None], speakers].mean(2)
        self._guesses = said.topk(self._width, dim=-1).indices
        if self.shape == "unit":
            is_sure = said.float().softmax(-1).amax(-1) >= self.threshold
            is_carried = torch.arange(is_sure.shape[1], device=last.device) < carried[:, None]
            carried = (is_sure & is_carried).cumprod(1).sum(1)
        return (carried,)

    def hear(self, new: Sequence[list[int]], told: Sequence[list[int]]) -> None:
        """Note how many guesses each row has."""
        super().hear(new, told)
        if told:
            self._states = list(told[0])

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows`."""
        super().select(rows)
        self._states = [self._states[row] for row in rows.tolist()]
        if self._guesses is not None:
            self._guesses = self._guesses[rows]
