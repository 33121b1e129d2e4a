"""Chameleon, Anole and Lumina-mGPT: one network class, two ways to lay an image out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...contracts import Conditions
from ...errors import InputError, check_count, unknown_name
from ..conditions import ImagePrompt
from .chameleon_pixels import ChameleonDecoder
from .layout import Layout
from .model import TransformersImageModel, single_grid, told
from .network import SpecialIds, base_of, check_class
from .state import Row

CELL = 16
"""Pixels per token and side."""

LAYOUTS = ("chameleon", "lumina")

SIZE_NAME = 8800
"""`<reserved08800>` plus n says that a side of a Lumina image has 2 n tokens."""

NAMES = {
    "bos": "<s>",
    "image_start": "<racm3:break>",
    "image_end": "<eoss>",
    "end_of_turn": "<reserved08706>",
    "line_end": "<reserved08799>",
    "size": f"<reserved{SIZE_NAME:05d}>",
}
"""Special ids in the published vocabulary; "size" is the first of those that tell sides."""


MOST_SIDE = 16_384
"""Pixels of a side."""


def check_size(height: int, width: int, layout: str) -> tuple[int, int]:
    """Rows and columns of tokens of a picture of height x width pixels.

    Raises:
        InputError: a size that the layout does not draw.
    """
    step = CELL if layout == "chameleon" else 2 * CELL
    for name, side in (("height", height), ("width", width)):
        check_count(name, side, MOST_SIDE)
        if side % step:
            raise InputError(f"{name} {side}: expected a multiple of {step}")
    if layout == "chameleon" and (height, width) != (512, 512):
        raise InputError(f"{height}x{width}: Chameleon and Anole draw 512x512 only")
    if layout == "lumina" and max(height, width) > 4 * min(height, width):
        raise InputError(f"{height}x{width}: expected sides with a ratio of at most 4")
    return height // CELL, width // CELL


class Chameleon(TransformersImageModel):
    """A `ChameleonForConditionalGeneration` of transformers as a token model.

    Layout "chameleon" (Chameleon, Anole): 32x32 tokens; the authors recommend guidance_scale 3,
    temperature 0.7 and top_p 0.9. With images in the prompt the guidance has three rows: text and
    images, images alone (weight 1.2 against nothing), nothing. Layout "lumina" (Lumina-mGPT): sizes
    that are told in the prompt, a line end behind each row; guidance_scale 3, top_k 2000,
    temperature 1.

    Args:
        network: such as `leloy/Anole-7b-v0.1-hf`, or Lumina's in this layout.
        processor: a `ChameleonProcessor`, or a tokenizer, which reads no source images.
        decoder: a `ChameleonDecoder`, or the path of a `vqgan.ckpt`; without one the model gives
            tokens but not images.
        layout: see above.
        height: pixels, for "lumina" a multiple of 32.
        width: likewise.
        grids: one grid (rows, columns) in the place of what the size gives.
        ids: "bos", "image_start", "image_end", "end_of_turn", "line_end" or "size" (the one that
            stands for a side of 0 tokens), where the vocabulary does not tell.

    Raises:
        InputError: another network, an unknown layout, or a size that it does not draw.

    Paper: Chameleon Team, "Chameleon: Mixed-Modal Early-Fusion Foundation Models", 2024; Chern et
    al., "ANOLE", 2024; Liu et al., "Lumina-mGPT", 2024.
    """

    family, network_class = "Chameleon", "ChameleonForConditionalGeneration"
    takes_images = True

    def __init__(
        self,
        network: Any,
        processor: Any = None,
        decoder: Any = None,
        layout: str = "chameleon",
        height: int = 512,
        width: int = 512,
        *,
        grids: Sequence[tuple[int, int]] | None = None,
        ids: Mapping[str, int] | None = None,
    ) -> None:
        base = base_of(network)
        check_class(base, "ChameleonForConditionalGeneration", self.family)
        if layout not in LAYOUTS:
            raise unknown_name("layout", layout, LAYOUTS)
        chosen = [check_size(height, width, layout)] if grids is None else grids
        grid = single_grid(chosen, self.family)
        self.layout_name, self._given = layout, ids
        self.options = {"layout": layout, "height": height, "width": width}
        self.options |= told(grids=grids, ids=ids)
        vocabulary = base.config.vocabulary_map or {}
        known: dict[str, int | None] = {name: vocabulary.get(NAMES[name]) for name in NAMES}
        tokenizer = getattr(processor, "tokenizer", processor)
        own_bos = getattr(tokenizer, "bos_token_id", None)
        if own_bos is not None or known["bos"] is None:
            known["bos"] = base.config.bos_token_id if own_bos is None else own_bos
        for name, attribute in (
            ("image_start", "image_start_token_id"),
            ("image_end", "image_end_token_id"),
        ):
            known[name] = getattr(processor, attribute, known[name])
        if known["end_of_turn"] is None:
            known["end_of_turn"] = getattr(tokenizer, "sep_token_id", None)
        self.ids = SpecialIds(self.family, known, ids)
        tail = [end for end in [self.ids.find("image_end")] if end is not None]
        line_end = self.ids["line_end"] if layout == "lumina" else None
        super().__init__(
            network,
            processor,
            codes=image_ids(vocabulary),
            layout=Layout.raster(*grid, line_end, tail),
            grid=grid,
        )
        if not (decoder is None or isinstance(decoder, nn.Module)):
            decoder = ChameleonDecoder.from_official(decoder)
            decoder.to(self.device)
        self.decoder = decoder

    def resized(self, height: int, width: int) -> Chameleon:
        """The same network for another size."""
        return Chameleon(
            self.network,
            self.processor,
            self.decoder,
            self.layout_name,
            height,
            width,
            ids=self._given,
        )

    def of_size(self, height: int, width: int) -> Chameleon:
        """As `resized`, no larger than what Lumina-mGPT was opened for.

        Raises:
            InputError: a size that it does not draw.
        """
        own_height, own_width = self.picture_size
        if self._is_lumina and height * width > own_height * own_width:
            raise InputError(
                f"{height}x{width}: more than the {own_height}x{own_width} pixels that this "
                "Lumina-mGPT was opened for, see its name and pass height= and width= there"
            )
        return self.resized(height, width)

    def to(self, *args: Any, **kwargs: Any) -> Chameleon:
        """Move or cast network and decoder; returns the model itself."""
        super().to(*args, **kwargs)
        if self.decoder is not None:
            self.decoder.to(*args, **kwargs)
        return self

    @property
    def _is_lumina(self) -> bool:
        return self.layout_name == "lumina"

    def encode(self, text: str, images: Sequence[Any]) -> Tensor:
        """The text, the end of the turn, and what opens an image.

        Raises:
            InputError: source images for Lumina-mGPT.
        """
        rows, columns = self.grid or (0, 0)
        if self._is_lumina:
            if images:
                raise InputError(f"{len(images)} source images: Lumina-mGPT draws from text alone")
            size = f"{columns * CELL}x{rows * CELL}"
            text = f"Generate an image of {size} according to the following prompt:\n{text}"
        if not hasattr(self.processor, "tokenizer"):
            self._check_pictures(images)
            return self._opened(self.processor(text)["input_ids"])
        # The processor writes each image as its start, its codes and its end.
        text = self.processor.image_token * len(images) + text
        inputs = self.processor(
            text=text,
            images=list(images) or None,
            return_for_text_completion=True,
            return_tensors="pt",
        )
        return self._opened(inputs["input_ids"][0].tolist())

    def _opened(self, ids: list[int]) -> Tensor:
        """A text's ids, which begin as they must, with what opens an image behind."""
        bos = self.ids["bos"]
        ids = ids if ids[:1] == [bos] else [bos, *ids]
        return torch.tensor([*ids, self.ids["end_of_turn"], *self._opening()])

    def _check_pictures(self, images: Sequence[Any]) -> None:
        """Refuse source images where nothing reads pictures.

        Raises:
            InputError: see above.
        """
        if images and not hasattr(self.processor, "image_processor"):
            kind = "processor" if self.processor is None else "processor but a tokenizer"
            raise InputError(
                f"source image {type(images[0]).__name__}: this model has no {kind}, expected "
                "codes [h, w] beside the ids of a whole prompt"
            )

    def _opening(self) -> list[int]:
        """The ids that open an image: its start and, for Lumina, its sides."""
        if not self._is_lumina:
            return [self.ids["image_start"]]
        rows, columns = self.grid or (0, 0)
        size = self.ids["size"]
        return [self.ids["image_start"], size + rows // 2, size + columns // 2]

    def check_ids(self, ids: Tensor) -> None:
        """A prompt ends in what opens an image."""
        start, size = self.ids.find("image_start"), self.ids.find("size")
        if not self._is_lumina:
            self.check_end(ids, [start], "the image start")
            return
        rows, columns = self.grid or (0, 0)
        sides = [None if size is None else size + side // 2 for side in (rows, columns)]
        self.check_end(ids, [start, *sides], "the image start and the sides")

    def null_row(self, ids: Tensor) -> Row:
        """What opens an image, behind the first id for Chameleon."""
        if self._is_lumina:
            return Row.plain(ids[-3:])
        return Row.plain(torch.cat([ids.new_tensor([self.ids["bos"]]), ids[-1:]]))

    def row(self, ids: Tensor, images: Sequence[Any]) -> Row:
        """The prompt with its images' codes in the placeholders' places."""
        return Row.plain(self._filled(ids, images))

    def _filled(self, ids: Tensor, images: Sequence[Any]) -> Tensor:
        codes = [self._source_ids(image) for image in images]
        written = torch.cat([ids[:0], *codes])
        place = self.base.config.image_token_id
        is_place = torch.zeros_like(ids, dtype=torch.bool) if place is None else ids == place
        if int(is_place.sum()) != len(written):
            raise InputError(
                f"the prompt has {int(is_place.sum())} places for tokens of source images, the "
                f"{len(images)} images have {len(written)}"
            )
        filled = ids.clone()
        filled[is_place] = written
        return filled

    @torch.no_grad()
    def _source_ids(self, image: Any) -> Tensor:
        """Ids of the codes of a source image: a picture, or codes [h, w]."""
        if isinstance(image, Tensor) and not image.is_floating_point():
            return self.columns.ids_of(image.to(self.device).flatten())
        self._check_pictures([image])
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"]
        weight = self.base.model.vqmodel.quant_conv.weight
        return self.base.get_image_tokens(pixels.to(weight))[0].long()

    def rows(self, conditions: Conditions, guidance_scale: float) -> tuple[list[Row], int]:
        """As of all families; with images in a prompt a row that knows only these comes between."""
        rows, branches = super().rows(conditions, guidance_scale)
        if branches == 1:
            return rows, branches
        sources = [c.images if isinstance(c, ImagePrompt) else () for c in conditions]
        if not any(len(images) for images in sources):
            return rows, branches
        batch = len(conditions)
        middle = [
            self._images_alone(images, row, null) if len(images) else null
            for images, row, null in zip(sources, rows[:batch], rows[batch:], strict=True)
        ]
        return [*rows[:batch], *middle, *rows[batch:]], 3

    def _images_alone(self, images: Sequence[Any], row: Row, null: Row) -> Row:
        """The prompt without its text: bos, its images, and the image start."""
        start, end = row.ids.new_tensor([self.ids["image_start"]]), [self.ids["image_end"]]
        pieces = [row.ids.new_tensor([self.ids["bos"]])]
        for image in images:
            pieces += [start, self._source_ids(image), row.ids.new_tensor(end)]
        return Row.plain(torch.cat([*pieces, start]))

    @property
    def codebook(self) -> Tensor:
        """Codes [V, D] as they are."""
        return self.base.model.vqmodel.quantize.embedding.weight.detach()

    def check_pixels(self) -> None:
        """There must be a decoder.

        Raises:
            InputError: there is none.
        """
        if self.decoder is None:
            raise InputError(
                "this model has no decoder: it gives tokens but not images, expected decoder= the "
                "path of a vqgan.ckpt"
            )

    @torch.no_grad()
    def tokens_of(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] to codes [B, N], by the network's own encoder."""
        vq = self.base.model.vqmodel
        found = vq.encode(pixels.to(vq.quantize.embedding.weight)).image_tokens
        return found.view(len(pixels), -1)

    def pixels(self, tokens: Tensor) -> Tensor:
        """Through the decoder."""
        rows, columns = self.grid or (0, 0)
        vq = self.base.model.vqmodel
        latents = vq.quantize.embedding(tokens).unflatten(1, (rows, columns))
        latents = vq.post_quant_conv(latents.permute(0, 3, 1, 2))
        decoder: Any = self.decoder
        return decoder(latents.to(next(decoder.parameters()).dtype))


def image_ids(vocabulary: Mapping[str, int]) -> list[int]:
    """Ids of the codes 0, 1, 2, ... by their names: IMGIMG, the digits as letters A to J, Z.

    Raises:
        InputError: no such names, or a code that has none.
    """
    found = {}
    for name, value in vocabulary.items():
        digits = name.removeprefix("IMGIMG")[:-1]
        if name.startswith("IMGIMG") and name.endswith("Z") and digits:
            found[int("".join(str(ord(letter) - ord("A")) for letter in digits))] = value
    missing = [code for code in range(len(found)) if code not in found]
    if missing or not found:
        name = missing[0] if missing else 0
        raise InputError(
            f"Chameleon: the configuration's vocabulary_map has no id of code {name} (IMGIMG...Z)"
        )
    return [found[code] for code in range(len(found))]
