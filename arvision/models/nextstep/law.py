"""The flow-matching head as a law of latents: the sampler's steps are Gaussian, so it has one.

The network estimates the velocity v of x_t = t x1 + (1 - t) x0 from noise x0 to the latent x1. The
samplers of both releases integrate the stochastic equation that has the flow's marginals: a step
from t to t + dt goes to N(x + ((1 + t) v - x) dt, 2 (1 - t) dt), whatever the network says.

Source: NextStep Team, "NextStep-1: Toward Autoregressive Image Generation with Continuous Tokens at
Scale", 2025; the steps are derived from the released code's score form.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ...decoding.latents.chain import Guidance
from ...errors import InputError, check_count, unknown_name
from ..latent_head import ChainHead, HeadNetwork, RunPart, SteppedHead

RELEASES = ("1", "1.1")
LAST_TIME = 0.96
"""Where the first release's steps end; what remains is one step of length 0.04 along the velocity."""


@dataclass(frozen=True, kw_only=True)
class FlowSteps:
    """Times of a chain and what its steps make of latent and velocity.

    - Release "1": K - 1 noisy steps between K times from 0 to 0.96, then x + 0.04 v without noise.
      With a shift above 1 the times end earlier, and so does the chain, as in the released code.
    - Release "1.1": K noisy steps from 0 to 1, the last one, too.

    Attributes:
        num_steps: K, calls of the network.
        shift: a; time t becomes t / (a - (a - 1) t), which spends more steps near the noise.
        release: "1" or "1.1".

    Raises:
        InputError: fewer than 2 steps, a shift that is not above 0, or an unknown release.
    """

    num_steps: int
    shift: float = 1.0
    release: str = "1"

    def __post_init__(self) -> None:
        check_count("num_sampling_steps", self.num_steps)
        if self.num_steps < 2:
            raise InputError(f"num_sampling_steps {self.num_steps}: expected at least 2")
        if not 0 < self.shift < float("inf"):
            raise InputError(f"shift {self.shift}: expected a number > 0")
        if self.release not in RELEASES:
            raise unknown_name("release", self.release, RELEASES)

    @property
    def ends_noisy(self) -> bool:
        """Whether the official sampler adds noise in the last step."""
        return self.release == "1.1"

    def times(self) -> Tensor:
        """[K] float64, time at the start of each step, in the order of drawing."""
        num = self.num_steps
        end = LAST_TIME if self.release == "1" else (num - 1) / num
        even = torch.linspace(0, end, num, dtype=torch.float64)
        return even / (self.shift - (self.shift - 1) * even)

    def table(self) -> Tensor:
        """[3, K] float64: mean = a x + b v, and the log variance, of each step."""
        times = self.times()
        if self.release == "1":
            lengths = torch.cat([times.diff(), times.new_tensor([1 - LAST_TIME])])
        else:
            lengths = torch.cat([times, times.new_ones(1)]).diff()
        keep, push = 1 - lengths, (1 + times) * lengths
        if self.release == "1":
            keep[-1], push[-1] = 1.0, lengths[-1]
        return torch.stack([keep, push, (2 * (1 - times) * lengths).log()])


@cache
def _on(steps: FlowSteps, device: torch.device) -> tuple[Tensor, Tensor]:
    """Times and table on a device, copied there once."""
    return steps.times().to(device), steps.table().to(device)


class NextStepLaw:
    """p(latent | z) of M latents; see `arvision.decoding.latents.chain.LatentLaw`.

    With noise in the last step (which release "1" does not add) it has a density; the variance there
    is that of a step of the stochastic equation.

    Args:
        net: the head's network.
        run: runs its parts.
        steps: of sampling.
        z: [M, C]; with guidance [M, 2C], the conditional and the unconditional z side by side; for
            edits [M, 3C], between them that of the image alone.
        guidance_scale: s; v is null + s * (cond - null). One for all latents, or [M].
        image_scale: r; with three branches v is null + r * (image - null) + s * (cond - image). It
            is the same for all latents; in the released code a guidance schedule moves it, too.
    """

    def __init__(
        self,
        net: HeadNetwork,
        run: RunPart,
        steps: FlowSteps,
        z: Tensor,
        guidance_scale: Guidance,
        image_scale: float = 1.0,
    ) -> None:
        self.num_steps, self.latent_dim = steps.num_steps, net.input_proj.in_features
        self.ends_noisy = steps.ends_noisy
        times, self._table = _on(steps, z.device)
        self._net = SteppedHead(net, run, times, z)
        self._scale = (
            guidance_scale[:, None] if isinstance(guidance_scale, Tensor) else guidance_scale
        )
        self._image_scale = image_scale

    def _guided(self, out: Tensor, like: Tensor) -> Tensor:
        """Velocity [..., M, D] from the network's [G, ..., M, D], in the precision of `like`."""
        conditional, *others = out.to(torch.promote_types(out.dtype, like.dtype)).unbind(0)
        if not others:
            return conditional
        null = others[-1]
        if len(others) == 1:
            return null + self._scale * (conditional - null)
        image = others[0]
        return null + self._image_scale * (image - null) + self._scale * (conditional - image)

    def moments(self, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Mean and log variance [M, D] of what follows `x` [M, D] at a step."""
        row = self.num_steps - 1 - step
        velocity = self._guided(self._net.at(x, row), x)
        keep, push, log_variance = self._table[:, row].to(velocity.dtype)
        return keep * x + push * velocity, log_variance.expand_as(velocity)

    def path_moments(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log variances [K, M, D] of what follows each of `states` [K, M, D]."""
        velocity = self._guided(self._net.along(states), states)
        keep, push, log_variance = self._table.to(velocity.dtype)[..., None, None]
        return keep * states + push * velocity, log_variance.expand_as(velocity)


class NextStepHead(ChainHead):
    """The `head` of a `NextStep` model.

    Args:
        net: the network.
        steps: of its chains.
        image_scale: guidance towards the images of an edit.
        run: see `ChainHead`.
    """

    def __init__(
        self,
        net: HeadNetwork,
        steps: FlowSteps,
        image_scale: float = 1.0,
        run: RunPart | None = None,
    ) -> None:
        super().__init__(net, steps.num_steps, run)
        self.steps, self.image_scale = steps, image_scale

    def law(self, z: Tensor, guidance_scale: Guidance = 1.0) -> NextStepLaw:
        """Law of M latents given conditions [M, C], [M, 2C] or [M, 3C], see `NextStepLaw`."""
        return NextStepLaw(self.net, self.run, self.steps, z, guidance_scale, self.image_scale)

    def with_steps(self, num_steps: int) -> NextStepHead:
        """The same head with chains of another number of steps."""
        old = self.steps
        steps = FlowSteps(num_steps=num_steps, shift=old.shift, release=old.release)
        return NextStepHead(self.net, steps, self.image_scale, self.run)
