"""What a batch of classes makes of a VAR transformer while it draws."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...decoding.logits import guide
from ...decoding.scale_state import Compute, ScaleCache
from ...errors import InputError
from .quantizer import MultiScaleQuantizer
from .transformer import VARTransformer


class VARRun:
    """See `arvision.decoding.scale_state.ScaleNetwork`.

    With guidance there are 2B rows, the conditional ones first.

    Args:
        transformer: the network.
        quantizer: paints the canvas.
        rows: embeddings of the conditions [R, C], R = B or 2B.
        guidance: weight of the conditional logits at each scale; not looked at when R is B.
        batch: B.
    """

    def __init__(
        self,
        transformer: VARTransformer,
        quantizer: MultiScaleQuantizer,
        rows: Tensor,
        guidance: Sequence[float],
        batch: int,
    ) -> None:
        self.batch = batch
        self.sizes = [(side, side) for side in transformer.scales]
        self._transformer, self._quantizer = transformer, quantizer
        self._rows, self._guidance = rows, guidance
        self._is_doubled = len(rows) != batch
        self._modulations = transformer.modulations(rows)
        self._offsets = transformer.offsets()

    def blank(self) -> Tensor:
        """The canvas [B, D, P, P]."""
        return self._quantizer.blank(self.batch, self._rows)

    def inputs(self, canvas: Tensor, scale: int) -> Tensor:
        """Embedded inputs [R, n, C] of a scale."""
        network = self._transformer
        if scale == 0:
            rows = network.start_rows(self._rows)
        else:
            views = self._quantizer.view(canvas, scale)
            rows = network.word_embed(views.to(self._rows.dtype))
            if self._is_doubled:
                rows = torch.cat([rows, rows])
        return rows + network.places(*self._offsets[scale : scale + 2])

    def features(
        self, x: Tensor, scale: int, *, mask: Tensor | None, cache: ScaleCache, compute: Compute
    ) -> Tensor:
        """Inputs [R, T, C] through the network."""
        run = {"mask": mask, "cache": cache, "compute": compute}
        return self._transformer.features(x, self._modulations, **run)

    def logits(self, features: Tensor, scale: int) -> Tensor:
        """Features [R, n, C] of a scale to guided logits [B, n, V]."""
        logits = self._transformer.logits(features, self._modulations)
        if not self._is_doubled:
            return logits
        conditional, null = logits.chunk(2)
        return guide(conditional, null, self._guidance[scale])

    def paint(self, canvas: Tensor, tokens: Tensor, scale: int) -> Tensor:
        """The canvas after the tokens [B, n] of a scale, or vectors [B, n, D] in their place.

        Raises:
            InputError: another shape, or a token out of range.
        """
        num, codes = self._transformer.scales[scale] ** 2, self._quantizer.codes()
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
            vectors = codes[tokens]
        return self._quantizer.paint(canvas, vectors, scale)
