"""Where the images of a run over continuous models stand: known latents, iterations, figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...contracts import Samples
from ..run import Run
from .verify import Slots


def ragged(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of groups of `counts` [A] rows, one group after another.

    Returns:
        [A], first row of each group; [R], the group of each row; [R], its place in the group.
    """
    first = counts.cumsum(0) - counts
    groups = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    return first, groups, torch.arange(len(groups), device=counts.device) - first[groups]


class LatentRun:
    """Bookkeeping of a ragged batch: each image has drawn a number of iterations of its own.

    Args:
        ledger: of the run, begun.
        order: [B, N] int64, positions in the order of drawing.
        first: latents that are given, the first of the order; iterations up to there are not made.
        ends: latents drawn after each iteration.
    """

    def __init__(self, ledger: Run, order: Tensor, first: int, ends: Sequence[int]) -> None:
        bounds = [first, *(end for end in ends if end > first)]
        self._ledger, self._order, self._num_iter = ledger, order, len(bounds) - 1
        self._bounds = torch.tensor(bounds, device=order.device)
        self._rank = order.argsort(1)
        self._done = torch.zeros_like(ledger.lengths)
        self._rows = 0

    @property
    def latents(self) -> Tensor:
        """[B, N, D], what is known; 0 elsewhere."""
        return self._ledger.tokens

    def finish(self) -> Samples:
        """One round after another, until all images are drawn or the run is stopped."""
        going = self._done < self._num_iter
        while self._ledger.check(going) and not self._ledger.stopped:
            images = going.nonzero()[:, 0]
            before = self._bounds[self._done[images]]
            self._ledger.next_pass(images)
            self.round(images)
            self._ledger.report(self._bounds[self._done[images]] - before, images)
            going = self._done < self._num_iter
        return self._ledger.samples(
            iterations=self._num_iter, context_rows=self._rows, **self.figures()
        )

    def round(self, images: Tensor) -> None:
        """One pass of the model for `images` [A], and what follows from it."""
        raise NotImplementedError

    def figures(self) -> dict[str, Any]:
        """Further statistics of the run so far."""
        raise NotImplementedError

    def _slots(self, rows: Tensor, images: Tensor, places: Tensor, scales: Tensor) -> tuple:
        """One entry per latent of the iterations `places` after the known ones of `images`.

        Returns:
            Numbers [M] of the entries of `rows` that the latents belong to, and their slots without
            conditions.
        """
        iterations = self._done[images] + places
        starts = self._bounds[iterations]
        _, each, offsets = ragged(self._bounds[iterations + 1] - starts)
        positions = self._order[images[each], starts[each] + offsets]
        slots = Slots(
            images[each], positions, places[each], positions, scales[images, iterations][each]
        )
        return rows[each], slots

    def _table(self, scales: Sequence[Any]) -> Tensor:
        """Guidance scales of the iterations that are made, [B, K], of numbers or [B] for each."""
        batch, device = len(self._order), self._order.device
        rows = [
            torch.as_tensor(scale, dtype=torch.float32, device=device).expand(batch)
            for scale in scales
        ]
        return torch.stack(rows[len(rows) - self._num_iter :], dim=1)

    def _known(self, images: Tensor, places: Tensor) -> Tensor:
        """[R, N]: what is known to an image after some more iterations."""
        return self._rank[images] < self._bounds[self._done[images] + places][:, None]

    def _places(self, images: Tensor) -> Tensor:
        """[A, N]: how many iterations after the known ones each position is drawn."""
        iterations = torch.searchsorted(self._bounds, self._rank[images], right=True) - 1
        return iterations - self._done[images, None]

    def _write(self, slots: Slots, latents: Tensor) -> None:
        self._ledger.watch(latents)
        self._ledger.record(slots.images, slots.positions, latents)
