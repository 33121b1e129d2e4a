"""Janus and Janus-Pro: codes have their own embeddings and their own output layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layout import Layout
from .model import TransformersImageModel, single_grid, told
from .network import SpecialIds, base_of, check_class
from .state import Row


class Janus(TransformersImageModel):
    """A `JanusForConditionalGeneration` of transformers as a token model.

    The authors recommend guidance_scale 5 and temperature 1.

    Args:
        network: such as `deepseek-community/Janus-Pro-1B`.
        processor: a `JanusProcessor`.
        grids: one grid (rows, columns) in the place of what the configuration says.
        ids: "bos", "pad" and "image_start", where the generation configuration does not tell.

    Raises:
        InputError: another network, or a grid that is none.

    Paper: Chen et al., "Janus-Pro: Unified Multimodal Understanding and Generation with Data and
    Model Scaling", 2025.
    """

    family, network_class = "Janus", "JanusForConditionalGeneration"

    def __init__(
        self,
        network: Any,
        processor: Any = None,
        *,
        grids: Sequence[tuple[int, int]] | None = None,
        ids: Mapping[str, int] | None = None,
    ) -> None:
        base = base_of(network)
        check_class(base, "JanusForConditionalGeneration", self.family)
        side = math.isqrt(base.model.vision_model.config.num_image_tokens)
        grid = single_grid([(side, side)] if grids is None else grids, self.family)
        defaults, tokenizer = base.generation_config, getattr(processor, "tokenizer", None)
        kwargs = getattr(defaults, "generation_kwargs", None) or {}
        found = {
            "bos": (defaults.bos_token_id, getattr(tokenizer, "bos_token_id", None)),
            "pad": (defaults.pad_token_id, getattr(tokenizer, "pad_token_id", None)),
            "image_start": (
                kwargs.get("boi_token_id"),
                getattr(tokenizer, "boi_token_id", None),
            ),
        }
        known = {
            name: next((value for value in values if value is not None), None)
            for name, values in found.items()
        }
        self.options = told(grids=grids, ids=ids)
        self.ids = SpecialIds(self.family, known, ids)
        codes = range(base.model.generation_embeddings.num_embeddings)
        layout = Layout.raster(*grid)
        super().__init__(network, processor, codes=codes, layout=layout, grid=grid)

    @property
    def cell(self) -> int:
        """Pixels per token and side, what the decoder's levels make of one."""
        return 2 ** (len(self.base.config.vq_config.channel_multiplier) - 1)

    def encode(self, text: str, images: Sequence[Any]) -> Tensor:
        """The text as the one turn of a user."""
        messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
        written = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = self.processor(text=written, generation_mode="image", return_tensors="pt")
        return inputs["input_ids"][0]

    def check_ids(self, ids: Tensor) -> None:
        """A prompt ends in the image start."""
        self.check_end(ids, [self.ids.find("image_start")], "the image start")

    def null_row(self, ids: Tensor) -> Row:
        """As long as the prompt, every id but two is padding, which stays visible."""
        # A prompt ends in the image start.
        kept = (ids == self.ids["bos"]) | (ids == ids[-1])
        return Row.plain(torch.where(kept, ids, self.ids["pad"]))

    def prompt_inputs(self, ids: Tensor) -> dict[str, Any]:
        """Prompts have the embeddings of text."""
        return {"inputs_embeds": self.base.get_input_embeddings()(ids)}

    def inputs(self, codes: Tensor, forced: Tensor | None) -> dict[str, Any]:
        """Codes have embeddings of their own."""
        return {"inputs_embeds": self.base.prepare_embeddings_for_image_generation(codes)}

    @property
    def body(self) -> nn.Module:
        """The language model."""
        return self.base.model.language_model

    @property
    def output_layer(self) -> nn.Module:
        """The head of codes; `lm_head` is that of text."""
        return self.base.model.generation_head

    @property
    def codebook(self) -> Tensor:
        """Codes [V, D] of unit length."""
        return F.normalize(self.base.model.vqmodel.quantize.embedding.weight.detach(), dim=-1)

    @torch.no_grad()
    def tokens_of(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] to codes [B, N], by the network's own encoder."""
        vq = self.base.model.vqmodel
        found = vq.encode(pixels.to(vq.quantize.embedding.weight)).image_tokens
        return found.view(len(pixels), -1)

    def pixels(self, tokens: Tensor) -> Tensor:
        """Through the network's own decoder."""
        vq = self.base.model.vqmodel
        rows, columns = self.grid or (0, 0)
        latents = self.codebook[tokens].unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
        return vq.decoder(vq.post_quant_conv(latents))
