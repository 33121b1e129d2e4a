"""Plain autoregressive sampling, the baseline of everything else."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from diffusers.configuration_utils import register_to_config

from ..contracts import (
    Conditions,
    ContinuousModel,
    Samples,
    ScaleModel,
    Schedule,
    TokenModel,
    codebook_of,
)
from ..decoding.flow import FlowMap, flow_pick, flow_rule
from ..decoding.latents.loop import LatentPlan, decode_latents
from ..decoding.loop import Drafter, NoDrafter
from ..decoding.run import Run
from ..decoding.scale_loop import ScalePlan, decode_scales
from ..decoding.verify import Rule, gumbel_coupling, gumbel_draw
from ..errors import InputError
from .base import TokenSampler, register

OPTION_KINDS = {
    "top_k": ("token", "scale"),
    "top_p": ("token", "scale"),
    "noise": ("token", "scale"),
    "prune": ("scale",),
    "prune_scales": ("scale",),
    "more_smooth": ("scale",),
    "num_iter": ("continuous",),
    "order": ("continuous",),
    "guidance_schedule": ("continuous",),
    "last_noise": ("continuous",),
    "refresh": ("continuous",),
    "reuse_guidance": ("continuous",),
    "final_head_steps": ("continuous",),
}
"""Options that not every kind of model has, and the kinds that do."""


@register("ar", exact=True, drives="token, scale, continuous")
class ARSampler(TokenSampler):
    """One unit of generation per pass: a token, a scale, or a set of latents.

    Token models: each token is argmax(log p + g) with Gumbel noise g that is a function of (seed,
    image, position): an exact draw from p, and the same one that every Gumbel-coupled sampler makes.

    Scale models: the same draw for all tokens of a scale at once; positions count over all scales.
    Where tokens are bits, each bit is drawn so.

    Continuous models: `num_iter` sets of latents, few at first and more later (cosine schedule),
    each drawn by the model's head with noise that is a function of (seed, image, position, diffusion
    step).

    With noise "flow" a token is instead the code that Gaussian noise, a function of (seed, image,
    position), flows to: as exact (to the accuracy of the flow's 100 steps), and the picture is a
    smooth function of its noise, which students of Distilled Decoding learn (see `dd`).

    Law: exact; for continuous models, of the model with that schedule; lossy with `prune`,
    `more_smooth`, `refresh` or `final_head_steps`. Cost: N - 1 passes after the prefill; one pass per scale; `num_iter` passes.
    Models: all.

    Args:
        temperature: divides the logits, or multiplies the noise of a chain; 0 is greedy: the most
            likely token, or the mean of each step. Scale models also take a list, a number for each
            scale.
        top_k: tokens kept, 0 for all.
        top_p: mass kept, 1 for all.
        noise: "gumbel" or, for models with a codebook, "flow".
        prune: scale models: share of the tokens of the last scales that each layer does not compute
            but restores from the last whole scale (FastVAR), which is lossy; 0 for none.
        prune_scales: scale models: number of last scales that are pruned.
        more_smooth: scale models: mix likely codes into smoother pictures, for display; lossy.
        num_iter: continuous models: iterations, 1 to the number of latents; None for one latent at
            a time.
        order: continuous models: "random", another order for each image, or "raster"; a causal
            model draws in raster order whatever stands here.
        guidance_schedule: continuous models: "linear" grows the scale from 1 as latents become
            known, "falling" goes from the scale towards 1, "constant" keeps it.
        last_noise: continuous models: also add noise in the last denoising step, as samplers that
            compare densities must (see `cspd`); official samplers do not, but NextStep-1.1's.
        refresh: continuous models: compute all features anew every so many iterations; in between
            only those of the newest and the next latents (LazyMAR's token cache). Lossy above 1.
        reuse_guidance: continuous models, with `refresh`: in between also leave out the
            unconditional rows and reuse their distance from the conditional ones. Lossy.
        final_head_steps: continuous models: denoising steps of the last latents; the number falls
            evenly from the model's own as the image is drawn (DiSA). Lossy; None for all steps.

    Raises:
        InputError: a value out of range, or an option that the model's kind does not know.
    """

    @register_to_config
    def __init__(
        self,
        temperature: Schedule = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        noise: str = "gumbel",
        prune: float = 0.0,
        prune_scales: int = 2,
        more_smooth: bool = False,
        num_iter: int | None = None,
        order: str = "random",
        guidance_schedule: str = "constant",
        last_noise: bool = False,
        refresh: int = 1,
        reuse_guidance: bool = False,
        final_head_steps: int | None = None,
    ) -> None:
        self.check_shaping()
        if noise not in ("gumbel", "flow"):
            raise InputError(f"noise {noise!r}: expected 'gumbel' or 'flow'")
        self._scale_plan = ScalePlan(
            prune=prune, prune_scales=prune_scales, more_smooth=more_smooth
        )
        self._plan = LatentPlan(
            num_iter=num_iter,
            order=order,
            guidance_schedule=guidance_schedule,
            temperature=1.0 if isinstance(temperature, Sequence) else temperature,
            last_noise=last_noise,
            refresh=refresh,
            reuse_guidance=reuse_guidance,
            final_head_steps=final_head_steps,
        )

    @property
    def is_exact(self) -> bool:
        """Whether every token is drawn from the model's own law."""
        plan = self._plan
        return self._scale_plan.is_plain and plan.refresh == 1 and plan.final_head_steps is None

    def drafter(self, model: TokenModel) -> Drafter:
        """Nothing is drafted."""
        return NoDrafter()

    def rule(self, model: TokenModel) -> Rule:
        """A draw with fixed noise."""
        return flow_rule(self._flow_map(model)) if self._flows else gumbel_coupling

    @property
    def _flows(self) -> bool:
        return self.config["noise"] == "flow"

    @staticmethod
    def _flow_map(model: Any) -> FlowMap:
        codebook = codebook_of(model)
        if codebook is None:
            raise InputError("noise 'flow': this model has no codebook to flow to")
        return FlowMap(codebook)

    def decode(self, model: Any, conditions: Conditions, run: Run) -> Samples:
        """Run the loop of the model's kind.

        Raises:
            InputError: an option that the model's kind does not know.
        """
        if isinstance(model, ContinuousModel):
            self._refuse_others("continuous")
            self.shaping()  # refuses a list of temperatures
            return decode_latents(model, conditions, run, plan=self._plan)
        if isinstance(model, ScaleModel):
            self._refuse_others("scale")
            shape, plan = self.scale_shaping(model), self._scale_plan
            pick = flow_pick(self._flow_map(model)) if self._flows else gumbel_draw
            return decode_scales(model, conditions, run, shape=shape, pick=pick, plan=plan)
        self._refuse_others("token")
        return super().decode(model, conditions, run)

    def _refuse_others(self, kind: str) -> None:
        """Refuse a changed option that models of this kind do not have."""
        defaults = inspect.signature(type(self).__init__).parameters
        for name, kinds in OPTION_KINDS.items():
            value, default = self.config[name], defaults[name].default
            if kind not in kinds and value != default:
                raise InputError(
                    f"{name} {value!r}: a {kind} model has no such option, expected {default!r}"
                )
