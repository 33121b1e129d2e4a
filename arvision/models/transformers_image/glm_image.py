"""GLM-Image: a preview and then the picture, at positions of time, row and column."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InputError, check_count
from .layout import Layout
from .model import TransformersImageModel, check_grids
from .network import base_of, check_class
from .state import Row

CELL = 32
"""Pixels per token and side of the picture."""

PREVIEW = 16
"""Tokens per side of a square preview."""

Grid = tuple[int, int]


MOST_SIDE = 16_384
"""Pixels of a side."""


def grids_of(height: int, width: int, editing: bool) -> list[Grid]:
    """The grids that a picture of height x width pixels takes, in drawing order.

    Raises:
        InputError: a size that the model does not draw.
    """
    for name, side in (("height", height), ("width", width)):
        check_count(name, side, MOST_SIDE)
        if side % CELL:
            raise InputError(f"{name} {side}: expected a multiple of {CELL}")
    large = (height // CELL, width // CELL)
    if editing:
        return [large]
    ratio = large[0] / large[1]
    preview = (int(math.sqrt(ratio) * PREVIEW), int(math.sqrt(1 / ratio) * PREVIEW))
    if not min(preview):
        raise InputError(f"{height}x{width}: too narrow for a preview, expected a ratio below 256")
    return [preview, large]


def grid_positions(rows: int, columns: int, first: int, device: Any = None) -> Tensor:
    """[3, rows * columns] time, row and column of a grid's tokens that starts at `first`."""
    order = torch.arange(rows * columns, device=device)
    return first + torch.stack([torch.zeros_like(order), order // columns, order % columns])


def doubled(codes: Tensor) -> Tensor:
    """Codes [B, h, w] with each side doubled, [B, 4 h w], as the diffusion decoder takes them."""
    return codes.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)


class GlmImage(TransformersImageModel):
    """A `GlmImageForConditionalGeneration` of transformers as a token model.

    Text to image draws a preview and then the picture; editing draws the picture alone, from a
    prompt with source images. The tokens are what the diffusion decoder of diffusers'
    `GlmImagePipeline` takes (`arvision.accelerate` speeds a whole pipeline up). The authors
    recommend temperature 0.9 and top_p 0.75.

    Args:
        network: such as the `vision_language_encoder` of `zai-org/GLM-Image`.
        processor: a `GlmImageProcessor`.
        height: pixels of the picture, a multiple of 32.
        width: likewise.
        editing: whether only the picture is drawn, from source images.
        grids: grids (rows, columns) in drawing order, in the place of those that the size gives.

    Raises:
        InputError: another network, or a size that the model does not draw.
    """

    family, network_class = "GLM-Image", "GlmImageForConditionalGeneration"
    has_guidance, takes_images, cell = False, True, CELL

    def __init__(
        self,
        network: Any,
        processor: Any = None,
        height: int = 1024,
        width: int = 1024,
        *,
        editing: bool = False,
        grids: Sequence[Grid] | None = None,
    ) -> None:
        base = base_of(network)
        check_class(base, "GlmImageForConditionalGeneration", self.family)
        chosen = grids_of(height, width, editing) if grids is None else list(grids)
        check_grids(chosen)
        self.grids: list[Grid] = [(rows, columns) for rows, columns in chosen]
        self.options = {"height": height, "width": width, "editing": editing}
        if grids is not None:
            self.options["grids"] = [list(grid) for grid in self.grids]
        pieces, first = [], 0
        for rows, columns in self.grids:
            pieces.append(grid_positions(rows, columns, first))
            first += max(rows, columns)
        offsets = torch.cat(pieces, dim=1)
        super().__init__(
            network,
            processor,
            codes=range(base.config.vq_config.num_embeddings),
            layout=Layout(offsets.shape[1], offsets=offsets),
            grid=self.grids[0] if len(self.grids) == 1 else None,
        )

    def resized(self, height: int, width: int, editing: bool = False) -> GlmImage:
        """The same network for another size, or for editing."""
        return GlmImage(self.network, self.processor, height, width, editing=editing)

    def at_size(
        self, height: int | None, width: int | None, num_sources: int = 0
    ) -> TransformersImageModel:
        """The model for pictures of that size, which edits where there are source images.

        Raises:
            InputError: a size that it does not draw.
        """
        wanted, editing = self.size_or(height, width), num_sources > 0
        if wanted == self.picture_size and editing == (self.grid is not None):
            return self
        return self.resized(*wanted, editing=editing)

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of the picture, in pixels."""
        rows, columns = self.grids[-1]
        return rows * CELL, columns * CELL

    def encode(self, text: str, images: Sequence[Any]) -> Tensor:
        """The text and the size, source images as placeholders.

        Raises:
            InputError: source images for a model that draws a preview, or none for one that edits.
        """
        rows, columns = self.grids[-1]
        if images and len(self.grids) > 1:
            raise InputError(
                f"{len(images)} source images: this model draws a preview and a picture, editing "
                "draws the picture alone: expected GlmImage(..., editing=True)"
            )
        if not images and len(self.grids) == 1:
            raise InputError(
                "no source images: this model edits, expected ImagePrompt(text, images=[...])"
            )
        content: list[dict[str, Any]] = [{"type": "image", "image": one} for one in images]
        content.append({"type": "text", "text": text})
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            target_h=rows * CELL,
            target_w=columns * CELL,
            return_dict=True,
            return_tensors="pt",
        )
        return inputs["input_ids"][0]

    def check_ids(self, ids: Tensor) -> None:
        """A prompt ends in the image start."""
        self.check_end(ids, [self.base.config.image_start_token_id], "the image start")

    def row(self, ids: Tensor, images: Sequence[Any]) -> Row:
        """The prompt with its sources' codes in the placeholders' places.

        Args:
            ids: [L].
            images: PIL images, or [h, w] int64 codes, in the order of the prompt.

        Raises:
            InputError: the prompt has places for other images than these.
        """
        config = self.base.config
        sources = self.source_codes(images)
        codes = torch.cat([ids[:0], *(source.flatten() for source in sources)])
        is_place = ids == config.image_token_id
        if not bool(is_place.any()) and len(codes):
            # Sources may be written into the prompt already.
            is_place = self._between(ids)
        if int(is_place.sum()) != len(codes):
            raise InputError(
                f"the prompt has {int(is_place.sum())} places for tokens of source images, the "
                f"{len(sources)} images have {len(codes)}"
            )
        filled = ids.clone()
        filled[is_place] = codes
        ends = (ids == config.image_end_token_id).nonzero()[:, 0].tolist()
        if len(ends) != len(sources):
            raise InputError(
                f"the prompt holds {len(ends)} whole images: expected the {len(sources)} of "
                "ImagePrompt(..., images=...), whose grids their positions need"
            )
        return Row(filled, *self._positions(ids, ends, [tuple(s.shape) for s in sources]))

    def _between(self, ids: Tensor) -> Tensor:
        """[L] bool, what stands between an image start and an image end."""
        config = self.base.config
        starts, ends = ids == config.image_start_token_id, ids == config.image_end_token_id
        depth = starts.cumsum(0) - ends.cumsum(0)
        has_end = ends.flip(0).cumsum(0).flip(0) > 0
        return (depth > 0) & ~starts & has_end

    def _positions(
        self, ids: Tensor, ends: list[int], grids: Sequence[tuple[int, ...]]
    ) -> tuple[Tensor, int]:
        """[3, L] and the first position after the prompt."""
        pieces, free, done = [], 0, 0
        for end, (rows, columns) in zip(ends, grids, strict=True):
            num_text = end - rows * columns - done
            pieces.append(torch.arange(free, free + num_text).expand(3, -1))
            free += num_text
            pieces.append(grid_positions(rows, columns, free))
            free += max(rows, columns)
            done = end
        pieces.append(torch.arange(free, free + len(ids) - done).expand(3, -1))
        return torch.cat(pieces, dim=1).to(ids.device), free + len(ids) - done

    @torch.no_grad()
    def source_codes(self, images: Sequence[Any]) -> list[Tensor]:
        """Codes [h, w] of source images.

        Raises:
            InputError: pictures without a processor, or codes that are none.
        """
        return [
            self._checked_codes(image) if isinstance(image, Tensor) else self._encoded(image)
            for image in images
        ]

    def _checked_codes(self, codes: Tensor) -> Tensor:
        if codes.dim() != 2 or codes.is_floating_point() or codes.numel() == 0:
            raise InputError(
                f"source image {tuple(codes.shape)} {codes.dtype}: expected a PIL image, or codes "
                "[h, w] of integers"
            )
        if int(codes.min()) < 0 or int(codes.max()) >= self.vocab_size:
            raise InputError(f"codes of a source image: expected 0..{self.vocab_size - 1}")
        return codes.to(self.device)

    def _encoded(self, image: Any) -> Tensor:
        if self.processor is None:
            raise InputError(
                f"source image {type(image).__name__}: this model has no processor, expected codes "
                "[h, w]"
            )
        inputs = self.processor.image_processor(images=[image], return_tensors="pt")
        grid = inputs["image_grid_thw"].to(self.device)
        pixels = inputs["pixel_values"].to(self.device)
        features = self.base.get_image_features(pixels, grid).pooler_output
        return self.base.get_image_tokens(features).view(*grid[0, 1:].tolist())

    @property
    def body(self) -> nn.Module:
        """The language model; above it is what the class remembers of its latest prefill."""
        return self.base.model.language_model

    @property
    def codebook(self) -> Tensor:
        """Codes [V, D] of unit length."""
        return F.normalize(self.base.model.vqmodel.quantize.embedding.weight.detach(), dim=-1)

    def picture(self, tokens: Tensor) -> Tensor:
        """Tokens [B, H W] of the picture among all that are drawn."""
        rows, columns = self.grids[-1]
        return tokens[:, tokens.shape[1] - rows * columns :]

    def check_pixels(self) -> None:
        """There is no decoder in the network.

        Raises:
            InputError: always; names the pipeline.
        """
        raise InputError(
            "GLM-Image draws tokens for a diffusion decoder: accelerate diffusers' "
            "GlmImagePipeline to get images"
        )
