"""Guidance that changes over an image, or from image to image, as one weight for each unit.

A unit is what a model draws at a time: a token, a scale, or an iteration of latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, plain_numbers, unknown_name
from .latents.chain import GUIDANCE_SCHEDULES, guidance_scales

SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "linear": lambda share: share,
    "falling": lambda share: 1.0 - share,
    "cosine": lambda share: 0.5 - 0.5 * float(torch.cos(torch.tensor(torch.pi * share))),
}
"""How far the weight is from 1 to the scale, by the share of the image that is drawn (0 to 1)."""


@dataclass(frozen=True)
class Guidance:
    """What a call says about guidance, before it is known of how many units the images are.

    Attributes:
        scale: a number; a list with one for each unit; or a list of lists, one for each image, of one
            number or one for each unit.
        schedule: None; a name in `SHAPES`; a pair (begin, end) of shares of the image, outside of which
            the weight is 1; or a function of the share (0 to 1) and the scale.

    Raises:
        InputError: something else, a number below 0, or a schedule beside numbers for each unit.
    """

    scale: Any
    schedule: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.schedule, str) and self.schedule not in SHAPES:
            raise unknown_name("guidance_schedule", self.schedule, SHAPES)
        if isinstance(self.schedule, (list, tuple)):
            pair = [plain_numbers(share) for share in self.schedule]
            fits = len(pair) == 2 and all(isinstance(share, (int, float)) for share in pair)
            if not fits or not 0 <= pair[0] < pair[1] <= 1:
                raise InputError(
                    f"guidance_schedule {self.schedule!r}: expected shares (begin, end) of the image, "
                    "0 <= begin < end <= 1"
                )
        elif self.schedule is not None and not (
            isinstance(self.schedule, str) or callable(self.schedule)
        ):
            raise InputError(
                f"guidance_schedule {self.schedule!r}: expected one of {', '.join(SHAPES)}, a pair of "
                "shares, or a function of the share and the scale"
            )
        if self.schedule is not None and any(len(row) > 1 for row in self._rows()):
            raise InputError(
                "guidance_scale with a number for each unit, and guidance_schedule: expected one of them"
            )

    @property
    def is_per_image(self) -> bool:
        """Whether images have weights of their own."""
        return isinstance(self.scale, Sequence) and isinstance(self.scale[0], Sequence)

    def _rows(self) -> list[list[float]]:
        if self.is_per_image:
            return [list(row) for row in self.scale]
        return [list(self.scale) if isinstance(self.scale, Sequence) else [self.scale]]

    def check_images(self, num: int) -> None:
        """Refuse weights for another number of images than `num` (`InputError`)."""
        if self.is_per_image and len(self.scale) != num:
            raise InputError(
                f"guidance_scale of {len(self.scale)} lists: expected {num}, one for each image (a list "
                "of numbers has one for each token, scale or iteration)"
            )

    def part(self, part: slice) -> Guidance:
        """That of some of the images."""
        return replace(self, scale=self.scale[part]) if self.is_per_image else self

    def weights(
        self, ends: Sequence[int], batch: int, noun: str, of_latents: bool = False
    ) -> Tensor:
        """The weight of each unit, [B, U] float64.

        Args:
            ends: tokens drawn after each unit.
            batch: B.
            noun: what messages call a unit.
            of_latents: whether "linear" and "falling" are those of continuous models, see
                `arvision.decoding.latents.chain.guidance_scales`.

        Raises:
            InputError: another number of images or units than there are, or a schedule that gives no
                number >= 0.
        """
        rows, num = self._rows(), len(ends)
        self.check_images(batch)
        for row in rows:
            is_one = len(row) == 1 and (self.is_per_image or not isinstance(self.scale, Sequence))
            if len(row) != num and not is_one:
                raise InputError(
                    f"guidance_scale of {len(row)} numbers: expected one number, or {num}, one for each "
                    f"{noun} (a list of lists has one for each image)"
                )
        is_listed = any(len(row) > 1 for row in rows)
        found = [
            row if is_listed and len(row) == num else self._along(row[0], ends, of_latents)
            for row in rows
        ]
        weights = torch.tensor(found, dtype=torch.float64)
        if not bool(((weights >= 0) & weights.isfinite()).all()):
            raise InputError("guidance_schedule: expected a function that gives numbers >= 0")
        return weights.expand(batch, -1)

    def _along(self, scale: float, ends: Sequence[int], of_latents: bool) -> list[float]:
        """The weights of units that end at `ends` under the schedule."""
        num, schedule = len(ends), self.schedule
        if schedule is None:
            return [scale] * num
        starts = [0, *ends[:-1]]
        if isinstance(schedule, str):
            if of_latents and schedule in GUIDANCE_SCHEDULES:
                return guidance_scales(list(ends), scale, schedule)
            shape = SHAPES[schedule]
            return [1 + (scale - 1) * shape(unit / max(1, num - 1)) for unit in range(num)]
        if callable(schedule):
            found = [plain_numbers(schedule(unit / max(1, num - 1), scale)) for unit in range(num)]
            if not all(
                isinstance(one, (int, float)) and not isinstance(one, bool) for one in found
            ):
                raise InputError("guidance_schedule: expected a function that gives numbers >= 0")
            return [float(one) for one in found]
        begin, end = schedule
        return [scale if begin <= start / ends[-1] < end else 1.0 for start in starts]

    def of(self, model: Any, batch: int) -> Any:
        """What a token or scale model takes: a number, a list, or [B, U] where images differ.

        Continuous models take it as it is: their iterations are the sampler's.
        """
        scales = getattr(model, "scales", None)
        if scales is None and hasattr(model, "head"):
            return self
        num, noun = (model.num_tokens, "token") if scales is None else (len(scales), "scale")
        weights = self.weights(range(1, num + 1), batch, noun)
        if bool((weights == weights[:1, :1]).all()) and scales is None:
            return float(weights[0, 0])
        if scales is not None and bool((weights == weights[:1]).all()):
            return weights[0].tolist()
        return weights


def read_guidance(scale: Any, schedule: Any, kind: str, num_images: int) -> Any:
    """A number or a list for scales as it is, everything else as `Guidance`.

    Args:
        scale: checked numbers, see `Guidance.scale`.
        schedule: see there.
        kind: of the model.
        num_images: of the call.

    Raises:
        InputError: see `Guidance`, lists for another number of images, or a student, which has its teacher's guidance.
    """
    is_nested = isinstance(scale, list) and any(isinstance(row, list) for row in scale)
    is_listed = isinstance(scale, list) and kind != "scale"
    if schedule is None and not is_nested and not is_listed:
        return scale
    if kind == "student":
        raise InputError("guidance that changes: a student has its teacher's, expected none")
    guidance = Guidance(scale, schedule)
    guidance.check_images(num_images)
    return guidance


def plain_scale(guidance: Any) -> Any:
    """A number that costs what these weights cost: 1, 0, or another one."""
    for value in (0.0, 1.0):
        if weights_are(guidance, value):
            return value
    return 2.0 if isinstance(guidance, (Tensor, list)) else guidance


def weights_are(guidance: Any, value: float) -> bool:
    """Whether all weights, a number, a list or a tensor, are `value`."""
    if isinstance(guidance, Tensor):
        return bool((guidance == value).all())
    if isinstance(guidance, Sequence):
        return all(weight == value for weight in guidance)
    return guidance == value
