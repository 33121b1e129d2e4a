"""What a prompt means to a model: class ids and names, captions with pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import InputError, unknown_name


@dataclass(frozen=True)
class Prompt:
    """A prompt with what belongs to it, for models that take text.

    Attributes:
        prompt: a caption, text features [T, C], or token ids [L] of a whole prompt, behind which the
            drawing starts; what a model takes, it says.
        negative: what guidance leads away from, of the same kind; None for the model's own.
        images: pictures that the prompt speaks of (PIL images, or codes [h, w] where a model says so),
            for models that edit.
    """

    prompt: Any
    negative: Any = None
    images: Sequence[Any] = ()


ImagePrompt = Prompt
"""The name for prompts that come with pictures."""


def as_prompt(condition: Any) -> Prompt:
    """A caption, text features or a `Prompt` of those as a `Prompt`.

    Raises:
        InputError: anything else.
    """
    if isinstance(condition, (str, Tensor)):
        condition = Prompt(condition)
    if not isinstance(condition, Prompt) or not isinstance(condition.prompt, (str, Tensor)):
        raise InputError(
            f"condition {condition!r}: expected a caption, text features [T, C], or "
            "Prompt(caption or features, negative=...)"
        )
    if condition.images:
        raise InputError(
            f"{len(condition.images)} images beside the prompt: this model takes text alone"
        )
    return condition


def resolve_class(condition: object, num_classes: int, names: Sequence[str]) -> int:
    """Class id of a condition: an id, a name, or the last word of a name ("boot").

    Raises:
        InputError: an id out of range, a name that no class has, or an empty prompt.
    """
    if isinstance(condition, bool) or not isinstance(condition, (int, str)):
        raise InputError(f"condition {condition!r}: expected a class id or a class name")
    if isinstance(condition, int):
        if not 0 <= condition < num_classes:
            raise InputError(f"class {condition}: expected 0..{num_classes - 1}")
        return condition
    text = condition.strip().lower()
    if not text:
        raise InputError("empty prompt: expected a class id or a class name")
    if text.isdecimal():
        return resolve_class(int(text), num_classes, names)
    lowered = [name.lower() for name in names]
    if text in lowered:
        return lowered.index(text)
    by_last_word = [i for i, name in enumerate(lowered) if name.split()[-1] == text]
    if len(by_last_word) == 1:
        return by_last_word[0]
    raise unknown_name("class", condition, names or [f"0..{num_classes - 1}"])
