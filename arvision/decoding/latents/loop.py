"""What loops over continuous models share, and plain sampling: one set of latents after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...contracts import Conditions, ContinuousModel, KeepsFeatures, Samples, device_of, is_causal
from ...errors import InputError, check_count, unknown_name
from ..guidance import Guidance, plain_scale
from ..parts import fixed_part
from ..run import Run
from .chain import (
    GUIDANCE_SCHEDULES,
    LatentHead,
    chain_noise,
    draw_chain,
    guidance_scales,
    iteration_ends,
)

ORDERS = ("random", "raster")

LAZY_SHARES = (
    (20 / 64, 1.0),
    (25 / 64, 0.5),
    (30 / 64, 0.4),
    (35 / 64, 0.15),
    (40 / 64, 0.12),
    (1.0, 0.05),
)
"""Share of the places that LazyMAR computes up to a part of the passes, from its released code."""


@dataclass(frozen=True, kw_only=True)
class LatentPlan:
    """In which order, how many at a time and how latents are drawn.

    Attributes:
        num_iter: iterations, from 1 to the number of latents; None for one latent at a time.
        order: "random", another one for each image, or "raster", row by row. Causal models have only
            the latter.
        guidance_schedule: "linear", "constant" or "falling", see `guidance_scales`.
        temperature: multiplies the noise of the chains; 0 leaves their means.
        last_noise: also add noise in the last step of a chain.
        refresh: passes until everything is computed anew; in between the model reuses features.
        reuse_guidance: in between also reuse the distance of the unconditional condition.
        refresh_first: passes at the start that compute everything.
        refresh_share: share of the places that passes in between compute, those that changed most
            among them; "published" for `LAZY_SHARES`; None for the newest and next places alone.
        head_refresh: steps of a chain until the head is computed anew; in between it reuses what its
            blocks added and how far guidance moved it.
        final_head_steps: steps of the last iteration's chains; their number falls evenly with the
            latents drawn. None for all steps throughout.

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
    refresh_first: int = 0
    refresh_share: float | str | None = None
    head_refresh: int = 1
    final_head_steps: int | None = None

    def __post_init__(self) -> None:
        if self.num_iter is not None:
            check_count("num_iter", self.num_iter)
        check_count("refresh", self.refresh)
        check_count("head_refresh", self.head_refresh)
        if type(self.refresh_first) is not int or self.refresh_first < 0:
            raise InputError(f"refresh_first {self.refresh_first!r}: expected an integer >= 0")
        if self.refresh == 1 and (self.refresh_first or self.refresh_share is not None):
            raise InputError(
                "refresh_first, refresh_share with refresh 1: expected refresh above 1"
            )
        share = self.refresh_share
        is_share = isinstance(share, int | float) and 0 <= share <= 1
        if share is not None and share != "published" and not is_share:
            raise InputError(
                f'refresh_share {share!r}: expected a share in [0, 1], "published", or None'
            )
        if self.final_head_steps is not None:
            check_count("final_head_steps", self.final_head_steps)
        if self.order not in ORDERS:
            raise unknown_name("order", self.order, ORDERS)
        if self.guidance_schedule not in GUIDANCE_SCHEDULES:
            raise unknown_name("guidance_schedule", self.guidance_schedule, GUIDANCE_SCHEDULES)
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature {self.temperature}: expected a number >= 0")

    def ends(self, model: ContinuousModel) -> list[int]:
        """Latents drawn after each iteration.

        Raises:
            InputError: more iterations than latents, or fewer with a causal model.
        """
        num_tokens = model.num_tokens
        num_iter = num_tokens if self.num_iter is None else self.num_iter
        if num_iter > num_tokens:
            raise InputError(f"num_iter {num_iter}: expected 1 to {num_tokens}, the latents")
        if num_iter < num_tokens and is_causal(model):
            raise InputError(
                f"num_iter {num_iter}: a causal model draws one latent after another, expected None"
            )
        return iteration_ends(num_tokens, num_iter)

    def heads(self, head: LatentHead, ends: Sequence[int]) -> list[LatentHead]:
        """The head of each iteration, with fewer steps the more latents are drawn before it.

        Raises:
            InputError: more final steps than steps, or a head that cannot change them.

        Paper: Zhao et al., "DiSA: Diffusion Step Annealing in Autoregressive Image Generation",
        2025 (the linear schedule).
        """
        if self.head_refresh > 1:
            keeping = getattr(head, "keeping", None)
            if keeping is None:
                raise InputError(
                    f"head_refresh {self.head_refresh}: this head keeps nothing, expected 1"
                )
            head = keeping(self.head_refresh)
        final, most = self.final_head_steps, head.num_steps
        if final is None:
            return [head] * len(ends)
        with_steps = getattr(head, "with_steps", None)
        if with_steps is None or final > most:
            known = f"1 to {most}" if with_steps else f"None, this head always makes {most} steps"
            raise InputError(f"final_head_steps {final}: expected {known}")
        starts = [0, *ends[:-1]]
        last = max(1, starts[-1])
        counts = [round(most + (final - most) * start / last) for start in starts]
        made = {count: with_steps(count) for count in set(counts)}
        return [made[count] for count in counts]

    def shares(self, num_passes: int) -> list[float] | None:
        """Share of the places that each pass computes, see `refresh_share`."""
        share = self.refresh_share
        if share is None:
            return None
        if share != "published":
            return [float(share)] * num_passes
        found = (step / num_passes for step in range(num_passes))
        return [next(value for end, value in LAZY_SHARES if step < end) for step in found]

    def scales(self, ends: Sequence[int], guidance_scale: Any, batch: int) -> list[Any]:
        """Guidance scale of each iteration, a number or [B].

        Raises:
            InputError: weights for another number of iterations or images, or a second schedule.
        """
        if isinstance(guidance_scale, Guidance):
            if self.guidance_schedule != "constant":
                raise InputError(
                    f"guidance_schedule of the sampler ({self.guidance_schedule!r}) and of the call: "
                    "expected one of them"
                )
            weights = guidance_scale.weights(ends, batch, "iteration", of_latents=True)
            if bool((weights == weights[:1]).all()):
                return weights[0].tolist()
            return list(weights.unbind(1))
        return guidance_scales(list(ends), guidance_scale, self.guidance_schedule)

    def orders(self, run: Run, model: ContinuousModel) -> Tensor:
        """Positions [B, N] in the order of drawing, a function of each image's identity.

        Given latents come first, unless the model is causal.
        """
        every = torch.arange(model.num_tokens, device=run.noise.device).expand(run.batch, -1)
        if is_causal(model):
            return every
        rank = run.noise.uniform(every, "order") if self.order == "random" else every.double()
        if run.given is not None:
            rank = rank.masked_fill(run.given.mask, -1)
        return every if self.order == "raster" and run.given is None else rank.argsort(1)


