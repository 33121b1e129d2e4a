"""What a prompt means to a model: class ids and names, captions with pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, as_integer, plain_numbers, unknown_name
from .pixels import check_depth


@dataclass(frozen=True)
class Prompt:
    """A prompt with what belongs to it, for models that take text.

    Attributes:
        prompt: a caption, text features [T, C] or [1, T, C] (a tensor, an array, or the output of a
            text encoder), or token ids [L] of a whole prompt, behind which the
            drawing starts; what a model takes, it says.
        negative: what guidance leads away from, of the same kind; None for the model's own.
        mask: of text features [B, T, C] or [T, C] as an encoder gives them: [B, T] or [T], true where
            they count; features of several captions are as many prompts.
        images: pictures that the prompt speaks of (PIL images, or codes [h, w] where a model says so),
            for models that edit; PIL images of 8 bits a channel.

    Raises:
        InputError: a PIL image of 16 or 32 bits, which would be read as white.
    """

    prompt: Any
    negative: Any = None
    images: Sequence[Any] = ()
    mask: Any = None

    def __post_init__(self) -> None:
        for image in self.images if isinstance(self.images, (list, tuple)) else ():
            check_depth(image)


ImagePrompt = Prompt
"""The name for prompts that come with pictures."""


def as_prompt(condition: Any) -> Prompt:
    """A caption, text features or a `Prompt` of those as a `Prompt`.

    Raises:
        InputError: anything else.
    """
    if not isinstance(condition, Prompt):
        condition = Prompt(condition)
    if not (isinstance(condition.prompt, str) or are_features(condition.prompt)):
        raise InputError(
            f"condition {condition.prompt!r}: expected a caption, text features [T, C], or "
            "Prompt(caption or features, negative=...)"
        )
    parts = each_prompt(condition)
    if len(parts) != 1:
        raise InputError(f"text features of {len(parts)} captions in the place of one")
    condition = parts[0]
    if condition.images:
        raise InputError(
            f"{len(condition.images)} images beside the prompt: this model takes text alone"
        )
    return condition


def are_features(prompt: Any) -> bool:
    """Whether that is what a text encoder gives: [T, C] or [B, T, C] of real numbers, or its output."""
    prompt = getattr(prompt, "last_hidden_state", prompt)
    if isinstance(prompt, Tensor):
        return prompt.is_floating_point() and prompt.dim() >= 2
    return isinstance(prompt, np.ndarray) and prompt.dtype.kind == "f" and prompt.ndim >= 2


def read_features(given: Any, mask: Any = None) -> list[Tensor]:
    """Text features as an encoder gives them, without padding.

    Args:
        given: [T, C] or [B, T, C], a tensor or an array of any precision, or the output of an encoder
            of transformers.
        mask: [T] or [B, T], 1 where they count; None for everywhere.

    Returns:
        [T_i, C] of each caption.

    Raises:
        InputError: something else, a mask of another shape or with other numbers, or a caption of
            which nothing counts.
    """
    given = getattr(given, "last_hidden_state", given)
    if not are_features(given) or given.ndim > 3:
        shape = tuple(getattr(given, "shape", ())) or type(given).__name__
        raise InputError(f"text features {shape}: expected real numbers [T, C] or [B, T, C]")
    rows = given if isinstance(given, Tensor) else torch.from_numpy(np.ascontiguousarray(given))
    rows = rows[None] if rows.dim() == 2 else rows
    if mask is None:
        return list(rows)
    keep = mask if isinstance(mask, Tensor) else torch.as_tensor(np.asarray(mask))
    keep = keep[None] if keep.dim() == 1 else keep
    if keep.shape != rows.shape[:2] or not bool(((keep == 0) | (keep == 1)).all()):
        raise InputError(
            f"mask {tuple(keep.shape)} of text features {tuple(rows.shape)}: expected 0 and 1, "
            f"{tuple(rows.shape[:2])}"
        )
    keep = keep.to(rows.device).bool()
    if not bool(keep.any(1).all()):
        raise InputError("mask of text features: expected a 1 for each caption")
    return [row[own] for row, own in zip(rows, keep, strict=True)]


def each_prompt(condition: Any) -> list[Any]:
    """A condition that may hold features of several captions as one condition for each caption.

    Raises:
        InputError: see `read_features`; or negatives of another number of captions.
    """
    if not isinstance(condition, Prompt):
        return read_features(condition) if are_features(condition) else [condition]
    if not are_features(condition.prompt):
        return [condition]
    rows = read_features(condition.prompt, condition.mask)
    negatives = [condition.negative]
    if isinstance(condition.negative, Prompt) or are_features(condition.negative):
        negatives = each_prompt(condition.negative)
    negatives = negatives * len(rows) if len(negatives) == 1 else negatives
    if len(negatives) != len(rows):
        raise InputError(f"{len(negatives)} negatives of {len(rows)} captions: expected one each")
    return [
        replace(condition, prompt=row, negative=negative, mask=None)
        for row, negative in zip(rows, negatives, strict=True)
    ]


def check_class_names(names: Any, num_classes: int | None) -> None:
    """Refuse names that do not name the classes of a model; None is no names.

    Names that stand twice, as ImageNet's cranes do, are no fault: `resolve_class` asks for the id.

    Raises:
        InputError: no list of texts, another number than of classes, an empty one, or a model
            without classes.
    """
    if names is None:
        return
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise InputError(f"class_names {names!r}: expected a list of names, in the order of ids")
    if num_classes is None:
        raise InputError(f"{len(names)} class_names: this model takes captions, not classes")
    if len(names) != num_classes:
        raise InputError(f"{len(names)} class_names: expected {num_classes}, one for each class")
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"class_names[{index}] {name!r}: expected a name")


def resolve_class(condition: object, num_classes: int, names: Sequence[str]) -> int:
    """Class id of a condition: an id, a name, a synonym ("tench" of "tench, Tinca tinca"), or the
    last word of a name ("boot").

    Raises:
        InputError: an id out of range, a name that no class has or that several have, or an empty
            prompt.
    """
    if not isinstance(condition, str):
        number = None if isinstance(condition, float) else as_integer(condition)
        if number is None:
            raise InputError(f"condition {condition!r}: expected a class id or a class name")
        if not 0 <= number < num_classes:
            raise InputError(f"class {number}: expected 0..{num_classes - 1}")
        return number
    text = condition.strip().lower()
    if not text:
        raise InputError("empty prompt: expected a class id or a class name")
    lowered = [name.strip().lower() for name in names]
    synonyms = [[part.strip() for part in name.split(",")] for name in lowered]
    found = {i for i, name in enumerate(lowered) if name == text}
    found = found or {i for i, parts in enumerate(synonyms) if text in parts}
    if text.isdecimal():
        as_id = int(text[:20])
        if found - {as_id}:
            named = ", ".join(map(str, sorted(found)))
            raise InputError(
                f"class {condition!r} is an id and the name of class {named}: expected an integer"
            )
        return resolve_class(as_id, num_classes, names)
    if len(found) > 1:
        ids = ", ".join(map(str, sorted(found)))
        raise InputError(f"class {condition!r} is the name of classes {ids}: expected an id")
    found = found or {i for i, parts in enumerate(synonyms) if text in _last_words(parts)}
    if len(found) == 1:
        return found.pop()
    raise unknown_name("class", condition, names or [f"0..{num_classes - 1}"])


def read_classes(conditions: Sequence[Any], num_classes: int, names: Sequence[str]) -> Tensor:
    """Class ids [B], or weights [B, num_classes + 1] where classes are mixed; the last is the null class.

    Args:
        conditions: ids or names; None for the null class; or a mixture: a dict of ids or names to
            weights, or weights [num_classes] as a tensor or an array.
        num_classes: without the null class.
        names: of the classes.

    Raises:
        InputError: see `resolve_class`, or a mixture of nothing, of other numbers than reals, or of
            another number of classes.
    """
    if not any(_is_mixture(condition) for condition in conditions):
        ids = [
            num_classes if one is None else resolve_class(one, num_classes, names)
            for one in conditions
        ]
        return torch.tensor(ids, dtype=torch.int64)
    weights = torch.zeros(len(conditions), num_classes + 1, dtype=torch.float64)
    for row, condition in zip(weights, conditions, strict=True):
        if isinstance(condition, dict):
            for name, weight in condition.items():
                number = plain_numbers(weight)
                if isinstance(number, bool) or not isinstance(number, (int, float)):
                    raise InputError(f"weight {weight!r} of class {name!r}: expected a number")
                row[resolve_class(name, num_classes, names)] += number
        elif _is_mixture(condition):
            given = torch.as_tensor(condition, dtype=torch.float64).cpu()
            if given.shape != (num_classes,):
                raise InputError(
                    f"weights of classes {tuple(given.shape)}: expected [{num_classes}], one for each"
                )
            row[:num_classes] = given
        else:
            is_null = condition is None
            row[num_classes if is_null else resolve_class(condition, num_classes, names)] = 1.0
        if not bool(row.isfinite().all()) or not bool(row.any()):
            raise InputError("a mixture of classes: expected finite weights, not all 0")
    return weights


def null_classes(classes: Tensor, num_classes: int) -> Tensor:
    """The null class for each of `classes`, written as they are, see `read_classes`."""
    null = torch.full((len(classes),), num_classes, device=classes.device)
    if not classes.is_floating_point():
        return null
    return torch.nn.functional.one_hot(null, num_classes + 1).to(classes)


def embed_mixture(embed: Callable[[Tensor], Tensor], classes: Tensor) -> Tensor:
    """Embeddings [B, ...] of class ids [B], or sums of them by weights [B, n]."""
    if not classes.is_floating_point():
        return embed(classes)
    every = embed(torch.arange(classes.shape[1], device=classes.device))
    return torch.tensordot(classes.to(every), every, dims=1)


def _is_mixture(condition: Any) -> bool:
    if isinstance(condition, Tensor):
        return condition.is_floating_point() and condition.dim() == 1
    is_array = isinstance(condition, np.ndarray) and condition.dtype.kind == "f"
    return isinstance(condition, dict) or (is_array and condition.ndim == 1)


def _last_words(parts: Sequence[str]) -> set[str]:
    return {part.split()[-1] for part in parts if part}
