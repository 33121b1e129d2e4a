"""Gaussian diffusion with learned variances: tables of a schedule, one reverse step, whole chains.

Steps of a respaced schedule are numbered k = K - 1 (the noisiest) down to 0. A chain visits them in
this order; row i of everything recorded about a chain belongs to step K - 1 - i.

Paper: Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021, equations
10 to 17.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...errors import InputError

NUM_TRAIN_STEPS = 1000
MAX_BETA = 0.999


def cosine_betas(num: int = NUM_TRAIN_STEPS, offset: float = 0.008) -> Tensor:
    """Betas [num] float64 of the cosine schedule."""

    def level(share: float) -> float:
        return math.cos((share + offset) / (1 + offset) * math.pi / 2) ** 2

    betas = [min(1 - level((t + 1) / num) / level(t / num), MAX_BETA) for t in range(num)]
    return torch.tensor(betas, dtype=torch.float64)


class Schedule:
    """Tables of a reverse process of `num_steps` steps, spread evenly over the trained ones.

    Args:
        num_steps: steps K of a chain; the trained number for training.
        num_train_steps: steps that the network knows.
        noisiest: trained step that a chain starts with. The very last trained steps hardly differ
            from pure noise and multiply errors of the network by thousands.

    Attributes:
        timesteps: [K] int64, what the network is told at each step.
        betas: [K] float64, recomputed so that the noise levels are the trained ones.
        log_betas, log_posterior: [K], ends of the range of the learned log variance.

    Raises:
        InputError: fewer than 2 steps, or more than were trained.
    """

    renewed = ("_rows", "_told")

    def __init__(
        self,
        num_steps: int,
        num_train_steps: int = NUM_TRAIN_STEPS,
        noisiest: int = NUM_TRAIN_STEPS - 1,
    ) -> None:
        if not 2 <= num_steps <= noisiest + 1 <= num_train_steps:
            raise InputError(
                f"num_sampling_steps {num_steps}, noisiest {noisiest}: expected 2 to noisiest + 1 steps "
                f"of {num_train_steps}"
            )
        self.num_steps, self.noisiest = num_steps, noisiest
        stride = noisiest / (num_steps - 1)
        steps = torch.arange(num_steps, dtype=torch.float64) * stride
        self.timesteps = steps.round().long()
        levels = torch.cumprod(1 - cosine_betas(num_train_steps), 0)[self.timesteps]
        before = torch.cat([levels.new_ones(1), levels[:-1]])
        self.betas = 1 - levels / before
        self.levels = levels
        self.log_betas = self.betas.log()
        posterior = self.betas * (1 - before) / (1 - levels)
        # The posterior variance of step 0 is 0: step 1's stands in for it.
        self.log_posterior = torch.cat([posterior[1:2], posterior[1:]]).log()
        from_x, from_noise = (1 / levels).sqrt(), (1 / levels - 1).sqrt()
        of_start = self.betas * before.sqrt() / (1 - levels)
        of_x = (1 - before) * (1 - self.betas).sqrt() / (1 - levels)
        room = 0.5 * (self.log_betas - self.log_posterior)
        self._table = torch.stack([from_x, from_noise, of_start, of_x, self.log_posterior, room])
        self._rows: dict[tuple[torch.dtype, torch.device], list[tuple[Tensor, ...]]] = {}
        self._told: dict[torch.device, Tensor] = {}

    def told(self, device: torch.device) -> Tensor:
        """`timesteps` in the order of drawing, on a device; copied there once."""
        if device not in self._told:
            self._told[device] = self.timesteps.flip(0).to(device)
        return self._told[device]

    def add_noise(self, start: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """Noisy latents [M, D] of clean ones at steps [M]."""
        level = self.levels.to(start)[steps][:, None]
        return level.sqrt() * start + (1 - level).sqrt() * noise

    def posterior(self, start: Tensor, x: Tensor, steps: Tensor | int) -> tuple[Tensor, Tensor]:
        """Mean [..., D] and log variance of q(x_{k-1} | x_k, x_0)."""
        _, _, c0, c1, low, _ = self._coefficients(steps, x)
        return c0 * start + c1 * x, low

    def moments(
        self, x: Tensor, noise: Tensor, share: Tensor, steps: Tensor | int
    ) -> tuple[Tensor, Tensor]:
        """Mean and log variance [..., D] of a reverse step.

        Args:
            x: [..., D] at the step.
            noise: [..., D], the network's estimate of the noise in it.
            share: [..., D], the network's variance output: -1 is the smallest, 1 the largest.
            steps: number of the step, or one per leading index of `x`.
        """
        a, b, c0, c1, low, room = self._coefficients(steps, x)
        mean = c0 * (a * x - b * noise) + c1 * x
        return mean, low + (share + 1) * room

    def _coefficients(self, steps: Tensor | int, like: Tensor) -> tuple[Tensor, ...]:
        """Columns of the table: numbers for one step, [..., 1] for many, to go with `like`."""
        if isinstance(steps, Tensor):
            picked = self._table.to(like.device)[:, steps].to(like.dtype)
            return picked.view(*picked.shape, *[1] * (like.dim() - steps.dim())).unbind(0)
        # A chain asks at every step, and a number has to become a tensor before it is multiplied.
        key = torch.promote_types(like.dtype, torch.float32), like.device
        if key not in self._rows:
            columns = self._table.to(dtype=key[0], device=key[1]).unbind(0)
            self._rows[key] = list(zip(*(column.unbind(0) for column in columns), strict=True))
        return self._rows[key][steps]
