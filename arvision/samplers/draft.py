"""Speculative sampling with a draft model."""

from __future__ import annotations

from typing import Any

from diffusers.configuration_utils import register_to_config

from ..contracts import Conditions, Samples, TellsCalibration, TokenModel
from ..decoding.draft_model import (
    UNCALIBRATED,
    Calibration,
    DraftModelDrafter,
    check_draft,
)
from ..decoding.logits import check_guidance_scale
from ..decoding.loop import FixedWindow, WindowPolicy, decode_tokens
from ..decoding.run import Run
from ..decoding.verify import Rule, coupling_name, get_coupling
from ..errors import InputError, check_count
from .base import TokenSampler, inner_model, register


@register("draft", exact=True, drives="token")
class DraftSampler(TokenSampler):
    """A smaller model drafts a chain, one pass of the target verifies it.

    Couplings:

    - "gumbel": the draft picks argmax(log q + g), the target argmax(log p + g), with the noise g of
      the position. The picture is token for token the one that `ar` draws for the same seed (up to
      float ties), whatever the draft, its length and the batch; hence the default. A draft is
      accepted with probability >= (1 - TV) / (1 + TV).
    - "independent", "maximal": accept with probability min(1, p / q), else draw from the normalised (p - q)+.
      A picture of the same law, which depends on the draft; accepted with probability 1 - TV, the
      most that any rule can reach for one draft. The two differ in what they do behind the first
      rejection, where a chain that is drafted anew has nothing to keep.

    A chain ends early when one of its drafts will probably be rejected: the draft's confidence is
    turned into a probability of acceptance by a calibration that a trained draft brings along.

    Law: exact with all. Cost: N / tokens-per-pass passes of at most `max_draft + 1` tokens, and as
    many passes of the draft as tokens are drafted. Models: token models, the draft one of the same
    vocabulary and grid.

    Args:
        draft: the draft: name of a registered model or a folder (a pipeline loads it), a loaded
            pipeline, or any token model. None for the one that the pipeline recommends, or that is
            given by `bind`.
        coupling: see above.
        max_draft: tokens drafted per pass at most.
        stop_threshold: end a chain when the probability of at least one rejection exceeds this; 1
            always drafts `max_draft` tokens.
        draft_guidance_scale: guidance scale of the draft; None for the target's.
        temperature: divides the logits of both models; 0 is greedy.
        top_k: tokens kept, 0 for all.
        top_p: mass kept, 1 for all.

    Raises:
        InputError: an unknown coupling, or a value out of range.

    Paper: Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative
    Decoding", 2023, algorithm 1; Chen et al., "Accelerating Large Language Model Decoding with
    Speculative Sampling", 2023; Huang, Guo and Wang, "SpecDec++", 2024, for the length.
    """

    needs = {"draft": TokenModel}

    keeps_given = True

    @register_to_config
    def __init__(
        self,
        draft: Any = None,
        coupling: str = "gumbel",
        max_draft: int = 8,
        stop_threshold: float = 0.7,
        draft_guidance_scale: float | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> None:
        check_count("max_draft", max_draft)
        if not 0 <= stop_threshold <= 1:
            raise InputError(f"stop_threshold {stop_threshold}: expected 0 <= stop_threshold <= 1")
        if draft_guidance_scale is not None:
            check_guidance_scale(draft_guidance_scale)
        self.register_to_config(coupling=coupling_name(coupling))
        self.shaping()
        self.take("draft", draft)

    def _checked(self, models: dict[str, Any]) -> dict[str, Any]:
        for draft in super()._checked(models).values():
            _calibration(draft)
        return models

    def rule(self, model: TokenModel) -> Rule:
        """The configured coupling."""
        return get_coupling(self.config["coupling"])

    def policy(self, model: TokenModel) -> WindowPolicy:
        """The last known token and the drafts."""
        return FixedWindow(self.config["max_draft"] + 1)

    def decode(self, model: Any, conditions: Conditions, run: Run) -> Samples:
        """Run the decoding loop with the draft model.

        Returns:
            Tokens and the statistics of `decode_tokens`; further `drafted`, `accepted`,
            `acceptance_rate` (of drafts) and `draft_passes` (calls of the draft model).

        Raises:
            InputError: no draft, or one of another vocabulary or grid; see also `TokenSampler`.
        """
        draft = self.bound("draft")
        check_draft(draft, model)
        own_scale = self.config["draft_guidance_scale"]
        drafter = DraftModelDrafter(
            draft,
            conditions,
            run.guidance_scale if own_scale is None else own_scale,
            self.shaping(),
            coupling=self.config["coupling"],
            calibration=_calibration(self._bound["draft"]),
            stop_threshold=self.config["stop_threshold"],
        )
        samples = decode_tokens(
            model,
            conditions,
            run,
            drafter=drafter,
            rule=self.rule(model),
            shape=self.shaping(),
            policy=self.policy(model),
        )
        figures = drafter.figures
        samples.stats.update(
            drafted=figures.drafted,
            accepted=figures.accepted,
            acceptance_rate=figures.acceptance_rate,
            draft_passes=figures.passes,
        )
        return samples


def _calibration(draft: Any) -> Calibration:
    """How a draft's confidence becomes a probability of acceptance: a pipeline's word or its model's."""
    for owner in (draft, inner_model(draft)):
        if isinstance(owner, TellsCalibration) and owner.calibration:
            return Calibration(owner.calibration)
    return UNCALIBRATED
