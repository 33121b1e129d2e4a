"""The thread that draws: lanes of token models, and batches by arrival of everything else."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import ArvisionError, InputError
from ..pipeline import ARPipeline
from ..samplers.base import LAW
from .lanes import Lane, lane_sampler
from .limits import BusyError, ClosedError, Limits
from .order import Order

LOG = logging.getLogger("arvision.serving")

Render = Callable[[Any, torch.Tensor, int | None], Any]
"""A model, tokens [N] and how many of them are final (None: all) to a picture."""


class Engine:
    """Draws the pictures that are ordered, in the order in which they came.

    Args:
        pipe: with which batches by arrival are drawn.
        render: makes pictures.
        limits: bounds of the queue and of the batch.
        tell: is given names and numbers of what happens, such as ("passes", 1).
    """

    def __init__(
        self,
        pipe: ARPipeline,
        render: Render,
        limits: Limits,
        tell: Callable[[str, float], None] = lambda name, value: None,
    ) -> None:
        self._pipe, self._render, self._limits, self._tell = pipe, render, limits, tell
        self._waiting: deque[Order] = deque()
        self._lanes: dict[Any, Lane] = {}
        self._drawing: list[Order] = []
        self._wake = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="arvision-engine", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Pictures that wait."""
        return len(self._waiting)

    @property
    def num_drawing(self) -> int:
        """Pictures that are being drawn."""
        return sum(len(lane.orders) for lane in list(self._lanes.values())) + len(self._drawing)

    @property
    def is_alive(self) -> bool:
        """Whether pictures that are ordered now will be drawn."""
        return self._thread.is_alive() and not self._is_closing

    def submit(self, orders: Sequence[Order]) -> None:
        """Queue pictures, all or none.

        Raises:
            BusyError: more than may wait.
            ClosedError: the engine is stopping.
            InputError: more than ever may wait, or a picture that cannot be drawn as
                `Limits.batching` wants it.
        """
        if len(orders) > self._limits.queue:
            raise InputError(
                f"{len(orders)} pictures: expected at most {self._limits.queue}, as many as may wait"
            )
        if self._limits.batching == "continuous":
            for order in orders:
                self._check_continuous(order)
        with self._wake:
            if not self.is_alive:
                raise ClosedError("the server is stopping: expected requests before that")
            if len(self._waiting) + len(orders) > self._limits.queue:
                raise BusyError(
                    f"{len(self._waiting)} pictures wait and {len(orders)} more would: expected at "
                    f"most {self._limits.queue}, try again later"
                )
            self._waiting.extend(orders)
            self._wake.notify()

    def _check_continuous(self, order: Order) -> None:
        if self._pipe.kind != "token":
            raise InputError(
                f"a {self._pipe.kind} model cannot take pictures into a running batch: expected a "
                'token model, or batching "arrival"'
            )
        if lane_sampler(order.sampler) is None:
            raise InputError(
                f"sampler {order.sampler.name!r} with these options cannot take pictures into a "
                'running batch: expected ar or sjd without a tree, or a server with batching "auto"'
            )

    def drop(self, orders: Sequence[Order]) -> None:
        """Nobody waits for these pictures any more: they leave the queue, or the batch."""
        with self._wake:
            for order in orders:
                order.is_dropped = True
                with contextlib.suppress(ValueError):
                    self._waiting.remove(order)
                order.answer.cancel()

    def close(self, timeout: float | None = None) -> bool:
        """Take nothing new, draw what was ordered, and end; true if all was drawn in time."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # What the thread does.

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._waiting or self._lanes or self._is_closing):
                    self._wake.wait()
                if self._is_closing and not (self._waiting or self._lanes):
                    return
            try:
                self._turn()
            except Exception as error:
                # Nobody may wait for ever, whatever went wrong.
                LOG.error("the engine failed (%s: %s)", type(error).__name__, error)
                for key in list(self._lanes):
                    self._break(key, error)
                with self._wake:
                    lost = list(self._waiting)
                    self._waiting.clear()
                for order in lost:
                    order.fail(error)

    def _turn(self) -> None:
        """Let pictures enter, make a pass of every lane, hand over what is finished."""
        self._admit()
        for key, lane in list(self._lanes.items()):
            started, before = time.perf_counter(), lane.num_passes
            try:
                with torch.no_grad(), self._pipe._threads():
                    finished = lane.round()
                for order, tokens, length in lane.unfinished():
                    self._show(order, tokens, length)
            except Exception as error:
                self._break(key, error)
                continue
            self._tell("passes", lane.num_passes - before)
            self._tell("pass_seconds", time.perf_counter() - started)
            for order, tokens, passes in finished:
                self._deliver(order, tokens, passes)
            if not lane.orders:
                del self._lanes[key]

    def _admit(self) -> None:
        """Begin what waits, as far as there is room, first come first served."""
        while self._waiting:
            order = self._waiting[0]
            key = self._lane_of(order)
            if key is None:
                if self._lanes:
                    return  # a batch by arrival has the model for itself
                self._draw(self._take(order, self._limits.batch, _as_one))
                continue
            lane = self._lanes.get(key)
            room = self._limits.batch - self.num_drawing
            if room < 1 or (lane is not None and lane.num_free < 1):
                return
            if lane is None:
                sampler = lane_sampler(order.sampler)
                assert sampler is not None
                lane = self._lanes[key] = Lane(order.model, sampler, self._limits.batch)
            most = min(room, lane.num_free)
            self._enter(key, lane, self._take(order, most, self._side_by_side))

    def _lane_of(self, order: Order) -> Any:
        """Pictures with equal keys can share a lane; None for a batch by arrival."""
        sampler = lane_sampler(order.sampler) if self._pipe.kind == "token" else None
        is_single = order.tries > 0  # of a lane that broke: alone, so that it breaks no other's
        if sampler is None or is_single or order.call or self._limits.batching == "arrival":
            return None
        scale = order.guidance_scale
        guidance = scale if scale in (0, 1) else "guided"
        # Its law is a picture's own in every lane.
        options = {k: str(v) for k, v in sampler.config.items() if k not in LAW}
        return id(order.model), guidance, str(sorted(options.items()))

    def _side_by_side(self, order: Order, first: Order) -> bool:
        """Whether two pictures can enter one lane together."""
        same = order.guidance_scale == first.guidance_scale
        return same and self._lane_of(order) == self._lane_of(first)

    def _take(self, first: Order, most: int, fits: Callable[[Order, Order], bool]) -> list[Order]:
        """The first order of the queue and those right behind it that begin together with it."""
        taken: list[Order] = []
        with self._wake:
            while self._waiting and len(taken) < most:
                order = self._waiting[0]
                if order is not first and not fits(order, first):
                    break
                taken.append(self._waiting.popleft())
        return [order for order in taken if order.begin()]

    def _enter(self, key: Any, lane: Lane, orders: list[Order]) -> None:
        """Begin pictures in a lane; one that the model refuses takes no other along."""
        groups = [orders] if orders else []
        while groups:
            group = groups.pop()
            try:
                with torch.no_grad(), self._pipe._threads():
                    lane.enter(group)
            except ArvisionError as error:
                if len(group) > 1:
                    groups += [[order] for order in reversed(group)]
                    continue
                group[0].fail(error)
            except Exception as error:
                for order in group:
                    self._again(order, error)
                self._break(key, error)
                return
        if not lane.orders:
            del self._lanes[key]

    def _break(self, key: Any, error: BaseException) -> None:
        """A lane failed: its pictures are drawn again, each alone, and those that fail again fail."""
        LOG.warning(
            "a batch failed (%s: %s), its pictures are drawn again", type(error).__name__, error
        )
        lane = self._lanes.pop(key, None)
        for order in reversed([] if lane is None else lane.orders):
            self._again(order, error)

    def _again(self, order: Order, error: BaseException) -> None:
        if order.tries > 1:
            order.fail(error)
        else:
            with self._wake:
                self._waiting.appendleft(order)

    def _deliver(self, order: Order, tokens: torch.Tensor, passes: int) -> None:
        try:
            image = self._render(order.model, tokens, None) if order.wants_image else None
        except Exception as error:
            order.fail(error)
            return
        order.finish(tokens, image, passes)
        self._tell("pictures", 1)

    def _show(self, order: Order, tokens: torch.Tensor, length: int) -> None:
        if order.on_preview is not None and not order.is_dropped:
            order.on_preview(self._render(order.model, tokens, length))

    def _draw(self, orders: list[Order]) -> None:
        """A batch by arrival, drawn to its end with the pipeline."""
        if not orders:
            return
        first, self._drawing = orders[0], orders

        def on_step(pipe: Any, step: int, timestep: int, figures: dict[str, Any]) -> None:
            for image, order in zip(figures.get("preview", ()), orders, strict=False):
                if order.shown < order.previews and order.on_preview is not None:
                    order.shown += 1
                    order.on_preview(image)
            if all(order.is_dropped for order in orders):
                pipe._interrupt = True

        try:
            out = self._pipe(
                [order.prompt for order in orders],
                seed=[order.identity for order in orders],
                guidance_scale=first.guidance_scale,
                sampler=first.sampler,
                output_type="pil" if first.wants_image else "latent",
                progress=False,
                callback_on_step_end=on_step,
                **_shows(orders),
                **first.call,
            )
        except Exception as error:
            if len(orders) > 1:
                for order in reversed(orders):
                    self._again(order, error)
            else:
                first.fail(error)
            return
        finally:
            self._drawing = []
        images = out.images if first.wants_image else [None] * len(orders)
        self._tell("passes", out.stats["forward_passes"])
        for order, tokens, image, passes in zip(
            orders, out.tokens, images, out.stats["passes_per_image"], strict=True
        ):
            order.finish(tokens, image, passes)
            self._tell("pictures", 1)


def _as_one(order: Order, first: Order) -> bool:
    """Whether two pictures can be drawn by one call of the pipeline; what was tried before is alone."""
    mine, other = ((each.sampler.name, dict(each.sampler.config)) for each in (order, first))
    same = order.guidance_scale == first.guidance_scale and order.call == first.call
    alike = same and mine == other and order.wants_image == first.wants_image
    return alike and order.model is first.model and not (order.tries or first.tries)


def _shows(orders: Sequence[Order]) -> dict[str, int]:
    """How often a call of the pipeline shows what it has drawn, if somebody wants to see it."""
    most = max(order.previews for order in orders)
    if most == 0:
        return {}
    model = orders[0].model
    scales = getattr(model, "scales", None)
    steps = len(scales) if scales else model.num_tokens
    return {"preview_every": max(1, steps // (most + 1))}
