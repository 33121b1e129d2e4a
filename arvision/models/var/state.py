"""What a batch of classes makes of a VAR transformer while it draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...decoding.logits import guide
from ...decoding.scale_state import Compute, ScaleCache
from ...errors import InputError
from ...networks import enter
from .quantizer import Painter
from .transformer import VARTransformer


class VARRun:
    """See `arvision.decoding.scale_state.ScaleNetwork`.

    With guidance there are 2B rows, the conditional ones first.

    Args:
        transformer: the network.
        painter: of the tokenizer.
        classes: class ids [R], R = B or 2B.
        guidance: weight of the conditional logits at each scale, [K], or of each image, [B, K]; not looked at when R is B.
        batch: B.
    """

    def __init__(
        self,
        transformer: VARTransformer,
        painter: Painter,
        classes: Tensor,
        guidance: Sequence[float] | Tensor,
        batch: int,
    ) -> None:
        self.batch = batch
        self.sizes = transformer.sizes()
        self._transformer, self._painter, self._guidance = transformer, painter, guidance
        self._is_doubled = len(classes) != batch
        self._rows, self._modulations = enter(transformer, "read_classes", classes)

    def blank(self) -> Tensor:
        """The canvas [B, D, P, P]."""
        return self._painter.blank(self.batch)

    def inputs(self, canvas: Tensor, scale: int) -> Tensor:
        """Embedded inputs [R, n, C] of a scale."""
        seen = self._rows
        if scale > 0:
            seen = self._painter.view(canvas, scale).to(seen.dtype)
        x = enter(self._transformer, "inputs", seen, scale)
        return torch.cat([x, x]) if scale > 0 and self._is_doubled else x

    def logits(
        self, x: Tensor, scale: int, *, mask: Tensor | None, cache: ScaleCache, compute: Compute
    ) -> Tensor:
        """Guided logits [B, n, V] of a scale, whose inputs are the last of [R, T, C]."""
        num = self._transformer.scales[scale] ** 2
        run: Any = {"mask": mask, "cache": cache, "compute": compute}
        logits = self._transformer(x, self._modulations, num, **run)
        if not self._is_doubled:
            return logits
        conditional, null = logits.chunk(2)
        weight: Any = self._guidance
        if isinstance(weight, Tensor):
            weight = weight[:, scale].to(logits).view(-1, 1, 1)
        else:
            weight = weight[scale]
        return guide(conditional, null, weight)

    def paint(self, canvas: Tensor, tokens: Tensor, scale: int) -> Tensor:
        """The canvas after the tokens [B, n] of a scale, or vectors [B, n, D] in their place.

        Raises:
            InputError: another shape, or a token out of range.
        """
        num, codes = self._transformer.scales[scale] ** 2, self._painter.codes
        if tokens.is_floating_point():
            if tokens.shape != (self.batch, num, codes.shape[1]):
                raise InputError(
                    f"vectors {tuple(tokens.shape)}: expected [{self.batch}, {num}, "
                    f"{codes.shape[1]}]"
                )
            vectors = tokens.to(codes.dtype)
        else:
            if tokens.shape != (self.batch, num):
                raise InputError(
                    f"tokens {tuple(tokens.shape)}: expected [{self.batch}, {num}] at scale {scale}"
                )
            if not 0 <= int(tokens.min()) <= int(tokens.max()) < len(codes):
                raise InputError(f"tokens must lie in 0..{len(codes) - 1}")
            return self.painted(canvas, tokens, scale)
        return self._painter.paint(canvas, vectors, scale)

    def painted(self, canvas: Tensor, tokens: Tensor, scale: int) -> Tensor:
        """The canvas after the network's own tokens [B, n] of a scale."""
        return self._painter.paint(canvas, self._painter.codes[tokens], scale)
