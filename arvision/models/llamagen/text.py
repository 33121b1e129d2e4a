"""Captions to features for text-conditional LlamaGen models, through a T5 encoder."""

from __future__ import annotations

import html
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError

_RULES = (
    (re.compile(r"https?://\S+|www\.\S+"), " "),
    (re.compile(r"<[^>]*>"), " "),
    (re.compile(r"@[\w\d]+\b"), " "),
    (re.compile(r"[\u2010-\u2015\u2212]"), "-"),
    (re.compile(r"[\u2018\u2019\u00b4`]"), "'"),
    (re.compile(r"[\u00ab\u00bb\u201c\u201d\u201e]"), '"'),
    (re.compile(r"\\n|\s+"), " "),
)


def clean_caption(text: str) -> str:
    """A caption in the plain form that T5-conditioned models are trained on.

    Lower case, without links, tags and mentions, with plain dashes and quotes and single spaces.
    The official models clean twice; a second pass of this function changes nothing.
    """
    text = html.unescape(html.unescape(text)).lower()
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text.strip()


class CaptionEncoder:
    """Captions to T5 features.

    Args:
        text_encoder: module with `last_hidden_state` [B, L, caption_dim] in its output.
        text_tokenizer: its tokenizer.
        length: longest caption in text tokens.
    """

    def __init__(self, text_encoder: nn.Module, text_tokenizer: Any, length: int) -> None:
        self.text_encoder, self.text_tokenizer, self.length = text_encoder, text_tokenizer, length

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> list[Tensor]:
        """Features [T_i, caption_dim] of each caption, without padding.

        Raises:
            InputError: an empty caption, or one of which the text encoder knows no word.
        """
        cleaned = [clean_caption(caption) for caption in captions]
        for caption, text in zip(captions, cleaned, strict=True):
            if not text:
                raise InputError(f"empty prompt {caption!r}: expected a caption")
        device = next(self.text_encoder.parameters()).device
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
                f"the text encoder does not know {', '.join(strange)} in {caption!r}", stacklevel=3
            )
