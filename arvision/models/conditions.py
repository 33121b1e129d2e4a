"""What a prompt means to a model: class ids and names, captions with pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, unknown_name


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


@dataclass(frozen=True)
class ImagePrompt:
    """A prompt with what belongs to it.

    Attributes:
        prompt: a caption, or token ids [L] of a whole prompt, behind which the drawing starts.
        negative: what guidance leads away from, of the same kind; None for the model's own.
        images: pictures that the prompt speaks of (PIL images, or codes [h, w] where a model says so),
            for models that edit.
    """

    prompt: Any
    negative: Any = None
    images: Sequence[Any] = ()
