"""Captions to text features, through a T5 encoder of transformers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..contracts import Conditions
from ..errors import InputError, one_line
from ..networks import place_of
from .conditions import Prompt, are_features, read_features

MOST_CHARACTERS = 100_000
"""Of a caption; text encoders read some hundred tokens, and cutting a longer text takes seconds."""


class CaptionEncoder:
    """Captions to T5 features.

    Args:
        text_encoder: module with `last_hidden_state` [B, L, caption_dim] in its output.
        text_tokenizer: its tokenizer.
        length: longest caption in text tokens.
        clean: brings a caption into the form that the model was trained on; None for none.
    """

    def __init__(
        self,
        text_encoder: nn.Module,
        text_tokenizer: Any,
        length: int,
        clean: Callable[[str], str] | None = None,
    ) -> None:
        self.text_encoder, self.text_tokenizer, self.length = text_encoder, text_tokenizer, length
        self._clean = clean if clean is not None else str.strip

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> list[Tensor]:
        """Features [T_i, caption_dim] of each caption, without padding.

        Raises:
            InputError: an empty caption, or one of which the text encoder knows no word.
        """
        for caption in captions:
            if len(caption) > MOST_CHARACTERS:
                raise InputError(
                    f"a caption of {len(caption):,} characters: expected at most {MOST_CHARACTERS:,}"
                )
        cleaned = [self._clean(caption) for caption in captions]
        for caption, text in zip(captions, cleaned, strict=True):
            if not text:
                raise InputError(f"empty prompt {caption!r}: expected a caption")
        self._tell_cut(cleaned)
        device = place_of(self.text_encoder)
        batch = self.text_tokenizer(
            cleaned,
            max_length=self.length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).to(device)
        self._check_words(cleaned, batch["input_ids"])
        mask = batch["attention_mask"]
        out = self.text_encoder(input_ids=batch["input_ids"], attention_mask=mask)
        return [
            features[keep.bool()]
            for features, keep in zip(out.last_hidden_state, mask, strict=True)
        ]

    def _tell_cut(self, captions: Sequence[str]) -> None:
        """One warning that quotes what does not fit into the text encoder's length."""
        tokenizer = self.text_tokenizer
        special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        cut = []
        for caption in captions:
            every = tokenizer(caption, verbose=False, return_offsets_mapping=tokenizer.is_fast)
            ids = every["input_ids"]
            if len(ids) <= self.length:
                continue
            read = tokenizer(caption, max_length=self.length, truncation=True)["input_ids"]
            places = [place for place, index in enumerate(ids) if index not in special]
            rest = places[sum(index not in special for index in read) :]
            if tokenizer.is_fast:
                text = caption[every["offset_mapping"][rest[0]][0] :]
            else:
                text = tokenizer.decode([ids[place] for place in rest])
            cut.append(f"{text!r} ({len(rest)} of {len(places)})")
        if cut:
            warnings.warn(
                f"captions longer than the {self.length} text tokens that the model reads; not read: "
                f"{'; '.join(dict.fromkeys(cut))}",
                stacklevel=3,
            )

    def _check_words(self, captions: Sequence[str], ids: Tensor) -> None:
        """Warn of unknown words; refuse a caption without any known one."""
        unknown = getattr(self.text_tokenizer, "unk_token_id", None)
        if unknown is None:
            return
        special = set(self.text_tokenizer.all_special_ids) - {unknown}
        for caption, row in zip(captions, ids.tolist(), strict=True):
            words = [index for index in row if index not in special]
            if unknown not in words:
                continue
            listed = self.text_tokenizer.get_vocab()
            known = sorted(w for w, i in listed.items() if i not in special and i != unknown)
            strange = [word for word in caption.split() if word not in listed]
            if all(index == unknown for index in words):
                raise InputError(
                    f"prompt {caption!r}: the text encoder knows none of its words; expected words "
                    f"such as {', '.join(known[:60])}"
                )
            warnings.warn(
                one_line(f"the text encoder does not know {', '.join(strange)} in {caption!r}"),
                stacklevel=3,
            )


def text_features(conditions: Conditions, captions: CaptionEncoder | None) -> list[Tensor]:
    """Features [T_i, C] of each condition: captions encoded in one batch, features as they are.

    Args:
        conditions: captions or text features.
        captions: None for a model without a text encoder.

    Raises:
        InputError: a caption without a text encoder, or something that is neither.
    """
    texts = [c for c in conditions if isinstance(c, str)]
    if texts and captions is None:
        raise InputError(
            f"caption {texts[0]!r}: this model has no text encoder; expected caption features "
            "[T, caption_dim]"
        )
    encoded = iter(captions(texts) if texts and captions is not None else [])
    features = []
    for condition in conditions:
        if isinstance(condition, str):
            features.append(next(encoded))
        elif are_features(condition) or _holds_features(condition):
            features.append(_one(condition))
        else:
            raise InputError(
                f"condition {condition!r}: expected a caption or caption features [T, caption_dim]"
            )
    return features


def padded_features(
    conditions: Conditions,
    captions: CaptionEncoder | None,
    shape: tuple[int, int],
    place: Tensor,
) -> tuple[Tensor, Tensor]:
    """Features [B, L, C] of each condition, padded on the left, and the rows that count [B, L] bool.

    Args:
        conditions: captions or text features.
        captions: None for a model without a text encoder.
        shape: L and C.
        place: a tensor of the device and type that are wanted.

    Raises:
        InputError: see `text_features`; or features of another shape.
    """
    length, width = shape
    features = place.new_zeros(len(conditions), length, width)
    valid = torch.zeros(len(conditions), length, dtype=torch.bool, device=place.device)
    for row, found in enumerate(text_features(conditions, captions)):
        if found.dim() != 2 or found.shape[1] != width or not 1 <= len(found) <= length:
            raise InputError(
                f"caption features {tuple(found.shape)}: expected [T, {width}] with T in 1..{length}"
            )
        features[row, length - len(found) :] = found.to(features)
        valid[row, length - len(found) :] = True
    return features, valid


def _holds_features(condition: Any) -> bool:
    """Whether that is features with a mask, and no more."""
    is_prompt = isinstance(condition, Prompt) and are_features(condition.prompt)
    return is_prompt and condition.negative is None and not len(condition.images)


def _one(condition: Any) -> Tensor:
    """Features [T, C] of one caption, as an encoder gives them.

    Raises:
        InputError: of several, something else, or NaN and infinity.
    """
    prompt = condition if isinstance(condition, Prompt) else Prompt(condition)
    rows = read_features(prompt.prompt, prompt.mask)
    if len(rows) != 1:
        raise InputError(f"text features of {len(rows)} captions in the place of one")
    if not bool(rows[0].isfinite().all()):
        raise InputError(
            f"caption features {tuple(rows[0].shape)}: NaN or infinity among them, expected finite "
            "numbers"
        )
    return rows[0]
