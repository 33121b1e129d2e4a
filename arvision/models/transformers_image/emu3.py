"""Emu3: one vocabulary for texts and images, and a line end behind each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError, check_count
from .layout import Layout
from .model import TransformersImageModel, single_grid, told
from .network import SpecialIds, base_of, check_class
from .state import Row

CELL = 8
"""Pixels per token and side."""

NAMES = {
    "image_start": "<|image start|>",
    "image_end": "<|image end|>",
    "image_token": "<|image token|>",
    "line_end": "<|extra_200|>",
    "frame_end": "<|extra_201|>",
    "bos": "<|extra_203|>",
    "eos": "<|extra_204|>",
}
"""Special ids in the published vocabulary."""

QUALITY = " masterpiece, film grained, best quality."
"""What the authors put behind every prompt."""

NEGATIVE = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, "
    "cropped, worst quality, low quality, normal quality, jpeg artifacts, signature, watermark, "
    "username, blurry."
)
"""The authors' negative prompt."""


MOST_AREA = 1 << 28
"""Pixels of a picture."""


def grid_of(ratio: str, image_area: int) -> tuple[int, int]:
    """Rows and columns of tokens of a picture with `image_area` pixels and sides W:H.

    Raises:
        InputError: a ratio that is none, or a picture without a row.
    """
    check_count("image_area", image_area, MOST_AREA)
    sides = str(ratio).split(":")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise InputError(f"ratio {ratio!r}: expected 'W:H' with integers, such as '16:9'")
    width, height = map(int, sides)
    unit = (image_area / (width * height)) ** 0.5 / CELL
    grid = (round(height * unit), round(width * unit))
    if not min(grid):
        raise InputError(f"ratio {ratio!r} at {image_area} pixels: there is no row of tokens")
    return grid


class Emu3Sequence(TransformersImageModel):
    """An `Emu3ForConditionalGeneration` with any layout of its codes, and prompts of any form.

    Args:
        network: the network.
        processor: an `Emu3Processor`, or None.
        layout: of one image.
        grid: rows and columns; None where the layout is no grid.
    """

    family, network_class = "Emu3", "Emu3ForConditionalGeneration"
    cell = CELL

    def __init__(
        self, network: Any, processor: Any, layout: Layout, grid: tuple[int, int] | None
    ) -> None:
        codes = self.codes_of(base_of(network))
        super().__init__(network, processor, codes=codes, layout=layout, grid=grid)

    @classmethod
    def codes_of(cls, base: Any) -> list[int]:
        """Ids of the codes 0, 1, 2, ..., by their names `<|visual token 000000|>`.

        Raises:
            InputError: a code that has no id.
        """
        vocabulary = base.config.vocabulary_map or {}
        names = [name for name in vocabulary if name.startswith("<|visual token")]
        found = {int(name[-8:-2]): vocabulary[name] for name in names}
        missing = [code for code in range(len(found)) if code not in found]
        if missing or not found:
            name = missing[0] if missing else 0
            raise InputError(
                f"{cls.family}: the configuration's vocabulary_map has no id of code {name}"
            )
        return [found[code] for code in range(len(found))]

    def null_row(self, ids: Tensor) -> Row:
        """The last id of the prompt."""
        return Row.plain(ids[-1:])

    @property
    def body(self) -> nn.Module:
        """The language model."""
        return self.base.model.text_model

    @property
    def codebook(self) -> Tensor:
        """Codes [V, D] as they are."""
        return self.base.model.vqmodel.quantize.embedding.weight.detach()


