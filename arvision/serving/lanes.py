"""Continuous batching: a finished picture leaves, the next one enters between two passes.

A lane is one decoding loop. Pictures of a lane share the way in which tokens are drafted and judged;
prompt, seed, guidance scale, temperature, top-k and top-p are each picture's own. As noise is a
function of a picture's identity, a picture is the same whoever stands beside it (in float32).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ..api import CANDIDATES, LEAST_WINDOW, MOST_WINDOW
from ..contracts import DropsRows, TakesRows, device_of
from ..decoding.drafter import Joins, WindowPolicy
from ..decoding.logits import shape_rows
from ..decoding.loop import TokenLoop
from ..decoding.run import Run
from ..samplers import BaseSampler, SJDSampler, get_sampler
from .order import Order


class SharedWindow:
    """As many candidates as a pass holds well, shared among the pictures; see `arvision.sample`.

    Args:
        candidates: of all pictures together.
    """

    def __init__(self, candidates: int) -> None:
        self._candidates = candidates

    def next(self, num_rows: int, most: int) -> int:
        """Few pictures guess ahead, many are drawn token by token."""
        window = min(MOST_WINDOW, self._candidates // max(1, num_rows))
        return min(most, window if window >= LEAST_WINDOW else 1)

    def observe(self, num_candidates: int, counts: Sequence[int], room: Sequence[int]) -> None:
        """Nothing to adapt."""


def lane_sampler(sampler: BaseSampler) -> SJDSampler | None:
    """The sampler whose drafter and rule draw the pictures of `sampler` in a lane; None for none.

    Under Gumbel coupling the tokens are those of `ar` whatever the window, so `ar` and all windows of
    `sjd` are one lane. Under other couplings the window is part of what a picture is.
    """
    config = sampler.config
    plain = dict.fromkeys(("temperature", "top_p"), 1.0) | {"top_k": 0}
    if sampler.name == "ar":
        others = sampler.foreign("token")
        is_plain = config["noise"] == "gumbel" and not others
        found = get_sampler("sjd") if is_plain else None
    elif sampler.name == "sjd" and config["tree"] is None and config["window"] != "auto":
        is_gumbel = config["coupling"] == "gumbel" and config["reuse"] is None
        same = {"window": MOST_WINDOW, "init": "prior"} if is_gumbel else {}
        found = sampler.with_options(**plain, **same)
    else:
        found = None
    return found if isinstance(found, SJDSampler) else None


class Lane:
    """One loop with a number of places.

    Args:
        model: a token model.
        sampler: see `lane_sampler`.
        places: pictures that are drawn at a time, at most.
    """

    def __init__(self, model: Any, sampler: SJDSampler, places: int) -> None:
        self._model, self._sampler = model, sampler
        self._orders: dict[int, Order] = {}
        self._run = Run(places, model.num_tokens, [0] * places)
        kind = "cpu" if device_of(model).type == "cpu" else "accelerator"
        is_free = sampler.config["coupling"] == "gumbel" and sampler.config["reuse"] is None
        policy: WindowPolicy = sampler.policy(model)
        if is_free:
            policy = SharedWindow(CANDIDATES[kind])
        rule = sampler.rule(model)
        # The loop does not hold the lane, so that its cache goes with the lane and waits for no collector.
        shape = partial(Lane._shape, weakref.proxy(self))
        self._loop = TokenLoop(model, self._run, rule=rule, shape=shape, policy=policy)
        self._takes_more = True

    @property
    def orders(self) -> list[Order]:
        """Pictures that are being drawn."""
        return list(self._orders.values())

    @property
    def num_passes(self) -> int:
        """Passes so far."""
        return self._run.num_passes

    @property
    def num_free(self) -> int:
        """Pictures that may enter now."""
        if self._orders and not self._takes_more:
            return 0
        return self._run.batch - len(self._orders)

    def _shape(self, logits: Tensor) -> Tensor:
        return shape_rows(logits, [self._orders[place].shaping for place in self._loop.places])

    def enter(self, orders: Sequence[Order]) -> None:
        """Begin pictures with one guidance scale, at most `num_free`.

        Raises:
            InputError: a prompt that the model does not know; nothing was begun.
        """
        free = [place for place in range(self._run.batch) if place not in self._orders]
        places = free[: len(orders)]
        drafter = self._sampler.drafter(self._model)
        state = self._loop.enter(
            [order.condition for order in orders],
            drafter,
            places,
            seeds=[order.identity for order in orders],
            guidance_scale=orders[0].guidance_scale,
            shape=lambda logits: shape_rows(logits, [order.shaping for order in orders]),
        )
        moves = isinstance(state, TakesRows) and isinstance(state, DropsRows)
        self._takes_more = moves and isinstance(drafter, Joins)
        self._orders.update(zip(places, orders, strict=True))

    def round(self) -> list[tuple[Order, Tensor, int]]:
        """Make a pass; finished pictures with their tokens [N] and passes."""
        dropped = [place for place, order in self._orders.items() if order.is_dropped]
        if dropped:
            self._loop.drop(dropped)
        if self._loop.places:
            self._loop.round()
        going = set(self._loop.places)
        gone = [place for place in self._orders if place not in going]
        finished = []
        for place in gone:
            order = self._orders.pop(place)
            if not order.is_dropped:
                passes = int(self._run.passes[place])
                finished.append((order, self._run.tokens[place].clone(), passes))
        return finished

    def unfinished(self) -> list[tuple[Order, Tensor, int]]:
        """Pictures whose next preview is due, their tokens [N] and how many of them are final."""
        due = []
        lengths = self._run.lengths.tolist()
        for place, order in self._orders.items():
            share = (order.shown + 1) / (order.previews + 1)
            if order.shown < order.previews and lengths[place] >= share * self._run.num_tokens:
                order.shown += 1
                due.append((order, self._run.tokens[place].clone(), lengths[place]))
        return due
