"""Where the images of a run over continuous models stand: known latents, iterations, figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...contracts import Samples, Stats, StepCallback
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
        order: [B, N] int64, positions in the order of drawing.
        ends: latents drawn after each iteration.
        latent_dim: D.

    Attributes:
        latents: [B, N, D], what is known; 0 elsewhere.
        passes: of the model so far.
    """

    def __init__(self, order: Tensor, ends: Sequence[int], latent_dim: int) -> None:
        device = order.device
        self._order, self._num_iter = order, len(ends)
        self._bounds = torch.tensor([0, *ends], device=device)
        self._rank = order.argsort(1)
        self.latents = torch.zeros(*order.shape, latent_dim, device=device)
        self._done = torch.zeros(len(order), dtype=torch.int64, device=device)
        self._commit_pass = torch.zeros_like(order)
        self._passes = torch.zeros_like(self._done)
        self.passes = self._rows = 0

    def finish(self, on_step: StepCallback | None = None) -> Samples:
        """One round after another; see `arvision.contracts.StepCallback`."""
        while self.is_going:
            self.round()
            if on_step is not None and on_step(self.passes, self.progress()):
                break
        return Samples(self.latents, self.stats())

    def round(self) -> None:
        """One pass of the model, and what follows from it."""
        raise NotImplementedError

    def stats(self) -> Stats:
        """Statistics of the run so far."""
        raise NotImplementedError

    @property
    def is_going(self) -> bool:
        """Whether an image still lacks latents."""
        return bool((self._done < self._num_iter).any())

    def _going(self) -> Tensor:
        """Images [A] that still lack latents."""
        return (self._done < self._num_iter).nonzero()[:, 0]

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
        slots = Slots(images[each], positions, places[each], positions, scales[iterations][each])
        return rows[each], slots

    def _known(self, images: Tensor, places: Tensor) -> Tensor:
        """[R, N]: what is known to an image after some more iterations."""
        return self._rank[images] < self._bounds[self._done[images] + places][:, None]

    def _places(self, images: Tensor) -> Tensor:
        """[A, N]: how many iterations after the known ones each position is drawn."""
        iterations = torch.searchsorted(self._bounds, self._rank[images], right=True) - 1
        return iterations - self._done[images, None]

    def _write(self, slots: Slots, latents: Tensor) -> None:
        self.latents = self.latents.to(latents.dtype)
        self.latents[slots.images, slots.positions] = latents
        self._commit_pass[slots.images, slots.positions] = self.passes

    def progress(self) -> dict[str, Any]:
        """Figures for progress bars."""
        drawn = self._bounds[self._done]
        return {
            "finished": int(drawn.sum()),
            "total": self._order.numel(),
            "accepted": drawn.tolist(),
        }

    def _figures(self) -> Stats:
        """Statistics that every run has."""
        num = self._order.shape[1]
        return Stats(
            forward_passes=self.passes,
            tokens=num,
            tokens_per_pass=num / max(1e-9, float(self._passes.double().mean())),
            passes_per_image=self._passes.tolist(),
            commit_pass=self._commit_pass.tolist(),
            iterations=self._num_iter,
            context_rows=self._rows,
        )
