"""What loops over continuous models share, and plain sampling: one set of latents after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...contracts import Conditions, ContinuousModel, KeepsFeatures, Samples
from ...errors import InputError, check_count, unknown_name
from ..noise import Noise
from ..run import Run
from .chain import (
    GUIDANCE_SCHEDULES,
    chain_noise,
    draw_chain,
    guidance_scales,
    iteration_ends,
)

ORDERS = ("random", "raster")


@dataclass(frozen=True, kw_only=True)
class LatentPlan:
    """In which order, how many at a time and how latents are drawn.

    Attributes:
        num_iter: iterations, from 1 to the number of latents; None for one latent at a time.
        order: "random", another one for each image, or "raster", row by row.
        guidance_schedule: "linear" or "constant", see `guidance_scales`.
        temperature: multiplies the noise of the chains; 0 leaves their means.
        last_noise: also add noise in the last step of a chain.
        refresh: passes until everything is computed anew; in between the model reuses features.
        reuse_guidance: in between also reuse the distance of the unconditional condition.

    Raises:
        InputError: a value out of range.
    """

    num_iter: int | None = None
    order: str = "random"
    guidance_schedule: str = "constant"
    temperature: float = 1.0
    last_noise: bool = False
    refresh: int = 1
    reuse_guidance: bool = False

    def __post_init__(self) -> None:
        if self.num_iter is not None:
            check_count("num_iter", self.num_iter)
        check_count("refresh", self.refresh)
        if self.order not in ORDERS:
            raise unknown_name("order", self.order, ORDERS)
        if self.guidance_schedule not in GUIDANCE_SCHEDULES:
            raise unknown_name("guidance_schedule", self.guidance_schedule, GUIDANCE_SCHEDULES)
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature {self.temperature}: expected a number >= 0")

    def ends(self, num_tokens: int) -> list[int]:
        """Latents drawn after each iteration.

        Raises:
            InputError: more iterations than latents.
        """
        num_iter = num_tokens if self.num_iter is None else self.num_iter
        if num_iter > num_tokens:
            raise InputError(f"num_iter {num_iter}: expected 1 to {num_tokens}, the latents")
        return iteration_ends(num_tokens, num_iter)

    def scales(self, ends: Sequence[int], guidance_scale: float) -> list[float]:
        """Guidance scale of each iteration."""
        return guidance_scales(list(ends), guidance_scale, self.guidance_schedule)

    def orders(self, noise: Noise, num_tokens: int) -> Tensor:
        """Positions [B, N] in the order of drawing, a function of each image's identity."""
        every = torch.arange(num_tokens, device=noise.device).expand(len(noise), -1)
        if self.order == "raster":
            return every
        return noise.uniform(every, "order").argsort(1)


@torch.no_grad()
def decode_latents(
    model: ContinuousModel,
    conditions: Conditions,
    run: Run,
    *,
    plan: LatentPlan,
) -> Samples:
    """Draw one image per condition, one set of latents per pass.

    Args:
        model: a continuous model.
        conditions: one per image.
        run: the ledger; latents that are not drawn because `on_step` stopped the run stay 0.
        plan: order, iterations, guidance and temperature.

    Returns:
        Latents [B, N, D]; the statistics of `Run.stats`, and `head_steps` (calls of the head in
        sequence).

    Raises:
        InputError: more iterations than latents, or a latent that is NaN or infinite.
    """
    ends = plan.ends(model.num_tokens)
    scales = plan.scales(ends, run.guidance_scale)
    run.begin(getattr(model, "device", "cpu"), model.head.latent_dim)
    order = plan.orders(run.noise, model.num_tokens)
    state = model.start(conditions, run.guidance_scale, order)
    if plan.refresh > 1:
        if not isinstance(state, KeepsFeatures):
            raise InputError(f"refresh {plan.refresh}: this model keeps no features, expected 1")
        state.keep_features(plan.refresh, plan.reuse_guidance)
    images = torch.arange(run.batch, device=order.device)[:, None]
    for start, end, scale in zip([0, *ends[:-1]], ends, scales, strict=True):
        positions = order[:, start:end]
        z = state.condition(end - start)
        run.next_pass()
        numbers = chain_noise(run.noise, positions, model.head, "latent").to(z)
        law = model.head.law(z.flatten(0, 1), scale)
        path = draw_chain(law, numbers.flatten(1, 2), plan.temperature, plan.last_noise)
        drawn = path.latents.view(*positions.shape, -1)
        run.watch(drawn)
        run.record(images, positions, drawn)
        run.check()
        state.feed(drawn)
        run.report(torch.full_like(run.lengths, end - start))
        if run.stopped:
            break
    return run.samples(head_steps=run.num_passes * model.head.num_steps)
