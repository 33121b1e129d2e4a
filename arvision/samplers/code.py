"""CoDe: a large scale model draws the coarse scales, a small one finishes."""

from __future__ import annotations

from typing import Any

from diffusers.configuration_utils import register_to_config

from ..contracts import Conditions, Samples, ScaleModel, Schedule
from ..decoding.run import Run
from ..decoding.scale_loop import decode_scales
from ..errors import InputError, check_count
from .base import TokenSampler, register


@register("code", exact=False, drives="scale")
class CoDeSampler(TokenSampler):
    """The first scales from a draft model (the large one), the others from the model itself.

    Most tokens lie in the last scales and most of the difficulty in the first, so a small model may
    finish what a large one has begun. It reads the drafted scales in the pass of its first own scale.

    Law: lossy; neither that of the draft nor of the model, whose tokens are drawn exactly, though,
    from their own laws given what came before. Cost: one pass per scale, `draft_scales` of them by
    the draft. Models: scale models with the same scales and
    codebook, or bits.

    Args:
        draft: the large model: a name, folder, pipeline or model.
        draft_scales: scales that the draft draws, from 1 to all but one.
        temperature: divides the logits; 0 is greedy; a list has a number for each scale.
        top_k: tokens kept, 0 for all.
        top_p: mass kept, 1 for all.

    Raises:
        InputError: a value out of range.

    Paper: Chen et al., "Collaborative Decoding Makes Visual Auto-Regressive Modeling Efficient",
    2024, section 3.3 (without the fine-tuning of both models to their scales).
    """

    needs = {"draft": ScaleModel}

    keeps_given = True

    @register_to_config
    def __init__(
        self,
        draft: Any = None,
        draft_scales: int = 3,
        temperature: Schedule = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> None:
        check_count("draft_scales", draft_scales)
        self.check_shaping()
        self.take("draft", draft)

    def decode(self, model: Any, conditions: Conditions, run: Run) -> Samples:
        """Draw the first scales with the draft and the others with `model`.

        Raises:
            InputError: no draft, one of other scales or vocabulary, or scales left for nobody.
        """
        draft, count = self.bound("draft"), self.config["draft_scales"]
        for what in ("scales", "vocab_size", "num_bits"):
            own, wanted = getattr(draft, what, None), getattr(model, what, None)
            if own != wanted:
                raise InputError(f"the draft has {what} {own}: expected {wanted}, the model's")
        if count >= len(model.scales):
            raise InputError(f"draft_scales {count}: expected 1 to {len(model.scales) - 1}")
        return decode_scales(
            model, conditions, run, shape=self.scale_shaping(model), draft=draft, draft_scales=count
        )