def started_with(guidance_scale: Any, scales: Sequence[Any]) -> Any:
    """What a state is started with: whether there are null rows, for weights of all iterations."""
    if not isinstance(guidance_scale, Guidance):
        return guidance_scale
    rows = [torch.as_tensor(scale, dtype=torch.float64).flatten() for scale in scales]
    return plain_scale(torch.cat(rows))


def num_given_first(run: Run, model: ContinuousModel) -> int:
    """Given latents of each image that come before all others in the order of drawing; they are
    counted as final.

    Raises:
        InputError: images with other numbers of them, or a causal model that is given others than
            those at the beginning.
    """
    if run.given is None:
        return 0
    nums = set(run.given.nums)
    if len(nums) > 1:
        raise InputError(
            f"images with {min(nums)} to {max(nums)} given latents: expected as many of each in a batch"
        )
    if is_causal(model) and run.given.num_leading != run.given.nums:
        raise InputError(
            "given latents behind drawn ones, which a causal model has not seen: this sampler keeps a "
            "beginning only, expected one or sampler 'ar'"
        )
    run.skip(run.given.nums)
    return nums.pop()


@dataclass
class ChainDraw:
    """All steps of a head's chain: a function of fixed shapes.

    Attributes:
        head: whose laws are drawn from.
        scale: guidance of each latent, a number or [M].
        temperature, last_noise: see `draw_chain`.
    """

    head: LatentHead
    scale: Any
    temperature: float
    last_noise: bool

    def __call__(self, z: Tensor, noise: Tensor) -> Tensor:
        """Latents [M, D] of conditions [M, Dz] and noise [K + 1, M, D]."""
        law = self.head.law(z, self.scale)
        return draw_chain(law, noise, self.temperature, self.last_noise).latents


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
    ends = plan.ends(model)
    scales = plan.scales(ends, run.guidance_scale, run.batch)
    heads = plan.heads(model.head, ends)
    run.begin(device_of(model), (model.head.latent_dim,), torch.float32)
    order, given = plan.orders(run, model), run.given
    first = 0 if is_causal(model) else num_given_first(run, model)
    state = model.start(conditions, started_with(run.guidance_scale, scales), order)
    if plan.refresh > 1:
        if not isinstance(state, KeepsFeatures):
            raise InputError(f"refresh {plan.refresh}: this model keeps no features, expected 1")
        shares = plan.shares(len(ends))
        state.keep_features(plan.refresh, plan.reuse_guidance, plan.refresh_first, shares)
    images = torch.arange(run.batch, device=order.device)[:, None]
    if first:
        state.feed(run.tokens[images, order[:, :first]])
    head_steps = 0
    # A number is the graph's own for good: one that changes is told with the latents.
    is_told = bool(run.told) and len(set(map(str, scales))) > 1
    for start, end, scale, head in zip([0, *ends[:-1]], ends, scales, heads, strict=True):
        if end <= first:
            continue
        start = max(start, first)
        positions = order[:, start:end]
        if given is not None and bool(given.mask[images, positions].all()):
            state.feed(run.tokens[images, positions])
            run.skip([end - start] * run.batch)
            continue
        z = state.condition(end - start)
        run.next_pass()
        numbers = chain_noise(run.noise, positions, head, "latent").to(z)
        if isinstance(scale, Tensor):
            scale = scale.to(z).repeat_interleave(end - start)
        elif is_told:
            scale = z.new_full((z.shape[0] * z.shape[1],), scale)
        draw = ChainDraw(head, scale, plan.temperature, plan.last_noise)
        drawn = fixed_part(run, draw, z.flatten(0, 1), numbers.flatten(1, 2))
        drawn = drawn.view(*positions.shape, -1)
        if given is not None:
            drawn = given.over(drawn, positions)
        run.watch(drawn)
        run.record(images, positions, drawn)
        run.check()
        state.feed(drawn)
        head_steps += head.num_steps
        run.report(torch.full_like(run.lengths, end - start))
        if run.stopped:
            break
    return run.samples(head_steps=head_steps, **run.told)
