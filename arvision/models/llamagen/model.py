"""LlamaGen as a token model: conditions in, guided logits and pixels out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint import split_placement
from ...contracts import Conditions
from ...decoding.guidance import weights_are
from ...decoding.logits import check_guidance_scale
from ...errors import InputError
from ...networks import enter, place_of
from ..captions import CaptionEncoder, padded_features
from ..conditions import as_prompt, null_classes, read_classes
from ..pixels import EncodesPixels, check_codes
from .state import LlamaGenState
from .text import clean_caption
from .tokenizer import LlamaGenTokenizer
from .transformer import LlamaGenTransformer


class LlamaGen(EncodesPixels):
    """A LlamaGen transformer with its image tokenizer; see `arvision.contracts.TokenModel`.

    Args:
        transformer: the network.
        tokenizer: its image tokenizer; without one the model gives tokens but not images.
        text_encoder: T5-style encoder of a text-conditional model, for captions as strings.
        text_tokenizer: of the text encoder.
        class_names: names of the classes, in the order of their ids.

    Raises:
        InputError: a tokenizer with another codebook than the transformer was built for.

    Paper: Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation",
    2024.
    """

    takes_trees = True

    def __init__(
        self,
        transformer: LlamaGenTransformer,
        tokenizer: LlamaGenTokenizer | None = None,
        text_encoder: torch.nn.Module | None = None,
        text_tokenizer: Any = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.transformer, self.tokenizer = transformer, tokenizer
        self.class_names = list(class_names or [])
        self.vocab_size: int = transformer.config["vocab_size"]
        self.num_tokens = transformer.num_tokens
        self.grid: tuple[int, int] = tuple(transformer.config["grid"])
        self.captions = None
        if text_encoder is not None and text_tokenizer is not None:
            length = transformer.config["caption_length"]
            self.captions = CaptionEncoder(text_encoder, text_tokenizer, length, clean_caption)
        if tokenizer is not None and tokenizer.config["codebook_size"] != self.vocab_size:
            raise InputError(
                f"the tokenizer has {tokenizer.config['codebook_size']} codes: expected "
                f"{self.vocab_size}, the transformer's vocabulary"
            )

    @classmethod
    def from_official(
        cls,
        transformer: str | Path | Mapping[str, Any],
        tokenizer: str | Path | Mapping[str, Any] | None = None,
        **sizes: Any,
    ) -> LlamaGen:
        """Load the authors' checkpoints.

        Args:
            transformer: path (or state dict) such as `c2i_B_256.pt` or `t2i_XL_stage1_256.pt`.
            tokenizer: path (or state dict) such as `vq_ds16_c2i.pt`.
            **sizes: what tensors and the table of official sizes do not tell, such as `num_heads`
                or `grid`; our names or the authors'. `dtype` (float32 unless given) and `device`
                are those of both networks.

        Raises:
            CheckpointError: a file that cannot be read or does not fit, naming the key.
        """
        network = LlamaGenTransformer.from_official(transformer, **sizes)
        _, place = split_placement(sizes)
        vq = None if tokenizer is None else LlamaGenTokenizer.from_official(tokenizer, **place)
        return cls(network, vq)

    @property
    def device(self) -> torch.device:
        """Where the transformer runs."""
        return place_of(self.transformer)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the transformer."""
        return self.transformer.dtype

    @property
    def codebook(self) -> Tensor | None:
        """Codes of the tokenizer [V, D], of unit length; None without a tokenizer."""
        return None if self.tokenizer is None else enter(self.tokenizer, "codes").detach()

    @property
    def cost_key(self) -> str:
        """What the cost of a pass depends on: sizes, device type and dtype."""
        sizes = {k: v for k, v in self.transformer.config.items() if not k.startswith("_")}
        return f"LlamaGen {sorted(sizes.items())} {self.device.type} {self.dtype}"

    def to(self, *args: Any, **kwargs: Any) -> LlamaGen:
        """Move or cast all networks, as `nn.Module.to` does; returns the model itself."""
        self.transformer.to(*args, **kwargs)
        if self.tokenizer is not None:
            self.tokenizer.to(*args, **kwargs)
        if self.captions is not None:
            self.captions.text_encoder.to(*args, **kwargs)
        return self

    @torch.no_grad()
    def start(
        self, conditions: Conditions, guidance_scale: float = 1.0
    ) -> tuple[LlamaGenState, Tensor]:
        """Prefill the conditions and, where guidance needs them, the null rows.

        Args:
            conditions: one per image: class ids, names or mixtures (see
                `arvision.models.conditions.read_classes`), or captions, caption features
                [T_i, caption_dim] or a `Prompt` of those with a negative; None for no condition.
            guidance_scale: null + scale * (cond - null); 1 costs no null rows, 0 only these. Or [B, N],
                a weight for each token of each image.

        Returns:
            The decode state, and guided logits [B, V] of the first token.

        Raises:
            InputError: no conditions, one that the model does not know, or a negative scale.
        """
        check_guidance_scale(guidance_scale)
        if len(conditions) == 0:
            raise InputError("no conditions: expected at least one")
        rows, null, valid, null_valid = self._both_rows(conditions)
        if weights_are(guidance_scale, 0):
            rows, valid = null, null_valid
        elif not weights_are(guidance_scale, 1):
            rows = torch.cat([rows, null])
            if valid is not None and null_valid is not None:
                valid = torch.cat([valid, null_valid])
        state = LlamaGenState(self.transformer, rows, valid, guidance_scale, len(conditions))
        return state, state.prefill()

    def rows(self, conditions: Conditions) -> tuple[Tensor, Tensor, Tensor | None]:
        """Conditioning rows [B, P, C], null rows like them, and which count [B, P] bool (None for all)."""
        return self._both_rows(conditions)[:3]

    def _both_rows(
        self, conditions: Conditions
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Conditioning rows and null rows [B, P, C], and which of either count (None for all)."""
        if self.transformer.is_text_conditional:
            return self._caption_rows(conditions)
        num_classes = self.transformer.config["num_classes"]
        classes = read_classes(conditions, num_classes, self.class_names).to(self.device)
        both = torch.cat([classes, null_classes(classes, num_classes)])
        rows, null = enter(self.transformer, "class_rows", both).chunk(2)
        return rows, null, None, None

    def _caption_rows(self, conditions: Conditions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Null rows count where the caption does; a negative caption stands in their place. Without a
        caption the conditioning rows are null rows, and all of them count."""
        prompts = [None if one is None else as_prompt(one) for one in conditions]
        captions = [None if prompt is None else prompt.prompt for prompt in prompts]
        features, counts, own = self._padded(captions)
        counts = counts | ~own[:, None]
        rows, null = enter(self.transformer, "caption_rows", features)
        rows = torch.where(own[:, None, None], rows, null)
        negatives = [None if prompt is None else prompt.negative for prompt in prompts]
        if all(text is None for text in negatives):
            return rows, null, counts, counts
        features, valid, given = self._padded(negatives)
        others = enter(self.transformer, "caption_rows", features)[0]
        null = torch.where(given[:, None, None], others, null)
        return rows, null, counts, torch.where(given[:, None], valid, counts)

    def _padded(self, texts: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Features [B, L, C] of captions, which count [B, L], and where there is a caption [B]."""
        config = self.transformer.config
        shape = (config["caption_length"], config["caption_dim"])
        place = torch.empty(0, device=self.device, dtype=self.dtype)
        own = torch.tensor([text is not None for text in texts], device=self.device)
        features = place.new_zeros(len(texts), *shape)
        valid = torch.zeros(len(texts), shape[0], dtype=torch.bool, device=self.device)
        given = [text for text in texts if text is not None]
        if given:
            features[own], valid[own] = padded_features(given, self.captions, shape, place)
        return features, valid, own

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of a picture, in pixels."""
        rows, columns = self.grid
        factor = self.tokenizer.downsample_factor
        return rows * factor, columns * factor

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N] to pixels [B, 3, H, W] in [-1, 1].

        Raises:
            InputError: the model has no tokenizer, or tokens of another shape or range.
        """
        if self.tokenizer is None:
            raise InputError("this model has no image tokenizer: it gives tokens but not images")
        check_codes(tokens, self.vocab_size)
        return enter(self.tokenizer, "decode", tokens, self.grid).float().clamp(-1, 1)