class Emu3(Emu3Sequence):
    """An `Emu3ForConditionalGeneration` of transformers as a token model.

    The authors recommend guidance_scale 3, top_k 2048 and temperature 1, `QUALITY` behind every
    prompt and `NEGATIVE` as the negative one. Without a negative prompt the null row is the last id
    of the prompt, as in the class's own generate.

    Args:
        network: such as `Emu3-community/Emu3-Gen-hf`.
        processor: an `Emu3Processor`.
        ratio: of the sides, "W:H".
        image_area: pixels.
        grids: one grid (rows, columns) in the place of what ratio and area give.
        ids: "image_start", "image_token", "line_end", "frame_end", "image_end" or "eos", where the
            vocabulary does not tell.

    Raises:
        InputError: another network, or a size that the model does not draw.

    Paper: Wang et al., "Emu3: Next-Token Prediction is All You Need", 2024.
    """

    def __init__(
        self,
        network: Any,
        processor: Any = None,
        ratio: str = "1:1",
        image_area: int = 518400,
        *,
        grids: Sequence[tuple[int, int]] | None = None,
        ids: Mapping[str, int] | None = None,
    ) -> None:
        base = base_of(network)
        check_class(base, "Emu3ForConditionalGeneration", self.family)
        size = grid_of(ratio, image_area)
        grid = single_grid([size] if grids is None else grids, self.family)
        vocabulary = base.config.vocabulary_map or {}
        known: dict[str, int | None] = {name: vocabulary.get(NAMES[name]) for name in NAMES}
        text = base.config.get_text_config()
        for name, own in (("bos", text.bos_token_id), ("eos", text.eos_token_id)):
            known[name] = known[name] if known[name] is not None else own
        tokenizer = getattr(processor, "tokenizer", None)
        for name, token in (("image_start", "boi_token"), ("image_token", "image_wrapper_token")):
            if known[name] is None and tokenizer is not None:
                known[name] = tokenizer.convert_tokens_to_ids(getattr(tokenizer, token))
        self.ids = SpecialIds(self.family, known, ids)
        line_end = self.ids["line_end"]
        tail = [self.ids.find(name) for name in ("frame_end", "image_end", "eos")]
        layout = Layout.raster(*grid, line_end, [end for end in tail if end is not None])
        self._ratio, self._area, self._given = ratio, image_area, ids
        self.options = {"ratio": ratio, "image_area": image_area, **told(grids=grids, ids=ids)}
        super().__init__(network, processor, layout, grid)

    def resized(self, ratio: str = "1:1", image_area: int = 518400) -> Emu3:
        """The same network for another size."""
        return Emu3(self.network, self.processor, ratio, image_area, ids=self._given)

    def of_size(self, height: int, width: int) -> Emu3:
        """The same network for another size in pixels, multiples of 8.

        Raises:
            InputError: another size.
        """
        for name, side in (("height", height), ("width", width)):
            if side % CELL:
                raise InputError(f"{name} {side}: expected a multiple of {CELL}")
        return self.resized(f"{width}:{height}", height * width)

    def encode(self, text: str, images: Sequence[Any]) -> Tensor:
        """The text, the size and the image start."""
        inputs = self.processor(
            text=text,
            return_for_image_generation=True,
            ratio=self._ratio,
            image_area=self._area,
            return_tensors="pt",
        )
        if tuple(map(int, inputs["image_sizes"][0])) != self.grid:
            raise InputError(
                f"the processor writes {list(map(int, inputs['image_sizes'][0]))} rows and columns "
                f"for this size, the model draws {self.grid}: expected ids for a grid of your own"
            )
        return torch.as_tensor(inputs["input_ids"][0])

    def check_ids(self, ids: Tensor) -> None:
        """A prompt ends in the image token, behind the image start and the size."""
        self.check_end(ids, [self.ids.find("image_token")], "the image token")
        start = self.ids.find("image_start")
        if start is not None and len(ids) > 1 and not bool((ids == start).any()):
            raise InputError(f"the prompt holds no image start ({start})")

    @torch.no_grad()
    def tokens_of(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] to codes [B, N], by the network's own encoder."""
        vq = self.base.model.vqmodel
        sizes = torch.tensor([pixels.shape[2:]] * len(pixels))
        found = vq.encode(pixels.to(vq.quantize.embedding.weight), sizes).image_tokens
        return torch.stack(list(found)).flatten(1)

    def pixels(self, tokens: Tensor) -> Tensor:
        """Through the network's own decoder."""
        rows, columns = self.grid or (0, 0)
        return self.base.model.vqmodel.decode(tokens.unflatten(1, (rows, columns)))
