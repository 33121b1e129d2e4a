"""Infinity as a scale model of bits: captions in, guided logits scale by scale, and pixels out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint import split_placement
from ...contracts import Conditions, Schedule
from ...decoding.guidance import weights_are
from ...decoding.logits import per_scale
from ...decoding.scale_state import NextScaleState
from ...errors import InputError
from ...networks import enter, place_of
from ..captions import CaptionEncoder, text_features
from ..conditions import Prompt, as_prompt
from ..pixels import EncodesPixels
from .convert import is_patched, split_sizes
from .schedules import Scales, scale_schedule
from .state import InfinityRun
from .tokenizer import InfinityTokenizer, check_bits
from .transformer import InfinityTransformer


class Infinity(EncodesPixels):
    """An Infinity transformer with its image tokenizer; see `arvision.contracts.ScaleModel`.

    Tokens are bits [B, L, d] of 0 and 1, all scales coarse to fine.

    Args:
        transformer: the network.
        tokenizer: its image tokenizer; without one the model gives tokens but not images.
        text_encoder: T5 encoder, for captions as strings.
        text_tokenizer: of the text encoder.
        class_names: none; captions are all that this family knows.

    Raises:
        InputError: a tokenizer with other latents or scales than the transformer was built for.

    Paper: Han et al., "Infinity: Scaling Bitwise AutoRegressive Modeling for High-Resolution Image
    Synthesis", 2024.
    """

    vocab_size = 2

    def __init__(
        self,
        transformer: InfinityTransformer,
        tokenizer: InfinityTokenizer | None = None,
        text_encoder: torch.nn.Module | None = None,
        text_tokenizer: Any = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.transformer, self.tokenizer = transformer, tokenizer
        self.num_bits: int = transformer.config["num_bits"]
        self.captions = None
        if text_encoder is not None and text_tokenizer is not None:
            length = transformer.config["text_length"]
            self.captions = CaptionEncoder(text_encoder, text_tokenizer, length)
        if tokenizer is not None:
            self._check(tokenizer)

    def _check(self, tokenizer: InfinityTokenizer) -> None:
        patched = is_patched(self.num_bits, tokenizer.config["z_channels"])
        wanted = {"patchify": self.transformer.config["patchify"], "scales": self.scales}
        given = {"patchify": tokenizer.config["patchify"], "scales": tokenizer.scales}
        if patched != wanted["patchify"]:
            raise InputError(
                f"the tokenizer has {tokenizer.config['z_channels']} channels: expected another "
                f"number for {self.num_bits} bits with patchify {wanted['patchify']}"
            )
        for name, value in wanted.items():
            if given[name] != value:
                raise InputError(
                    f"the tokenizer has {name} {given[name]}: expected {value}, the transformer's"
                )

    @classmethod
    def from_official(
        cls,
        transformer: str | Path | Mapping[str, Any],
        tokenizer: str | Path | Mapping[str, Any] | None = None,
        *,
        text_encoder: torch.nn.Module | None = None,
        text_tokenizer: Any = None,
        **sizes: Any,
    ) -> Infinity:
        """Load the authors' checkpoints.

        Args:
            transformer: path (or state dict): `infinity_2b_reg.pth`, or the folder
                `infinity_8b_weights`.
            tokenizer: path (or state dict), such as `infinity_vae_d32reg.pth`.
            text_encoder: T5 encoder, the official models' is that of google/flan-t5-xl.
            text_tokenizer: of the text encoder.
            **sizes: which pictures are drawn: `scale_schedule=[(h, w), ...]`, or `pixels` ("0.06M",
                "0.25M", "0.60M", "1M") and `aspect_ratio` (height / width); `guidance_layer`. Sizes
                that tensors tell (`num_heads`, `patch_size`, ...) are checked against them. Our names or
                the authors'.

        Raises:
            CheckpointError: a file that cannot be read or does not fit, naming the key.
            InputError: an aspect ratio or scales that no model has, or networks that do not fit each
                other.
        """
        sizes, place = split_placement(sizes)
        both, own = split_sizes(sizes)
        network = InfinityTransformer.from_official(transformer, **both, **place)
        if tokenizer is None:
            return cls(network, None, text_encoder, text_tokenizer)
        vae = InfinityTokenizer.from_official(tokenizer, **own, **place)
        patched = is_patched(network.config["num_bits"], vae.config["z_channels"])
        if both.get("patchify") is None:
            network.register_to_config(patchify=patched)
        vae.register_to_config(patchify=patched)
        vae.set_scales(network.scales)
        return cls(network, vae, text_encoder, text_tokenizer)

    def set_scales(
        self,
        scales: Sequence[Sequence[int]] | None = None,
        *,
        pixels: str = "1M",
        aspect_ratio: float = 1.0,
    ) -> Infinity:
        """Draw pictures of another size from now on; returns the model itself.

        Args:
            scales: height and width of each scale, or None for what the other two say.
            pixels: "0.06M", "0.25M", "0.60M" or "1M".
            aspect_ratio: height divided by width.

        Raises:
            InputError: sizes that the model was not trained on.
        """
        chosen = scale_schedule(pixels, aspect_ratio) if scales is None else scales
        self.transformer.set_scales(chosen)
        if self.tokenizer is not None:
            self.tokenizer.set_scales(chosen)
        return self

    @property
    def scales(self) -> Scales:
        """Height and width of each scale."""
        return self.transformer.scales

    @property
    def num_tokens(self) -> int:
        """Tokens of one image, over all scales."""
        return self.transformer.pyramid.num_tokens

    @property
    def device(self) -> torch.device:
        """Where the transformer runs."""
        return place_of(self.transformer)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the transformer."""
        return self.transformer.dtype

    @property
    def cost_key(self) -> str:
        """What the cost of a pass depends on: sizes, device type and dtype."""
        sizes = {k: v for k, v in self.transformer.config.items() if not k.startswith("_")}
        return f"Infinity {sorted(sizes.items(), key=str)} {self.device.type} {self.dtype}"

    def to(self, *args: Any, **kwargs: Any) -> Infinity:
        """Move or cast all networks, as `nn.Module.to` does; returns the model itself."""
        self.transformer.to(*args, **kwargs)
        if self.tokenizer is not None:
            self.tokenizer.to(*args, **kwargs)
        if self.captions is not None:
            self.captions.text_encoder.to(*args, **kwargs)
        return self

    @torch.no_grad()
    def start(self, conditions: Conditions, guidance_scale: Schedule = 1.0) -> NextScaleState:
        """Read the captions and, where guidance needs them, the negative or null ones.

        Args:
            conditions: one per image: None for no text, a caption, text features [T, C], or `Prompt(caption or
                features, negative=...)`. Without a negative the null text is as long as the caption.
            guidance_scale: null + guidance_scale * (cond - null), at every scale alike, or a list
                with a number for each scale. 1 everywhere costs no null rows, 0 only these.

        Raises:
            InputError: no conditions, one that the model does not know, features of another width,
                a negative scale, or a list of another length.
        """
        guidance: Any = guidance_scale
        if not isinstance(guidance_scale, Tensor):
            guidance = per_scale("guidance_scale", guidance_scale, len(self.scales))
        if len(conditions) == 0:
            raise InputError("no conditions: expected at least one")
        null_rows = enter(self.transformer, "null_text")
        prompts = [Prompt(null_rows) if one is None else as_prompt(one) for one in conditions]
        needs_null = not weights_are(guidance, 1)
        only_null = weights_are(guidance, 0)
        rows = self._features([prompt.prompt for prompt in prompts])
        if needs_null:
            nulls = self._nulls(prompts, rows)
            rows = nulls if only_null else rows + nulls
        text = enter(self.transformer, "text_rows", rows)
        return NextScaleState(InfinityRun(self.transformer, text, guidance, len(prompts)))

    def _nulls(self, prompts: Sequence[Prompt], rows: Sequence[Tensor]) -> list[Tensor]:
        """Features of the negative captions, or as many null rows as the caption has."""
        given = [prompt.negative for prompt in prompts if prompt.negative is not None]
        negatives = iter(self._features(given) if given else [])
        null = enter(self.transformer, "null_text")
        return [
            null[: len(row)] if prompt.negative is None else next(negatives)
            for prompt, row in zip(prompts, rows, strict=True)
        ]

    def _features(self, texts: Sequence[Any]) -> list[Tensor]:
        """Text features [T_i, C] on the model's device.

        Raises:
            InputError: another width, or a text that is too long.
        """
        length, width = self.transformer.cfg_uncond.shape
        found = text_features(texts, self.captions)
        for rows in found:
            if rows.dim() != 2 or rows.shape[1] != width or not 1 <= len(rows) <= length:
                raise InputError(
                    f"text features {tuple(rows.shape)}: expected [T, {width}] with T in 1..{length}"
                )
        return [rows.to(self.device) for rows in found]

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of a picture, in pixels."""
        return self.tokenizer.picture_size

    @torch.no_grad()
    def decode_part(self, tokens: Tensor, is_final: Tensor) -> Tensor:
        """The canvas that the final bits have painted, see `arvision.contracts.DecodesPart`."""
        return enter(self.tokenizer, "decode_part", tokens, is_final).float()

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Bits [B, L, d] to pixels [B, 3, H, W] in [-1, 1].

        Raises:
            InputError: the model has no tokenizer, or bits of another shape.
        """
        if self.tokenizer is None:
            raise InputError("this model has no image tokenizer: it gives tokens but not images")
        check_bits(tokens)
        return enter(self.tokenizer, "decode", tokens).float()
