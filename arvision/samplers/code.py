"""CoDe: a large scale model draws the coarse scales, a small one finishes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from diffusers.configuration_utils import register_to_config

from ..contracts import Conditions, Samples, ScaleModel
from ..decoding.scale_loop import decode_scales
from ..errors import InputError
from .base import TokenSampler, register


@register("code", exact=False, drives="scale")
class CoDeSampler(TokenSampler):
    """The first scales from a draft model (the large one), the others from the model itself.

    Most tokens lie in the last scales and most of the difficulty in the first, so a small model may
    finish what a large one has begun. It reads the drafted scales in the pass of its first own scale.

    Law: lossy; neither that of the draft nor of the model, whose tokens are drawn exactly, though,
    from their own laws given what came before. Cost: one pass per scale, `draft_scales` of them by
    the draft. Models: scale models with the same scales and codebook.

    Args:
        draft: the large model: a name, folder, pipeline or model.
        draft_scales: scales that the draft draws, from 1 to all but one.
        temperature: divides the logits; 0 is greedy.
        top_k: tokens kept, 0 for all.
        top_p: mass kept, 1 for all.

    Raises:
        InputError: a value out of range.

    Paper: Chen et al., "Collaborative Decoding Makes Visual Auto-Regressive Modeling Efficient",
    2024, section 3.3 (without the fine-tuning of both models to their scales).
    """

    @register_to_config
    def __init__(
        self,
        draft: Any = None,
        draft_scales: int = 3,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> None:
        is_count = isinstance(draft_scales, int) and not isinstance(draft_scales, bool)
        if not is_count or draft_scales < 1:
            raise InputError(f"draft_scales {draft_scales!r}: expected an integer >= 1")
        self.shaping()
        self._draft: ScaleModel | None = None
        if isinstance(draft, Path):
            self.register_to_config(draft=str(draft))
        elif draft is not None and not isinstance(draft, str):
            # A model is no configuration: what is saved is a sampler whose draft is still to come.
            self.register_to_config(draft=None)
            self.bind_draft(draft)

    @property
    def wants_draft(self) -> bool:
        """Whether a draft is still to be given by `bind_draft`."""
        return self._draft is None

    def bind_draft(self, draft: Any) -> None:
        """Give the sampler its draft, a scale model or a loaded pipeline around one.

        Raises:
            InputError: neither.
        """
        model = draft if isinstance(draft, ScaleModel) else getattr(draft, "model", None)
        if not isinstance(model, ScaleModel):
            raise InputError(
                f"draft {type(draft).__name__}: expected a model name, a folder, a pipeline around "
                "a scale model, or a scale model"
            )
        self._draft = model

    def with_options(self, **options: Any) -> CoDeSampler:
        """The same sampler with some options changed; it keeps its draft unless that is one."""
        changed = cast("CoDeSampler", super().with_options(**options))
        if "draft" not in options:
            changed._draft = self._draft
        return changed

    def decode(self, model: Any, conditions: Conditions, **run: Any) -> Samples:
        """Draw the first scales with the draft and the others with `model`.

        Raises:
            InputError: no draft, one of other scales or vocabulary, or scales left for nobody.
        """
        draft, count = self._draft, self.config["draft_scales"]
        if draft is None:
            name = self.config["draft"]
            given = "no draft" if name is None else f"draft {name!r} is a name that is not loaded"
            raise InputError(
                f"{given}: expected a scale model, a pipeline, or a name and a pipeline to load it"
            )
        for what in ("scales", "vocab_size"):
            if getattr(draft, what) != getattr(model, what):
                raise InputError(
                    f"the draft has {what} {getattr(draft, what)}: expected {getattr(model, what)}, "
                    "the model's"
                )
        if count >= len(model.scales):
            raise InputError(f"draft_scales {count}: expected 1 to {len(model.scales) - 1}")
        return decode_scales(
            model, conditions, shape=self.shaping(), draft=draft, draft_scales=count, **run
        )
