"""Plain autoregressive sampling, the baseline of everything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

from diffusers.configuration_utils import register_to_config

from ...contracts import Conditions, ContinuousModel, Samples, ScaleModel, Schedule, TokenModel
from ...decoding.latents.loop import LatentPlan
from ...decoding.run import Run
from ...decoding.scale_loop import ScalePlan
from ...errors import InputError
from ...portable import OnlyWith, options_of, plain_option
from ..base import TokenSampler, register
from .latent import draw_latents
from .scale import draw_scales
from .token import draw_tokens

KINDS: dict[str, tuple[type, Callable[..., Samples]]] = {
    "continuous": (ContinuousModel, draw_latents),
    "scale": (ScaleModel, draw_scales),
    "token": (TokenModel, draw_tokens),
}
"""Kind of model to its contract and to who draws it; the keyword arguments of a drawer are the
options that models of its kind have."""


def _options_of(kind: str) -> list[str]:
    parameters = signature(KINDS[kind][1]).parameters.values()
    return [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]


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
    `more_smooth`, `refresh`, `head_refresh` or `final_head_steps`. Cost: N - 1 passes after the prefill; one pass per scale; `num_iter` passes.
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
        prune_scales: scale models, with `prune`: number of last scales that are pruned.
        prune_whole: scale models, with `prune`: numbers of first and of last layers that are not
            pruned; FastVAR's code has (3, 4) for Infinity's 32.
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
        refresh_first: continuous models, with `refresh`: first iterations that compute everything.
        refresh_share: continuous models, with `refresh`: share of the places that iterations in between
            compute, those that changed most among them; "published" for LazyMAR's schedule; None for
            the newest and next latents alone.
        head_refresh: continuous models: denoising steps until the head is computed as a whole; in
            between it reuses what its blocks added (LazyMAR). Lossy above 1.
        final_head_steps: continuous models: denoising steps of the last latents; the number falls
            evenly from the model's own as the image is drawn (DiSA). Lossy; None for all steps.

    Raises:
        InputError: a value out of range, an option that means nothing with the others, or one that
            the model's kind does not know.
    """

    keeps_given = True

    only_with = (
        OnlyWith(("prune_scales", "prune_whole"), "prune", lambda share: share != 0, "above 0"),
        OnlyWith(
            ("reuse_guidance", "refresh_first", "refresh_share"),
            "refresh",
            lambda num: num != 1,
            "above 1",
        ),
    )

    @register_to_config
    def __init__(
        self,
        temperature: Schedule = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        noise: str = "gumbel",
        prune: float = 0.0,
        prune_scales: int = 2,
        prune_whole: Sequence[int] = (0, 0),
        more_smooth: bool = False,
        num_iter: int | None = None,
        order: str = "random",
        guidance_schedule: str = "constant",
        last_noise: bool = False,
        refresh: int = 1,
        reuse_guidance: bool = False,
        refresh_first: int = 0,
        refresh_share: float | str | None = None,
        head_refresh: int = 1,
        final_head_steps: int | None = None,
    ) -> None:
        self.check_shaping()
        if noise not in ("gumbel", "flow"):
            raise InputError(f"noise {noise!r}: expected 'gumbel' or 'flow'")
        self._scales = ScalePlan(
            prune=prune,
            prune_scales=prune_scales,
            prune_whole=prune_whole,
            more_smooth=more_smooth,
        )
        self._latents = LatentPlan(
            num_iter=num_iter,
            order=order,
            guidance_schedule=guidance_schedule,
            refresh=refresh,
            refresh_first=refresh_first,
            refresh_share=refresh_share,
            head_refresh=head_refresh,
            final_head_steps=final_head_steps,
        )
        self.check_idle()

    @property
    def is_exact(self) -> bool:
        """Whether every token is drawn from the model's own law."""
        plan = self._latents
        whole = plan.refresh == plan.head_refresh == 1 and plan.final_head_steps is None
        return self._scales.is_plain and whole

    def foreign(self, kind: str) -> dict[str, Any]:
        """Options that models of `kind` do not have and that are set here, to their defaults."""
        known = _options_of(kind) if kind in KINDS else []
        return {
            name: default
            for name, default in options_of(type(self)).items()
            if name not in known and plain_option(self.config[name]) != plain_option(default)
        }

    def decode(self, model: Any, conditions: Conditions, run: Run) -> Samples:
        """Run the loop of the model's kind.

        Raises:
            InputError: an option that the model's kind does not know.
        """
        kinds = (kind for kind, (contract, _) in KINDS.items() if isinstance(model, contract))
        kind = next(kinds, "token")  # what cannot decode pictures is still a token model
        for name, default in self.foreign(kind).items():
            raise InputError(
                f"{name} {self.config[name]!r}: a {kind} model has no such option, expected "
                f"{default!r}"
            )
        draw, options = KINDS[kind][1], _options_of(kind)
        if kind != "scale":
            self.shaping()  # refuses a list of temperatures
        return draw(model, conditions, run, **{name: self.config[name] for name in options})
