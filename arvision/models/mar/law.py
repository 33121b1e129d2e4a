"""The diffusion head as a law of latents: guidance, schedule, one step or a whole path at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ...decoding.latents.chain import (
    Guidance,
    Trajectory,
    draw_chain,
    path_log_ratio,
    path_under,
)
from ...decoding.latents.schedule import Schedule
from .head import HeadNetwork, Modulations

MEMO_ELEMENTS = 1 << 24
"""Numbers of a law's modulations: up to this many, those of all steps are computed in one go."""


class MARLaw:
    """p(latent | z) of M latents; see `arvision.decoding.latents.chain.LatentLaw`.

    Args:
        net: the head's network.
        schedule: of sampling.
        z: [M, W], or with guidance [M, 2W]: the conditional and the unconditional z side by side.
        guidance_scale: epsilon is null + scale * (cond - null); the variance is the conditional
            one. One for all latents, or [M]. Without unconditional z it has no effect.
    """

    def __init__(
        self, net: HeadNetwork, schedule: Schedule, z: Tensor, guidance_scale: Guidance
    ) -> None:
        self.num_steps, self.latent_dim = schedule.num_steps, net.input_proj.in_features
        self._net, self._schedule = net, schedule
        self._num = len(z)
        width = net.cond_embed.in_features
        self._is_guided = z.shape[1] == 2 * width
        if self._is_guided:
            z = z.view(len(z), 2, width).transpose(0, 1).flatten(0, 1)
        is_shared = not isinstance(guidance_scale, Tensor)
        self._scale = z.new_tensor(guidance_scale) if is_shared else guidance_scale[:, None]
        # Row i of everything belongs to step K - 1 - i.
        times = net.time_embed(schedule.timesteps.flip(0).to(z.device))
        self._times, self._conditions = times, net.cond_embed(z)
        per_row = (3 * len(net.res_blocks) + 2) * times.shape[1]
        self._rows_at_once = max(1, MEMO_ELEMENTS // max(1, per_row * len(z)))
        self._per_step: list[Modulations] = []

    def _modulations(self, first: int, last: int) -> Modulations:
        """Of rows first to last (exclusive), [last - first, R, w] each."""
        return self._net.modulate(self._times[first:last, None] + self._conditions)

    def _step_modulations(self, row: int) -> Modulations:
        """Of one row, [R, w] each."""
        if self._rows_at_once < self.num_steps:
            return self._net.modulate(self._times[row] + self._conditions)
        if not self._per_step:
            of_blocks = [
                list(zip(*(part.unbind(0) for part in parts), strict=True))
                for parts in self._modulations(0, self.num_steps)
            ]
            self._per_step = [list(blocks) for blocks in zip(*of_blocks, strict=True)]
        return self._per_step[row]

    def _estimate(self, x: Tensor, modulations: Modulations) -> tuple[Tensor, Tensor]:
        """Guided noise and variance share [..., M, D] of `x` of the same shape."""
        x = x.to(self._times.dtype)
        if not self._is_guided:
            noise, share = self._net.run(x, modulations).chunk(2, dim=-1)
            return noise, share
        out = self._net.run(torch.cat([x, x], dim=-2), modulations)
        conditional, null = out.split(self._num, dim=-2)
        noise, share = conditional.chunk(2, dim=-1)
        null = null[..., : self.latent_dim]
        return null + self._scale * (noise - null), share

    def moments(self, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Mean and log variance [M, D] of what follows `x` [M, D] at a step."""
        noise, share = self._estimate(x, self._step_modulations(self.num_steps - 1 - step))
        return self._schedule.moments(x, noise, share, step)

    def path_moments(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log variances [K, M, D] of what follows each of `states` [K, M, D]."""
        parts = []
        for first in range(0, self.num_steps, self._rows_at_once):
            last = min(first + self._rows_at_once, self.num_steps)
            parts.append(self._estimate(states[first:last], self._modulations(first, last)))
        noise, share = (torch.cat(part) for part in zip(*parts, strict=True))
        steps = torch.arange(self.num_steps - 1, -1, -1, device=states.device)
        return self._schedule.moments(states, noise, share, steps)


class MARHead:
    """Draws latents from p(x | z) and compares laws; the `head` of a `MAR` model.

    Args:
        net: the network.
        schedule: of its chains.
    """

    def __init__(self, net: HeadNetwork, schedule: Schedule) -> None:
        self.net, self.schedule = net, schedule
        self.num_steps, self.latent_dim = schedule.num_steps, net.input_proj.in_features

    def law(self, z: Tensor, guidance_scale: Guidance = 1.0) -> MARLaw:
        """Law of M latents given conditions [M, W] or [M, 2W], see `MARLaw`."""
        return MARLaw(self.net, self.schedule, z, guidance_scale)

    def sample(
        self,
        z: Tensor,
        noise: Tensor,
        *,
        guidance_scale: Guidance = 1.0,
        temperature: float = 1.0,
        last_noise: bool = False,
    ) -> Tensor:
        """Latents [..., D] of conditions [..., Dz], all positions and images in one chain.

        Args:
            z: as `state.condition` gives them.
            noise: [K + 1, ..., D]; row 0 is the start.
            guidance_scale: of epsilon.
            temperature: multiplies the noise of the steps; 0 leaves the means.
            last_noise: add noise in the last step, too.
        """
        law = self.law(z.flatten(0, -2), guidance_scale)
        path = draw_chain(law, noise.flatten(1, -2), temperature, last_noise)
        return path.latents.view(*z.shape[:-1], self.latent_dim)

    def log_prob_ratio(
        self,
        path: Trajectory,
        z: Tensor,
        *,
        guidance_scale: Guidance = 1.0,
        temperature: float = 1.0,
    ) -> Tensor:
        """log density [M] of a path under this head, less that under the law that drew it.

        Args:
            path: of M latents, drawn with noise in the last step.
            z: [M, Dz].
            guidance_scale: of this head.
            temperature: of this head.
        """
        return path_log_ratio(path_under(self.law(z, guidance_scale), path, temperature), path)
