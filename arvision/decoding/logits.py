"""The one place where logits become probabilities: `Shaping`, whose rule stands beside its kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..contracts import Schedule
from ..errors import InputError, shown, warn_once
from ..kernels import dispatch, sampling
from ..kernels.sampling import Laws, Shaping, guide

__all__ = [
    "Apart",
    "Laws",
    "LeavesGuidance",
    "Shaping",
    "check_guidance_scale",
    "guide",
    "guided",
    "has_weights",
    "idle_law",
    "joined",
    "joined_scales",
    "laws_of",
    "leave_guidance",
    "per_scale",
    "shape_rows",
    "warn_of_greedy",
    "weights_at",
    "written",
]


@dataclass(frozen=True)
class Apart:
    """Logits whose guidance waits: a kernel that draws from them applies it as it reads them.

    Attributes:
        conditional: [B, T, V].
        null: likewise, of the null condition.
        scale: as `guide` takes it.
    """

    conditional: Tensor
    null: Tensor
    scale: Any

    def __getitem__(self, rows: Any) -> Apart:
        """Some rows of the batch."""
        scale = self.scale[rows] if isinstance(self.scale, Tensor) else self.scale
        return Apart(self.conditional[rows], self.null[rows], scale)


@runtime_checkable
class LeavesGuidance(Protocol):
    """A state whose passes leave guidance to the loop, where that is asked for.

    They then give `Apart` wherever there are null rows.
    """

    leaves_guidance: bool


def leave_guidance(state: Any, like: Tensor) -> None:
    """Ask a state to leave guidance to the draw, where a kernel draws on the device of `like`."""
    if isinstance(state, LeavesGuidance):
        state.leaves_guidance = not dispatch.stays(like)


def guided(conditional: Tensor, null: Tensor, scale: Any, *, is_left: bool) -> Tensor | Apart:
    """Guided logits [B, T, V], or `Apart` where guidance is left to whoever draws."""
    return Apart(conditional, null, scale) if is_left else guide(conditional, null, scale)


def joined(logits: Tensor | Apart) -> Tensor:
    """Guided logits [B, T, V]."""
    if isinstance(logits, Apart):
        return guide(logits.conditional, logits.null, logits.scale)
    return logits


def laws_of(shape: Callable[[Tensor], Any], logits: Tensor | Apart) -> Any:
    """Log-probabilities [B, T, V] of logits, or `Laws` where a kernel may draw from the logits.

    Args:
        shape: guided logits to log-probabilities; only a `Shaping` is something a kernel knows.
        logits: of a state that `LeavesGuidance`, or guided ones.
    """
    if not isinstance(shape, Shaping):
        return shape(joined(logits))
    if isinstance(logits, Apart):
        return sampling.laws_of(logits.conditional, shape, logits.null, logits.scale)
    return shape(logits) if dispatch.stays(logits) else sampling.laws_of(logits, shape)


def written(laws: Tensor | Laws) -> Tensor:
    """Log-probabilities [B, T, V] that stand in memory."""
    return laws.written if isinstance(laws, Laws) else laws


def idle_law(options: Mapping[str, Any]) -> list[str]:
    """Which of `top_k` and `top_p` are set where greedy drawing does not look at them.

    Args:
        options: by name; the temperature is a number, or one for each scale. None, a `top_k` of 0
            and a `top_p` of 1 ask for nothing.
    """
    temperature = options.get("temperature")
    listed = temperature if isinstance(temperature, Sequence) else [temperature]
    if any(value != 0 for value in listed):
        return []
    neutral = {"top_k": 0, "top_p": 1}
    return [name for name, none in neutral.items() if options.get(name) not in (None, none)]


def warn_of_greedy(options: Mapping[str, Any]) -> None:
    """Say once which of `top_k` and `top_p` change nothing, see `idle_law`.

    A warning is enough: transformers has it so.
    """
    for name in idle_law(options):
        warn_once(f"{name} {shown(options[name])} at temperature 0: it has no effect")


def check_guidance_scale(scale: Any) -> None:
    """Refuse a guidance scale below 0, or one that is not a finite number.

    Raises:
        InputError: see above.
    """
    if isinstance(scale, Tensor):  # weights of images and tokens, see `arvision.decoding.guidance`
        return
    if isinstance(scale, (str, Sequence)):
        raise InputError(
            f"guidance_scale {scale!r}: expected a number >= 0; only scale models take a list, one "
            "number for each scale"
        )
    if not 0 <= scale < float("inf"):
        raise InputError(f"guidance_scale {scale}: expected a number >= 0")


def joined_scales(own: Any, num: int, other: Any, others: int, like: Tensor) -> Any:
    """The guidance scale of two groups of images: a number where all have the same, else [B, 1, 1],
    or [B, N] where one has a weight for each token.

    Args:
        own: a number, [num, 1, 1] or [num, N].
        num: images of the first group.
        other: likewise of the second.
        others: images of the second group.
        like: whose dtype and device the weights take.
    """
    if not isinstance(own, Tensor) and not isinstance(other, Tensor) and own == other:
        return own
    found = [torch.as_tensor(one, dtype=like.dtype, device=like.device) for one in (own, other)]
    widths = [one.shape[1] for one in found if one.dim() == 2]
    parts = []
    for one, count in zip(found, (num, others), strict=True):
        if widths and one.dim() != 2:
            one = one.flatten().view(-1, 1).expand(count, widths[0])
        parts.append(one if widths else one.expand(count, 1, 1))
    return torch.cat(parts)


def weights_at(scale: Any, places: Tensor | None, like: Tensor) -> Any:
    """The guidance scale of logits [B, T, V] for tokens at `places` [B, T], as `guide` takes it.

    Args:
        scale: a number, [B, 1, 1], or [B, N], one for each token of an image.
        places: of the tokens that the logits are for; only looked at for the last.
        like: the logits.
    """
    if not has_weights(scale) or places is None:
        return scale
    weights = scale.to(like.device).gather(1, places.clamp(0, scale.shape[1] - 1))
    return weights.to(like.dtype)[..., None]


def has_weights(scale: Any) -> bool:
    """Whether a guidance scale has a weight for each token."""
    return isinstance(scale, Tensor) and scale.dim() == 2


def shape_rows(logits: Tensor, shapings: Sequence[Shaping]) -> Any:
    """Each row's own law.

    Args:
        logits: [B, ..., V], guided.
        shapings: one per row.

    Returns:
        Log-probabilities [B, ..., V], in each row those of its shaping alone; where all have one,
        see `laws_of`.
    """
    groups: dict[Shaping, list[int]] = {}
    for row, shaping in enumerate(shapings):
        groups.setdefault(shaping, []).append(row)
    if len(groups) == 1:
        return laws_of(next(iter(groups)), logits)
    laws = torch.empty_like(logits, dtype=torch.promote_types(logits.dtype, torch.float32))
    for shaping, rows in groups.items():
        laws[rows] = shaping(logits[rows])
    return laws


def per_scale(name: str, value: Schedule, num_scales: int) -> list[float]:
    """One number >= 0 for each scale.

    Args:
        name: of the option, for messages.
        value: a number for all scales, or a list.
        num_scales: of the model.

    Raises:
        InputError: a list of another length, or an entry that is no number >= 0.
    """
    listed: list[float] = list(value) if isinstance(value, Sequence) else [value] * num_scales
    if len(listed) != num_scales:
        raise InputError(
            f"{name} of {len(listed)} numbers: expected one number, or {num_scales}, one for each "
            "scale"
        )
    for entry in listed:
        if not isinstance(entry, (int, float)) or not 0 <= entry < float("inf"):
            raise InputError(f"{name} {entry!r}: expected a number >= 0")
    return listed
