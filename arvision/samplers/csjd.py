"""Speculative Jacobi decoding of continuous latents."""

from __future__ import annotations

from typing import Any

from diffusers.configuration_utils import register_to_config

from ..contracts import Conditions, Samples
from ..decoding.latents.jacobi import iterate_latents
from ..decoding.latents.loop import LatentPlan
from ..decoding.latents.speculation import Speculation, speculate_latents
from ..decoding.latents.verify import MOST_TRIES
from ..decoding.run import Run
from ..errors import InputError, check_count, unknown_name
from ..portable import OnlyWith
from .base import BaseSampler, register

CRITERIA = ("trajectory", "tolerance")


@register("csjd", exact=True, drives="continuous")
class CSJDSampler(BaseSampler):
    """A continuous model guesses its own next latents and checks all guesses in one pass.

    A place has its noise from the start, whatever is known, so its latent settles as the latents
    before it do. No draft model is needed.

    - "trajectory": a guess is a draft: it was drawn from the law that an earlier, poorer context
      gave, and stays with the ratio of the laws of its whole chain, as in `cspd`. Exact.
    - "tolerance": a guess stays if drawing it anew in the better context, with the same noise, moves
      it by `tolerance` at most. Lossy by the tolerance; at 0 it gives the very picture of `ar` (up
      to rounding) and hardly saves a pass.

    Law: "trajectory" draws the law of `ar` with `last_noise=True` and the same schedule; "tolerance"
    is lossy. Cost: a pass has a row for each iteration of the window. Models: continuous models.

    Args:
        criterion: see above.
        window: iterations that a pass looks at.
        tolerance: largest difference of an entry of a latent that counts as none ("tolerance").
        max_tries: proposals for a rejected latent ("trajectory"), see `cspd`.
        num_iter: iterations, 1 to the number of latents; None for one latent at a time.
        order: "random" or "raster"; a causal model has only the latter.
        guidance_schedule: "linear", "constant" or "falling", see `ar`.
        temperature: multiplies the noise of the chains; 0 only with "tolerance".

    Raises:
        InputError: an unknown name, a value out of range, or an option of the other criterion.

    Ours, after Teng et al., "Accelerating Auto-regressive Text-to-Image Generation with
    Training-free Speculative Jacobi Decoding", 2024 (discrete tokens), and Wang et al., "Continuous
    Speculative Decoding for Autoregressive Image Generation", 2024, section 3 (shared noise).
    """

    keeps_given = True

    only_with = (
        OnlyWith(("tolerance",), "criterion", lambda name: name == "tolerance", "'tolerance'"),
        OnlyWith(("max_tries",), "criterion", lambda name: name == "trajectory", "'trajectory'"),
    )

    @register_to_config
    def __init__(
        self,
        criterion: str = "trajectory",
        window: int = 4,
        tolerance: float = 0.1,
        max_tries: int = 1000,
        num_iter: int | None = None,
        order: str = "random",
        guidance_schedule: str = "constant",
        temperature: float = 1.0,
    ) -> None:
        check_count("window", window)
        check_count("max_tries", max_tries, MOST_TRIES)
        if criterion not in CRITERIA:
            raise unknown_name("criterion", criterion, CRITERIA)
        if not 0 <= tolerance < float("inf"):
            raise InputError(f"tolerance {tolerance}: expected a number >= 0")
        if temperature == 0 and criterion == "trajectory":
            raise InputError(
                "temperature 0: a chain without noise has no density to compare; expected a number "
                "> 0, or criterion 'tolerance'"
            )
        self._plan = LatentPlan(
            num_iter=num_iter,
            order=order,
            guidance_schedule=guidance_schedule,
            temperature=temperature,
            last_noise=criterion == "trajectory",
        )
        self.check_idle()

    @property
    def is_exact(self) -> bool:
        """Whether this configuration draws from the model's own law."""
        return self.config["criterion"] == "trajectory"

    def decode(self, model: Any, conditions: Conditions, run: Run) -> Samples:
        """Draw one image per condition.

        Returns:
            Latents [B, N, D] and the statistics of `speculate_latents` or `iterate_latents`.

        Raises:
            InputError: a window above the number of latents.
        """
        window, tolerance = self.config["window"], self.config["tolerance"]
        if window > model.num_tokens:
            raise InputError(f"window {window}: expected 1 to {model.num_tokens}, the latents")
        if not self.is_exact:
            return iterate_latents(
                model, conditions, run, plan=self._plan, window=window, tolerance=tolerance
            )
        how = Speculation(
            max_draft=window,
            criterion="trajectory",
            context="batched",
            drafting="parallel",
            widening=1.0,
            prefill=0.0,
            max_tries=self.config["max_tries"],
        )
        return speculate_latents(model, None, conditions, run, plan=self._plan, how=how)
