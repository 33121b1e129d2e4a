"""NextStep's prompt format: caption, size of the picture, begin of image; then the latents.

A row is `{caption} {positive}<|image_area|>{rows}*{columns}` and the begin of image; without a
positive prompt there is no space either. An edit's
caption has `<image>` in the place of each picture, which becomes that picture's own area, size,
begin of image, placeholders and end of image; the placeholders' embeddings are the picture's tokens.
Guidance leads away from the same row with the negative prompt as caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ..conditions import ImagePrompt

IMAGE_AREA = "<|image_area|>"
IMAGE_MARK = "<image>"


@dataclass(frozen=True)
class Captions:
    """What a pipeline saves besides the networks; there is no text encoder apart from the network."""

    text_tokenizer: Any
    text_encoder: None = None


@dataclass(frozen=True)
class PromptFormat:
    """Prompts to rows of token ids.

    Attributes:
        config: of the network: special tokens, grid, positive and negative prompt.
        text_tokenizer: of transformers; without one, prompts have to be token ids.
    """

    config: Any
    text_tokenizer: Any = None

    def rows(
        self, given: ImagePrompt, grids: Sequence[tuple[int, int]], is_guided: bool
    ) -> list[Tensor]:
        """Token ids [L] of each branch of guidance: prompt, images alone (where they have a guidance
        scale of their own), negative.

        Args:
            given: what the user wrote.
            grids: rows and columns of tokens of its images.
            is_guided: whether there is more than one branch.

        Raises:
            InputError: a condition that is none, has no words, or cannot be encoded.
        """
        caption, negative = given.prompt, given.negative
        if negative is None and not isinstance(caption, Tensor):
            negative = self.config["negative_prompt"]
        if isinstance(caption, str):
            if not caption.strip():
                raise InputError("empty prompt: expected a caption")
            marks = caption.count(IMAGE_MARK)
            if marks != len(grids):
                raise InputError(
                    f"prompt {caption!r} has {marks} {IMAGE_MARK} for {len(grids)} images: "
                    "expected one each"
                )
            positive = self.config["positive_prompt"]
            caption = f"{caption} {positive}" if positive else caption
        elif grids:
            raise InputError(
                f"images with a prompt of token ids: expected a caption with {IMAGE_MARK}"
            )
        rows = [self._ids(caption, grids)]
        if not is_guided:
            return rows
        if negative is None:
            raise InputError(
                "guidance with a prompt of token ids: expected ImagePrompt(ids, negative=ids), the "
                "negative prompt's ids"
            )
        if grids and self.config["image_guidance_scale"] != 1:
            rows.append(self._ids(IMAGE_MARK * len(grids) + str(negative), grids))
        return [*rows, self._ids(negative, ())]

    def _ids(self, prompt: Any, grids: Sequence[tuple[int, int]]) -> Tensor:
        if isinstance(prompt, Tensor):
            return self._checked(prompt)
        if not isinstance(prompt, str):
            raise InputError(
                f"condition {prompt!r}: expected a caption, token ids [L] or an ImagePrompt"
            )
        if self.text_tokenizer is None:
            raise InputError(
                f"prompt {prompt!r}: this model has no text tokenizer, expected token ids [L]"
            )
        first, *others = prompt.split(IMAGE_MARK) if grids else [prompt]
        ids = self.text_tokenizer(first).input_ids if first else []
        for grid, text in zip(grids, others, strict=True):
            ids = [*ids, *self._picture(grid), *self._plain(text)]
        return torch.tensor([*ids, *self._size(self.config["grid"])])

    def _checked(self, ids: Tensor) -> Tensor:
        begin, vocab_size = self.config["begin_image"], self.config["vocab_size"]
        if ids.dim() != 1 or not len(ids) or ids.is_floating_point():
            raise InputError(f"token ids {tuple(ids.shape)} of {ids.dtype}: expected integers [L]")
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise InputError(
                f"token ids {int(ids.min())}..{int(ids.max())}: expected 0..{vocab_size - 1}"
            )
        if int(ids[-1]) != begin:
            raise InputError(
                f"token ids that end in {int(ids[-1])}: expected {begin}, begin of image"
            )
        return ids

    def _plain(self, text: str) -> list[int]:
        return self.text_tokenizer(text, add_special_tokens=False).input_ids if text else []

    def _size(self, grid: Sequence[int]) -> list[int]:
        text = f"{IMAGE_AREA}{grid[0]}*{grid[1]}"
        return [*self._plain(text), self.config["begin_image"]]

    def _picture(self, grid: Sequence[int]) -> list[int]:
        places = [self.config["image_placeholder"]] * (grid[0] * grid[1])
        return [*self._size(grid), *places, self.config["end_image"]]
