"""Plain sampling of continuous models: one set of latents per pass."""

from __future__ import annotations

from ...contracts import Conditions, ContinuousModel, Samples
from ...decoding.latents.loop import LatentPlan, decode_latents
from ...decoding.run import Run


def draw_latents(
    model: ContinuousModel,
    conditions: Conditions,
    run: Run,
    *,
    temperature: float,
    num_iter: int | None,
    order: str,
    guidance_schedule: str,
    last_noise: bool,
    refresh: int,
    reuse_guidance: bool,
    refresh_first: int,
    refresh_share: float | str | None,
    head_refresh: int,
    final_head_steps: int | None,
) -> Samples:
    """Draw sets of latents; for the options see `ARSampler`."""
    plan = LatentPlan(
        num_iter=num_iter,
        order=order,
        guidance_schedule=guidance_schedule,
        temperature=temperature,
        last_noise=last_noise,
        refresh=refresh,
        reuse_guidance=reuse_guidance,
        refresh_first=refresh_first,
        refresh_share=refresh_share,
        head_refresh=head_refresh,
        final_head_steps=final_head_steps,
    )
    return decode_latents(model, conditions, run, plan=plan)
