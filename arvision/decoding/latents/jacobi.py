"""Jacobi iteration on latents: guesses with the noise of their places, drawn again until they stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...contracts import Conditions, ContinuousModel, Samples, device_of
from ...errors import InputError
from ..run import Run
from .chain import LatentHead, draw_chain
from .loop import LatentPlan, num_given_first, started_with
from .run import LatentRun, ragged


@torch.no_grad()
def iterate_latents(
    model: ContinuousModel,
    conditions: Conditions,
    run: Run,
    *,
    plan: LatentPlan,
    window: int,
    tolerance: float,
) -> Samples:
    """Draw one image per condition.

    A latent is a function of what is known and of its own noise. A pass sees the next `window`
    iterations of each image at once, a row for each, in which the earlier ones are guesses; one
    chain of the head then draws all of them anew. The first is right; each further one stands while
    all guesses before it moved by `tolerance` at most. With tolerance 0 the picture is that of
    `decode_latents` with the same seed, up to rounding.

    Args:
        model: a continuous model.
        conditions: one per image.
        run: the ledger; latents that are not drawn because `on_step` stopped the run stay 0.
        plan: order, iterations, guidance and temperature.
        window: iterations seen by a pass.
        tolerance: largest difference of an entry of a latent that counts as none.

    Returns:
        Latents [B, N, D]; the statistics of `decode_latents`; further `iterations`, `drafted`
        (guesses judged), `accepted`, `acceptance_rate`, `context_rows` (rows of all passes).

    Raises:
        InputError: see `LatentPlan.ends`; a window above the number of latents; a latent that is
            NaN or infinite.
    """
    ends = plan.ends(model)
    if window > model.num_tokens:
        raise InputError(f"window {window}: expected 1 to {model.num_tokens}, the latents")
    run.begin(device_of(model), (model.head.latent_dim,), torch.float32)
    order, first = plan.orders(run, model), num_given_first(run, model)
    scales = plan.scales(ends, run.guidance_scale, run.batch)
    state = model.start(conditions, started_with(run.guidance_scale, scales), order)
    return _Iteration(
        run, state, model.head, order, first, ends, scales, plan, (window, tolerance)
    ).finish()


class _Iteration(LatentRun):
    """Where each image stands, and its guesses."""

    def __init__(
        self,
        ledger: Run,
        state: Any,
        head: LatentHead,
        order: Tensor,
        first: int,
        ends: Sequence[int],
        scales: Sequence[float],
        plan: LatentPlan,
        how: tuple[int, float],
    ) -> None:
        super().__init__(ledger, order, first, ends)
        self._state, self._head, self._plan = state, head, plan
        self._window, self._tolerance = how
        self._scales = self._table(scales)
        self._guesses = torch.zeros_like(self.latents)
        self._guessed = torch.zeros_like(self._done)
        self._drafted = self._accepted = 0

    def round(self, images: Tensor) -> None:
        """See the iterations to come in their guessed contexts, draw them, keep what stands."""
        left = self._num_iter - self._done[images]
        # As many rows as there are guesses to stand on, and one more.
        rows = torch.minimum(left, (self._guessed - self._done)[images] + 1).clamp(max=self._window)
        first, which, places = ragged(rows)
        contexts = torch.where(
            self._known(images[which], torch.zeros_like(places))[..., None],
            self.latents[images[which]],
            self._guesses[images[which]],
        )
        z = self._state.contexts(contexts, self._known(images[which], places), images[which])
        self._rows += len(which)
        # Guesses for the next pass come from the same chain: all that its window may reach.
        reach = torch.minimum(left, rows + self._window - 1)
        _, entries, places = ragged(reach)
        each, slots = self._slots(entries, images[entries], places, self._scales)
        row = first[each] + torch.minimum(slots.places, rows[each] - 1)
        slots.z = z[row, slots.positions]
        path = draw_chain(
            slots.law(self._head),
            slots.noise(self._ledger.noise, self._head, "latent"),
            self._plan.temperature,
            self._plan.last_noise,
        )
        drawn = path.latents
        self._guesses = self._guesses.to(drawn)
        moved = (drawn - self._guesses[slots.images, slots.positions]).abs().amax(1)
        # The place of the first guess that moved: it is drawn right, what follows it may not be.
        changed = (moved <= self._tolerance).logical_not() & (slots.places < rows[each] - 1)
        places = torch.where(changed, slots.places, rows[each] - 1)
        stop = (rows - 1).scatter_reduce(0, each, places, "amin")
        kept = slots.places <= stop[each]
        self._write(slots.select(kept), drawn[kept])
        self._guesses[slots.images, slots.positions] = drawn
        self._guessed[images] = self._done[images] + reach
        self._done[images] += stop + 1
        self._drafted += int((rows - 1).sum())
        self._accepted += int(stop.sum())

    def figures(self) -> dict[str, Any]:
        """See `iterate_latents`."""
        return {
            "head_steps": self._ledger.num_passes * self._head.num_steps,
            "drafted": self._drafted,
            "accepted": self._accepted,
            "acceptance_rate": self._accepted / max(1, self._drafted),
        }
