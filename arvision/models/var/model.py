"""VAR as a scale model: conditions in, guided logits scale by scale, and pixels out."""

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
from ..conditions import null_classes, read_classes
from ..pixels import EncodesPixels, check_codes
from .state import VARRun
from .tokenizer import VARTokenizer
from .transformer import VARTransformer


class VAR(EncodesPixels):
    """A VAR transformer with its image tokenizer; see `arvision.contracts.ScaleModel`.

    Even its tokens need the tokenizer: what the network is fed at a scale is the canvas that the
    tokenizer's codes have painted so far.

    Args:
        transformer: the network.
        tokenizer: its multi-scale image tokenizer.
        class_names: names of the classes, in the order of their ids.

    Raises:
        InputError: no tokenizer, or one with other scales or another codebook than the transformer.

    Paper: Tian et al., "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale
    Prediction", 2024.
    """

    def __init__(
        self,
        transformer: VARTransformer,
        tokenizer: VARTokenizer | None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        if tokenizer is None:
            raise InputError(
                "VAR needs its image tokenizer: each scale is fed what the last painted"
            )
        for name in ("codebook_size", "z_channels"):
            if tokenizer.config[name] != transformer.config[name]:
                raise InputError(
                    f"the tokenizer has {name} {tokenizer.config[name]}: expected "
                    f"{transformer.config[name]}, the transformer's"
                )
        if tokenizer.scales != transformer.scales:
            raise InputError(
                f"the tokenizer has scales {list(tokenizer.scales)}: expected "
                f"{list(transformer.scales)}, the transformer's"
            )
        self.transformer, self.tokenizer = transformer, tokenizer
        self.class_names = list(class_names or [])
        self.vocab_size: int = transformer.config["codebook_size"]
        self.scales: tuple[int, ...] = transformer.scales
        self.num_tokens = transformer.num_tokens

    @classmethod
    def from_official(
        cls,
        transformer: str | Path | Mapping[str, Any],
        tokenizer: str | Path | Mapping[str, Any],
        **sizes: Any,
    ) -> VAR:
        """Load the authors' checkpoints.

        Args:
            transformer: path (or state dict) such as `var_d16.pth`.
            tokenizer: path (or state dict) such as `vae_ch160v4096z32.pth`.
            **sizes: of the transformer, what its tensors do not tell (`patch_nums` where the file
                has no table of levels, `num_heads` without attn_l2_norm); ours or the authors' names.

        Raises:
            CheckpointError: a file that cannot be read or does not fit, naming the key.
        """
        network = VARTransformer.from_official(transformer, **sizes)
        _, place = split_placement(sizes)
        return cls(
            network, VARTokenizer.from_official(tokenizer, patch_nums=network.scales, **place)
        )

    @property
    def device(self) -> torch.device:
        """Where the transformer runs."""
        return place_of(self.transformer)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the transformer."""
        return self.transformer.dtype

    @property
    def codebook(self) -> Tensor:
        """Codes of the tokenizer [V, D]."""
        return enter(self.tokenizer, "codes").detach()

    @property
    def cost_key(self) -> str:
        """What the cost of a pass depends on: sizes, device type and dtype."""
        sizes = {k: v for k, v in self.transformer.config.items() if not k.startswith("_")}
        return f"VAR {sorted(sizes.items())} {self.device.type} {self.dtype}"

    def to(self, *args: Any, **kwargs: Any) -> VAR:
        """Move or cast both networks, as `nn.Module.to` does; returns the model itself."""
        self.transformer.to(*args, **kwargs)
        self.tokenizer.to(*args, **kwargs)
        return self

    @torch.no_grad()
    def start(self, conditions: Conditions, guidance_scale: Schedule = 1.0) -> NextScaleState:
        """Prepare the conditions and, where guidance needs them, the null rows.

        Args:
            conditions: one per image: class ids or names, None for the null class, or mixtures, see
                `arvision.models.conditions.read_classes`.
            guidance_scale: at the last scale, null + guidance_scale * (cond - null); it grows
                linearly from 1 at the first scale, as `cfg = guidance_scale - 1` of the authors'
                sampler does. 1 costs no null rows; 0 is the unconditional model at every scale. A
                list, with a number for each scale, is taken as it is; so is [B, K], with a row for
                each image.

        Raises:
            InputError: no conditions, one that the model does not know, a negative scale, or a list
                of another length.

        Paper: Tian et al., "Visual Autoregressive Modeling", 2024, appendix (guidance).
        """
        guidance: Any = guidance_scale
        if not isinstance(guidance_scale, Tensor):
            guidance = self._guidance(guidance_scale)
        if len(conditions) == 0:
            raise InputError("no conditions: expected at least one")
        num_classes = self.transformer.config["num_classes"]
        classes = read_classes(conditions, num_classes, self.class_names).to(self.device)
        null = null_classes(classes, num_classes)
        if weights_are(guidance, 0):
            classes = null
        elif not weights_are(guidance, 1):
            classes = torch.cat([classes, null])
        # The tokenizer first: offloading sends the transformer away when the tokenizer is called.
        painter = enter(self.tokenizer, "painter")
        run = VARRun(self.transformer, painter, classes, guidance, len(conditions))
        return NextScaleState(run)

    def _guidance(self, guidance_scale: Schedule) -> list[float]:
        """The weight at each scale."""
        num = len(self.scales)
        listed = per_scale("guidance_scale", guidance_scale, num)
        if isinstance(guidance_scale, Sequence) or guidance_scale == 0:
            return listed
        return [1 + (guidance_scale - 1) * scale / max(1, num - 1) for scale in range(num)]

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of a picture, in pixels."""
        side = self.scales[-1] * self.tokenizer.downsample_factor
        return side, side

    @torch.no_grad()
    def decode_part(self, tokens: Tensor, is_final: Tensor) -> Tensor:
        """The canvas that the final tokens have painted, see `arvision.contracts.DecodesPart`."""
        vectors = self.codebook[tokens] * is_final[..., None]
        return enter(self.tokenizer, "decode", vectors).float()

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N], or vectors [B, N, D] in their place, to pixels [B, 3, H, W] in [-1, 1].

        Raises:
            InputError: tokens of another shape or range.
        """
        if not tokens.is_floating_point():
            check_codes(tokens, self.vocab_size)
        return enter(self.tokenizer, "decode", tokens).float()
