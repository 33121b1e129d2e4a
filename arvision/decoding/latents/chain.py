"""Laws of latents that are drawn by a chain of Gaussian steps: drawing, and comparing two laws.

Rows of everything recorded about a chain are in the order of drawing: row i belongs to step
K - 1 - i (see `arvision.decoding.latents.schedule`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..noise import Noise

Guidance = Tensor | float
"""A guidance scale for all latents, or one for each, [M]."""


class LatentLaw(Protocol):
    """p(latent | z) of M latents, drawn by a chain of `num_steps` Gaussian steps.

    A law may say `ends_noisy`: its last step has noise in the official sampler, too.
    """

    num_steps: int
    latent_dim: int

    def moments(self, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Mean and log variance [M, D] of what follows `x` [M, D] at a step."""
        ...

    def path_moments(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log variances [K, M, D] of what follows each of `states` [K, M, D].

        One call for all steps: row i is the input of step K - 1 - i.
        """
        ...


class LatentHead(Protocol):
    """Turns conditions into laws of latents; the head of a continuous model.

    A head may offer `with_steps(num_steps)`, the same head with longer or shorter chains.
    """

    num_steps: int
    latent_dim: int

    def law(self, z: Tensor, guidance_scale: Guidance = 1.0) -> LatentLaw:
        """Law of M latents, given conditions [M, Dz] as a state gives them."""
        ...


@dataclass
class Trajectory:
    """A drawn chain.

    Attributes:
        states: [K + 1, M, D]; row 0 is the noise that it starts from, row K the latents.
        means: [K, M, D] of each step, under the law that drew it.
        scales: [K, M, D], standard deviations of each step, temperature included.
    """

    states: Tensor
    means: Tensor
    scales: Tensor

    @property
    def latents(self) -> Tensor:
        """What was drawn, [M, D]."""
        return self.states[-1]

    def select(self, rows: Tensor) -> Trajectory:
        """The chains of some latents [M']."""
        return Trajectory(self.states[:, rows], self.means[:, rows], self.scales[:, rows])


def chain_noise(
    noise: Noise, positions: Tensor, head: LatentHead, purpose: str, round_number: Tensor | int = 0
) -> Tensor:
    """Normal numbers [K + 1, B, T, D] of the chains of positions [B, T].

    Each is a function of (seed, image, position, diffusion step) and the round: the draft's chain and
    the target's see the same ones.
    """
    rows, dim = head.num_steps + 1, head.latent_dim
    numbers = noise.normal(positions, rows * dim, purpose, round_number)
    return numbers.unflatten(-1, (rows, dim)).permute(2, 0, 1, 3)


def draw_chain(
    law: LatentLaw, noise: Tensor, temperature: float = 1.0, last_noise: bool = False
) -> Trajectory:
    """Run the reverse process.

    Args:
        law: of M latents.
        noise: [K + 1, M, D]; row 0 is the start, the others belong to the steps.
        temperature: multiplies the noise of the steps, not the start; 0 leaves the means.
        last_noise: also add noise in the last step, which most official samplers do not do (see
            `LatentLaw`). With it the chain has a density, which comparing two laws needs.
    """
    last_noise = last_noise or getattr(law, "ends_noisy", False)
    x, *kicks = noise.unbind(0)
    states, means, scales = [x], [], []
    half, temper = x.new_full((), 0.5), x.new_full((), temperature)
    for row, kick in enumerate(kicks):
        step = law.num_steps - 1 - row
        mean, log_variance = law.moments(x, step)
        scale = (half * log_variance).exp() * temper
        x = mean if step == 0 and not last_noise else mean + scale * kick
        states.append(x)
        means.append(mean)
        scales.append(scale)
    return Trajectory(torch.stack(states), torch.stack(means), torch.stack(scales))


def path_under(law: LatentLaw, path: Trajectory, temperature: float) -> Trajectory:
    """The same states with the moments that another law has along them, in one call."""
    means, log_variances = law.path_moments(path.states[:-1])
    return Trajectory(path.states, means, (0.5 * log_variances).exp() * temperature)


def gaussian_log_ratio(
    x: Tensor, above: tuple[Tensor, Tensor], below: tuple[Tensor, Tensor]
) -> Tensor:
    """log N(x; above) - log N(x; below), summed over the last axis, float64.

    Args:
        x: [..., D].
        above, below: mean and standard deviation [..., D] each.
    """
    (mean_a, scale_a), (mean_b, scale_b) = (
        tuple(t.double() for t in law) for law in (above, below)
    )
    at_a, at_b = (x.double() - mean_a) / scale_a, (x.double() - mean_b) / scale_b
    return (0.5 * (at_b.square() - at_a.square()) + scale_b.log() - scale_a.log()).sum(-1)


def path_log_ratio(above: Trajectory, below: Trajectory) -> Tensor:
    """log p(path | above) - log p(path | below) [M] of one path under two laws.

    A finite sum of Gaussian log ratios; the start has the same law under both.
    """
    laws = ((above.means, above.scales), (below.means, below.scales))
    return gaussian_log_ratio(below.states[1:], *laws).sum(0)


def last_step_log_ratio(target: Trajectory, draft: Trajectory, widening: float) -> Tensor:
    """The published surrogate of log p(x) - log q(x) [M] at the draft's latents x.

    Either law is taken along its own chain: densities of x under the last steps, times the product
    of the ratios of the earlier steps' deviations; with shared noise the exponents of these steps
    cancel. It compares two different paths and is not a ratio of any two densities.

    Args:
        target: drawn from the target's law with the noise that drew `draft`.
        draft: drawn from the draft's law.
        widening: factor on the deviations of the last step.

    Paper: Wang et al., "Continuous Speculative Decoding for Autoregressive Image Generation", 2024,
    section 3.2.
    """
    earlier = (draft.scales[:-1].double().log() - target.scales[:-1].double().log()).sum((0, 2))
    return earlier + last_step_ratio_at(draft.latents, target, draft, widening)


def last_step_ratio_at(x: Tensor, target: Trajectory, draft: Trajectory, widening: float) -> Tensor:
    """log ratio [M] of the widened last steps at `x` [M, D]."""
    wide_target = (target.means[-1], target.scales[-1] * widening)
    wide_draft = (draft.means[-1], draft.scales[-1] * widening)
    return gaussian_log_ratio(x, wide_target, wide_draft)


def iteration_ends(num_tokens: int, num_iter: int) -> list[int]:
    """Latents drawn after each of `num_iter` iterations, by the cosine schedule.

    After iteration k, floor(N cos(pi/2 (k+1)/K)) latents stay masked, at least 1 and at least one
    fewer than before; the last iteration draws the rest.

    Paper: Chang et al., "MaskGIT: Masked Generative Image Transformer", 2022, section 3.3.
    """
    masked, ends = num_tokens, []
    for k in range(num_iter - 1):
        share = math.cos(math.pi / 2 * (k + 1) / num_iter)
        masked = max(1, min(masked - 1, math.floor(num_tokens * share)))
        ends.append(num_tokens - masked)
    return [*ends, num_tokens]


GUIDANCE_SCHEDULES = ("linear", "constant", "falling")


def guidance_scales(ends: list[int], scale: float, schedule: str) -> list[float]:
    """Guidance scale of each iteration.

    "linear" grows from 1 with the share of latents drawn after the iteration; as in the official
    code one latent counts as masked to the end, so that it stops at 1 + (scale - 1) (N - 1) / N.
    "falling" goes from the full scale towards 1 with the share of latents drawn before.

    Args:
        ends: see `iteration_ends`.
        scale: the full one.
        schedule: a name in `GUIDANCE_SCHEDULES`.
    """
    num = ends[-1]
    if schedule == "constant":
        return [scale] * len(ends)
    if schedule == "falling":
        return [1 + (scale - 1) * (num - start) / num for start in [0, *ends[:-1]]]
    return [1 + (scale - 1) * min(end, num - 1) / num for end in ends]
