"""The diffusion head as a law of latents: guidance, schedule, one step or a whole path at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ...decoding.latents.chain import Guidance
from ...decoding.latents.schedule import Schedule
from ..latent_head import ChainHead, HeadNetwork, RunPart, SteppedHead


class MARLaw:
    """p(latent | z) of M latents; see `arvision.decoding.latents.chain.LatentLaw`.

    Args:
        net: the head's network.
        run: runs its parts.
        schedule: of sampling.
        z: [M, W], or with guidance [M, 2W]: the conditional and the unconditional z side by side.
        guidance_scale: epsilon is null + scale * (cond - null); the variance is the conditional
            one. One for all latents, or [M]. Without unconditional z it has no effect.
        refresh: `moments` computes the network as a whole at the first step and at each whose number
            this divides, see `SteppedHead.lazily`; 1 for every step.
    """

    def __init__(
        self,
        net: HeadNetwork,
        run: RunPart,
        schedule: Schedule,
        z: Tensor,
        guidance_scale: Guidance,
        refresh: int = 1,
    ) -> None:
        self.num_steps, self.latent_dim = schedule.num_steps, net.input_proj.in_features
        self._schedule, self._refresh = schedule, refresh
        # Row i of everything belongs to step K - 1 - i.
        self._net = SteppedHead(net, run, schedule.told(z.device), z)
        is_shared = not isinstance(guidance_scale, Tensor)
        self._scale = z.new_full((), guidance_scale) if is_shared else guidance_scale[:, None]

    def _guided(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """Guided noise and variance share [..., M, D] from the network's [G, ..., M, 2D]."""
        noise, share = out[0].chunk(2, dim=-1)
        if len(out) > 1:
            null = out[1, ..., : self.latent_dim]
            noise = null + self._scale * (noise - null)
        return noise, share

    def moments(self, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Mean and log variance [M, D] of what follows `x` [M, D] at a step."""
        row = self.num_steps - 1 - step
        if self._refresh == 1:
            out = self._net.at(x, row)
        else:
            out = self._net.lazily(x, row, row == 0 or step % self._refresh == 0)
        noise, share = self._guided(out)
        return self._schedule.moments(x, noise, share, step)

    def path_moments(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log variances [K, M, D] of what follows each of `states` [K, M, D]."""
        noise, share = self._guided(self._net.along(states))
        steps = torch.arange(self.num_steps - 1, -1, -1, device=states.device)
        return self._schedule.moments(states, noise, share, steps)


class MARHead(ChainHead):
    """The `head` of a `MAR` model.

    Args:
        net: the network.
        schedule: of its chains.
        run: see `ChainHead`.
        refresh: see `MARLaw`.
    """

    def __init__(
        self, net: HeadNetwork, schedule: Schedule, run: RunPart | None = None, refresh: int = 1
    ) -> None:
        super().__init__(net, schedule.num_steps, run)
        self.schedule, self.refresh = schedule, refresh

    def law(self, z: Tensor, guidance_scale: Guidance = 1.0) -> MARLaw:
        """Law of M latents given conditions [M, W] or [M, 2W], see `MARLaw`."""
        return MARLaw(self.net, self.run, self.schedule, z, guidance_scale, self.refresh)

    def with_steps(self, num_steps: int) -> MARHead:
        """The same head with chains of another number of steps."""
        schedule = Schedule(num_steps, noisiest=self.schedule.noisiest)
        return MARHead(self.net, schedule, self.run, self.refresh)

    def keeping(self, refresh: int) -> MARHead:
        """The same head with features kept between the steps of a chain, see `MARLaw`. Lossy."""
        return MARHead(self.net, self.schedule, self.run, refresh)
