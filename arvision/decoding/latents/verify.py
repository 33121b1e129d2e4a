"""Verification of drafted latents: which stay, and what replaces a rejected one.

A *slot* is one latent that a round may draw: an image and a position. Everything here is flat, with
one row per slot, so images may stand anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..noise import Noise
from .chain import (
    LatentHead,
    LatentLaw,
    Trajectory,
    chain_noise,
    draw_chain,
    last_step_log_ratio,
    last_step_ratio_at,
    path_log_ratio,
    path_under,
)

CRITERIA = ("published", "trajectory")
MOST_TRIES = 10_000
"""Proposals for a rejected latent at most."""

MOST_AT_ONCE = 64
"""Residual proposals of a slot that are drawn in one chain."""


@dataclass
class Slots:
    """M latents to draw.

    Attributes:
        images: [M] int64, row of the noise and of the state.
        positions: [M] int64.
        places: [M] int64, how many iterations after the image's known ones.
        z: [M, Dz], conditions of the head.
        scales: [M], guidance scales.
    """

    images: Tensor
    positions: Tensor
    places: Tensor
    z: Tensor
    scales: Tensor

    def select(self, rows: Tensor) -> Slots:
        """Some of the slots, given by index or mask."""
        parts = (self.images, self.positions, self.places, self.z, self.scales)
        return Slots(*(part[rows] for part in parts))

    def law(self, head: LatentHead) -> LatentLaw:
        """Their law under a head."""
        return head.law(self.z, self.scales)

    def noise(
        self, noise: Noise, head: LatentHead, purpose: str, round_number: Tensor | int = 0
    ) -> Tensor:
        """Normal numbers [K + 1, M, D] of their chains; `round_number` is one integer, or [M]."""
        own = round_number[:, None] if isinstance(round_number, Tensor) else round_number
        numbers = chain_noise(
            noise.select(self.images), self.positions[:, None], head, purpose, own
        )
        return numbers[:, :, 0].to(self.z)

    def uniform(self, noise: Noise, purpose: str, round_number: Tensor | int) -> Tensor:
        """Uniform numbers [M], float64."""
        own = round_number[:, None] if isinstance(round_number, Tensor) else round_number
        return noise.select(self.images).uniform(self.positions[:, None], purpose, own)[:, 0]


@dataclass
class Verification:
    """Counts of one run."""

    drafted: int = 0
    accepted: int = 0
    rejected: int = 0
    nonfinite: int = 0
    proposals: int = 0
    exhausted: int = 0
    head_calls: int = 0


@dataclass(kw_only=True)
class Verifier:
    """Compares the laws of a draft's head and a target's.

    Criteria:

    - "trajectory": the ratio of the joint laws of the whole chain, a finite sum of Gaussian log
      ratios, evaluated along the drafted chain in one call of the target's head. Accepting with
      min(1, p / q) and replacing rejected latents by fresh chains of the target, accepted with
      max(0, 1 - q / p), gives the target's law exactly, whatever the draft.
    - "published": the ratio of the densities of the last step, either law along its own chain (see
      `last_step_log_ratio`); rejected latents are redrawn from the target's last step, accepted with
      max(0, 1 - q / p) of the same surrogate. Approximate.

    Attributes:
        target, draft: heads with the same number of steps and latents of the same width.
        criterion: see above.
        temperature: of both laws.
        widening: factor on the last deviations in the published ratio and residual.
        max_tries: proposals per rejected latent; then the last one, a plain draw of the target,
            stays and is counted as exhausted.
        noise: of the images.

    Paper: Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative
    Decoding", 2023, appendix A.1; Wang et al., "Continuous Speculative Decoding for Autoregressive
    Image Generation", 2024, section 3.
    """

    target: LatentHead
    draft: LatentHead
    criterion: str
    temperature: float
    widening: float
    max_tries: int
    noise: Noise
    counts: Verification = field(default_factory=Verification)

    def draw(self, head: LatentHead, slots: Slots) -> Trajectory:
        """Chains of slots with the shared noise of their positions."""
        numbers = slots.noise(self.noise, head, "latent")
        self.counts.head_calls += head.num_steps if head is self.target else 0
        return draw_chain(slots.law(head), numbers, self.temperature, last_noise=True)

    def compare(
        self, slots: Slots, drafted: Trajectory, extra: Slots
    ) -> tuple[Tensor, Trajectory, Tensor | None]:
        """Log acceptance ratios of drafts.

        Args:
            slots: drafted ones, with the target's conditions.
            drafted: their chains under the draft's head.
            extra: slots that follow, if every draft of their image stays.

        Returns:
            Log ratios [M] float64, -inf where one is not finite; the target's chains (or its
            moments along the drafted ones); latents [X, D] of the extra slots, or None where the
            criterion has not drawn them on the way.
        """
        if self.criterion == "trajectory":
            self.counts.head_calls += 1
            along = path_under(slots.law(self.target), drafted, self.temperature)
            return self._finite(path_log_ratio(along, drafted)), along, None
        num = len(slots.images)
        both = join(slots, extra)
        paths = self.draw(self.target, both)
        own = paths.select(torch.arange(num, device=slots.images.device))
        ratio = last_step_log_ratio(own, drafted, self.widening)
        return self._finite(ratio), own, paths.latents[num:]

    def _finite(self, log_ratio: Tensor) -> Tensor:
        is_finite = log_ratio.isfinite()
        self.counts.nonfinite += int((~is_finite).sum())
        return torch.where(is_finite, log_ratio, -torch.inf)

    def replace(
        self, slots: Slots, z_draft: Tensor, drafted: Trajectory, own: Trajectory
    ) -> Tensor:
        """Latents [M, D] in place of rejected ones.

        Args:
            slots: with the target's conditions.
            z_draft: [M, Dz'], the draft's.
            drafted: their chains under the draft's head.
            own: see `compare`.
        """
        if self.criterion == "published":
            return self._redraw_last_step(slots, drafted, own)
        return self._redraw_chain(slots, z_draft)

    def _redraw_last_step(self, slots: Slots, drafted: Trajectory, own: Trajectory) -> Tensor:
        tries, dim = self.max_tries, drafted.latents.shape[1]
        noise = self.noise.select(slots.images)
        numbers = noise.normal(slots.positions[:, None], tries * dim, "recover")[:, 0]
        numbers = numbers.unflatten(-1, (tries, dim)).transpose(0, 1).to(drafted.latents)
        proposals = own.means[-1] + own.scales[-1] * numbers
        at_draft = last_step_ratio_at(drafted.latents, own, drafted, self.widening)
        earlier = last_step_log_ratio(own, drafted, self.widening) - at_draft
        log_ratio = earlier + last_step_ratio_at(proposals, own, drafted, self.widening)
        uniforms = noise.uniform(slots.positions[:, None], "residual", num=tries)[:, 0].T
        passed = log_ratio.isfinite() & (uniforms < 1 - torch.exp(-log_ratio))
        found = passed.any(0)
        first = torch.where(found, passed.int().argmax(0), tries - 1)
        self.counts.proposals += int((first + 1).sum())
        self.counts.exhausted += int((~found).sum())
        return proposals[first, torch.arange(len(first), device=first.device)]

    def _redraw_chain(self, slots: Slots, z_draft: Tensor) -> Tensor:
        out = slots.z.new_empty(len(slots.images), self.target.latent_dim)
        pending = torch.arange(len(out), device=out.device)
        tried, num = 0, 4
        while len(pending):
            num = min(num, self.max_tries - tried)
            rows = pending.repeat_interleave(num)
            # Each try of the rejection loop is a round of its own.
            rounds = tried + torch.arange(num, device=out.device).repeat(len(pending))
            some = slots.select(rows)
            numbers = some.noise(self.noise, self.target, "recover", rounds)
            path = draw_chain(some.law(self.target), numbers, self.temperature, last_noise=True)
            law = self.draft.law(z_draft[rows], some.scales)
            log_ratio = path_log_ratio(path_under(law, path, self.temperature), path)
            uniforms = some.uniform(self.noise, "residual", rounds)
            passed = log_ratio.isfinite() & (uniforms < 1 - log_ratio.exp())
            passed = passed.view(-1, num)
            tried += num
            found = passed.any(1)
            first = torch.where(found, passed.int().argmax(1), num - 1)
            done = found if tried < self.max_tries else torch.ones_like(found)
            latents = path.latents.view(len(pending), num, -1)
            picked = latents[torch.arange(len(first), device=first.device), first]
            out[pending[done]] = picked[done].to(out)
            self.counts.head_calls += self.target.num_steps
            self.counts.proposals += int(torch.where(found, first + 1, num).sum())
            self.counts.exhausted += int((done & ~found).sum())
            pending = pending[~done]
            num = min(2 * num, MOST_AT_ONCE)
        return out


def join(*parts: Slots) -> Slots:
    """Slots of several lists in one."""
    names = ("images", "positions", "places", "z", "scales")
    return Slots(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
