"""Continuous speculative decoding."""

from __future__ import annotations

from typing import Any

from diffusers.configuration_utils import register_to_config

from ..contracts import Conditions, ContinuousModel, Samples
from ..decoding.latents.loop import LatentPlan
from ..decoding.latents.speculation import CONTEXTS, DRAFTINGS, Speculation, speculate_latents
from ..decoding.latents.verify import CRITERIA, MOST_TRIES
from ..decoding.logits import check_guidance_scale
from ..decoding.run import Run
from ..errors import InputError, check_count, unknown_name
from ..portable import OnlyWith
from .base import BaseSampler, register


@register("cspd", exact=False, drives="continuous")
class CSpDSampler(BaseSampler):
    """A smaller continuous model drafts latents, one pass of the target verifies them.

    Draft and target see the same noise in every denoising step, so that their chains stay close.
    Guidance and temperature are those of either law; a linear guidance schedule gives each drafted
    iteration its own scale. After a rejection everything drafted behind it is forgotten.

    Criteria:

    - "published": densities of the last step, either law along its own chain, with the deviations
      widened by `inner_temperature`. Approximate: two different chains are compared.
    - "trajectory": the joint law of the whole chain, a finite sum of Gaussian log ratios.

    Contexts:

    - "verified": the target sees what was known before the round; one row per image. Approximate,
      since drafted latents do not see one another in the target.
    - "batched": the target sees every prefix of the drafts, as rows of one pass.

    Law: "trajectory" with "batched" is exact: the law of `ar` with `last_noise=True` and the same
    schedule, whatever the draft; all other combinations are lossy. Cost: iterations per round
    times the draft's cost, and one pass of the target. Models: continuous models, the draft one with
    the same latents, grid and number of denoising steps.

    Args:
        draft: the draft: name of a registered model or a folder (a pipeline loads it), a loaded
            pipeline, or a continuous model. None for the one that the pipeline recommends.
        criterion: see above.
        context: see above.
        max_draft: iterations drafted per round at most.
        drafting: "parallel": one draft pass for all iterations of a round; "sequential": each drafted
            iteration sees the ones before, one draft pass each.
        prefill: share of the iterations that the target draws alone at first.
        inner_temperature: factor on the last deviations in the published criterion; 1 accepts next
            to nothing, the released code has 42.
        max_tries: proposals for a rejected latent; then the target's last draw stays, counted as
            `exhausted` in the statistics.
        num_iter: iterations, 1 to the number of latents; None for one latent at a time.
        order: "random" or "raster"; a causal model has only the latter.
        guidance_schedule: "linear", "constant" or "falling", see `ar`.
        temperature: multiplies the noise of both chains. At 0 chains have no density: refused.
        draft_guidance_scale: guidance scale of the draft; None for the target's.

    Raises:
        InputError: an unknown name, a value out of range, or an option of the other criterion.

    Paper: Wang et al., "Continuous Speculative Decoding for Autoregressive Image Generation", 2024.
    The exact pair is ours: the published ratio compares two chains, and the released code verifies
    in one context, keeps what was drafted behind a rejection, accepts by a distance alone, inverts
    the product of deviations, and leaves zeros after 100 failed tries.
    """

    needs = {"draft": ContinuousModel}

    keeps_given = True

    only_with = (
        OnlyWith(
            ("inner_temperature",), "criterion", lambda name: name == "published", "'published'"
        ),
    )

    @register_to_config
    def __init__(
        self,
        draft: Any = None,
        criterion: str = "published",
        context: str = "verified",
        max_draft: int = 8,
        drafting: str = "parallel",
        prefill: float = 0.05,
        inner_temperature: float = 42.0,
        max_tries: int = 1000,
        num_iter: int | None = None,
        order: str = "random",
        guidance_schedule: str = "constant",
        temperature: float = 1.0,
        draft_guidance_scale: float | None = None,
    ) -> None:
        check_count("max_draft", max_draft)
        check_count("max_tries", max_tries, MOST_TRIES)
        for name, value, known in (
            ("criterion", criterion, CRITERIA),
            ("context", context, CONTEXTS),
            ("drafting", drafting, DRAFTINGS),
        ):
            if value not in known:
                raise unknown_name(name, value, known)
        if not 0 <= prefill <= 1:
            raise InputError(f"prefill {prefill}: expected a share of the iterations, 0 to 1")
        if not 0 < inner_temperature < float("inf"):
            raise InputError(f"inner_temperature {inner_temperature}: expected a number > 0")
        if temperature == 0:
            raise InputError(
                "temperature 0: a chain without noise has no density to compare; expected a number "
                "> 0, or the sampler 'ar'"
            )
        if draft_guidance_scale is not None:
            check_guidance_scale(draft_guidance_scale)
        self._plan = LatentPlan(
            num_iter=num_iter,
            order=order,
            guidance_schedule=guidance_schedule,
            temperature=temperature,
            last_noise=True,
        )
        self._how = Speculation(
            max_draft=max_draft,
            criterion=criterion,
            context=context,
            drafting=drafting,
            widening=inner_temperature,
            prefill=prefill,
            max_tries=max_tries,
        )
        self.check_idle()
        self.take("draft", draft)

    @property
    def is_exact(self) -> bool:
        """Whether this configuration draws from the target's own law."""
        return self._how.criterion == "trajectory" and self._how.context == "batched"

    def decode(self, model: Any, conditions: Conditions, run: Run) -> Samples:
        """Draw one image per condition.

        Returns:
            Latents [B, N, D] and the statistics of `speculate_latents`.

        Raises:
            InputError: no draft, one with other latents, or an argument out of range.
        """
        return speculate_latents(
            model,
            self.bound("draft"),
            conditions,
            run,
            plan=self._plan,
            how=self._how,
            draft_guidance_scale=self.config["draft_guidance_scale"],
        )
