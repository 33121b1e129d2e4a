"""What a batch of captions makes of an Infinity transformer while it draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...decoding.guidance import weights_are
from ...decoding.logits import guide
from ...decoding.scale_state import Compute, ScaleCache
from ...errors import InputError
from ...networks import enter
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
        guidance: Sequence[float] | Tensor,
        batch: int,
    ) -> None:
        self.batch, self.sizes = batch, transformer.scales
        self._transformer, self._rows, self._guidance = transformer, rows, guidance
        self._pyramid = transformer.pyramid
        self._is_doubled = len(rows.start) != batch
        self._angles = transformer.angles()
        # Of each token, for guidance inside of the network.
        weights = torch.as_tensor(guidance, dtype=torch.float64)
        counts = torch.tensor(self._pyramid.counts, device=weights.device)
        self._by_token = weights.repeat_interleave(counts, dim=-1).to(rows.start)[..., None]

    def blank(self) -> Tensor:
        """The canvas [B, D, H, W], float32 or wider."""
        start = self._rows.start
        dtype = torch.float64 if start.dtype == torch.float64 else torch.float32
        return self._pyramid.blank(self.batch, start.device, dtype)

    def inputs(self, canvas: Tensor, scale: int) -> Tensor:
        """Embedded inputs [R, n, C] of a scale."""
        if scale == 0:
            return enter(self._transformer, "inputs", self._rows, scale)
        seen = self._pyramid.view(canvas, scale).to(self._rows.start.dtype)
        x = enter(self._transformer, "inputs", seen, scale)
        return torch.cat([x, x]) if self._is_doubled else x

    def logits(
        self, x: Tensor, scale: int, *, mask: Tensor | None, cache: ScaleCache, compute: Compute
    ) -> Tensor:
        """Guided logits [B, n, d, 2] of a scale, whose inputs are the last of [R, T, C]."""
        last = sum(self._pyramid.counts[: scale + 1])
        angles = self._angles[last - x.shape[1] : last]
        weight: Any = self._guidance
        if isinstance(weight, Tensor):
            weight = weight[:, scale].to(x).view(-1, 1, 1, 1)
        else:
            weight = weight[scale]
        inside = bool(self._transformer.config["guidance_layer"]) and self._is_doubled
        needs_null = self._is_doubled and not inside and not weights_are(weight, 1)
        run: Any = {"mask": mask, "cache": cache, "compute": compute}
        logits = self._transformer(
            x,
            self._rows,
            angles,
            self._pyramid.counts[scale],
            len(x) if needs_null else self.batch,
            guidance=self._weights(scale, x.shape[1]) if inside else None,
            **run,
        )
        if not needs_null:
            return logits
        conditional, null = logits.chunk(2)
        return guide(conditional, null, weight)

    def _weights(self, scale: int, num: int) -> Tensor:
        """Guidance [T, 1] or [B, T, 1] of the last T = `num` tokens up to and with those of `scale`."""
        last = sum(self._pyramid.counts[: scale + 1])
        return self._by_token[..., last - num : last, :]

    def paint(self, canvas: Tensor, tokens: Tensor, scale: int) -> Tensor:
        """The canvas after the bits [B, n, d] of a scale.

        Raises:
            InputError: another shape, or other values than 0 and 1.
        """
        shape = (self.batch, self._pyramid.counts[scale], self._pyramid.num_bits)
        if tokens.shape != shape:
            raise InputError(f"bits {tuple(tokens.shape)}: expected {list(shape)} at scale {scale}")
        check_bits(tokens)
        return self.painted(canvas, tokens, scale)

    def painted(self, canvas: Tensor, tokens: Tensor, scale: int) -> Tensor:
        """The canvas after the network's own bits [B, n, d] of a scale."""
        return self._pyramid.paint(canvas, tokens, scale)
