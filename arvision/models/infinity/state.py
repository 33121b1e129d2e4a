"""What a batch of captions makes of an Infinity transformer while it draws."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...decoding.logits import guide
from ...decoding.scale_state import Compute, ScaleCache
from ...errors import InputError
from .tokenizer import check_bits
from .transformer import InfinityTransformer, TextRows


class InfinityRun:
    """See `arvision.decoding.scale_state.ScaleNetwork`.

    With guidance there are 2B rows, the conditional ones first.

    Args:
        transformer: the network.
        rows: of the captions, R = B or 2B.
        guidance: weight of the conditional rows at each scale; not looked at when R is B.
        batch: B.
    """

    def __init__(
        self,
        transformer: InfinityTransformer,
        rows: TextRows,
        guidance: Sequence[float],
        batch: int,
    ) -> None:
        self.batch, self.sizes = batch, transformer.scales
        self._transformer, self._rows, self._guidance = transformer, rows, guidance
        self._pyramid = transformer.pyramid
        self._is_doubled = len(rows.start) != batch
        self._angles = transformer.angles()
        self._places = transformer.places(0, self._pyramid.num_tokens)

    def blank(self) -> Tensor:
        """The canvas [B, D, H, W], float32 or wider."""
        start = self._rows.start
        dtype = torch.float64 if start.dtype == torch.float64 else torch.float32
        return self._pyramid.blank(self.batch, start.device, dtype)

    def inputs(self, canvas: Tensor, scale: int) -> Tensor:
        """Embedded inputs [R, n, C] of a scale."""
        first = sum(self._pyramid.counts[:scale])
        if scale == 0:
            x = self._transformer.start_inputs(self._rows)
        else:
            seen = self._pyramid.view(canvas, scale)
            x = self._transformer.word_embed(seen.to(self._rows.start.dtype))
            x = torch.cat([x, x]) if self._is_doubled else x
        return x + self._places[first : first + x.shape[1]]

    def features(
        self, x: Tensor, scale: int, *, mask: Tensor | None, cache: ScaleCache, compute: Compute
    ) -> Tensor:
        """Inputs [R, T, C] that end with the tokens of `scale` through the network."""
        last = sum(self._pyramid.counts[: scale + 1])
        angles = self._angles[last - x.shape[1] : last]
        layer = self._transformer.config["guidance_layer"]
        run = {"mask": mask, "cache": cache, "compute": compute}
        through = self._transformer.features
        if not layer or not self._is_doubled:
            return through(x, self._rows, angles, **run)
        turn = self._transformer.config["num_layers"] + layer + 1
        x = through(x, self._rows, angles, **run, last=turn)
        weights = self._weights(scale, x)
        conditional, null = x.chunk(2)
        mixed = guide(conditional, null, weights).repeat(2, 1, 1)
        x = torch.where(weights == 1, x, mixed)
        return through(x, self._rows, angles, **run, first=turn)

    def _weights(self, scale: int, x: Tensor) -> Tensor:
        """Guidance [T, 1] of the last tokens up to and with those of `scale`."""
        counts = torch.tensor(self._pyramid.counts[: scale + 1])
        weights = torch.tensor(self._guidance[: scale + 1], dtype=torch.float64)
        weights = weights.repeat_interleave(counts)
        return weights[-x.shape[1] :, None].to(x)

    def logits(self, features: Tensor, scale: int) -> Tensor:
        """Features [R, n, C] of a scale to guided logits [B, n, d, 2]."""
        head = self._rows.head
        weight = self._guidance[scale]
        is_plain = self._transformer.config["guidance_layer"] or weight == 1
        if not self._is_doubled or is_plain:
            return self._transformer.logits(features[: self.batch], head[: self.batch])
        conditional, null = self._transformer.logits(features, head).chunk(2)
        return guide(conditional, null, weight)

    def paint(self, canvas: Tensor, tokens: Tensor, scale: int) -> Tensor:
        """The canvas after the bits [B, n, d] of a scale.

        Raises:
            InputError: another shape, or other values than 0 and 1.
        """
        shape = (self.batch, self._pyramid.counts[scale], self._pyramid.num_bits)
        if tokens.shape != shape:
            raise InputError(f"bits {tuple(tokens.shape)}: expected {list(shape)} at scale {scale}")
        check_bits(tokens)
        return self._pyramid.paint(canvas, tokens, scale)
