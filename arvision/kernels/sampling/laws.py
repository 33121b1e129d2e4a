"""Laws that are drawn from as logits, and written only where somebody looks at them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .reference import Shaping

if TYPE_CHECKING:
    from .triton import Cut


class Laws:
    """Laws [..., V], float32, for logits that the Triton implementation takes; see `laws_of`.

    A draw is one launch from the logits to the tokens: neither the laws nor the noise stand in
    memory. What a row keeps (four numbers) is found once, for the draw or before it.

    Args:
        logits: [..., V]; conditional ones where `null_logits` is given, else guided.
        how: temperature, top-k and top-p.
        null_logits: [..., V] of the null condition.
        guidance_scale: a number, or weights that broadcast to [..., 1], in the logits' dtype.
    """

    dtype = torch.float32

    def __init__(
        self,
        logits: Tensor,
        how: Shaping,
        null_logits: Tensor | None = None,
        guidance_scale: float | Tensor = 1.0,
    ) -> None:
        self._logits, self._how = logits, how
        self._null, self._scale = null_logits, guidance_scale
        self._made: Cut | None = None
        self._written: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the laws, V included."""
        return self._logits.shape

    def __len__(self) -> int:
        return len(self._logits)

    def __getitem__(self, index: Any) -> Laws:
        """Some of the laws; `index` does not reach the last dimension."""
        scale, null = self._scale, self._null
        if isinstance(scale, Tensor):
            scale = scale.expand(*self.shape[:-1], 1)[index]
        return Laws(self._logits[index], self._how, None if null is None else null[index], scale)

    def draw(self, words: Tensor, positions: Tensor) -> Tensor:
        """argmax(log p + g), [B, T], of laws [B, T, V]; see `arvision.kernels.sampling.draw_gumbel`.

        Args:
            words: [B, 3] int64: seed's low and high word, image.
            positions: [B, T] int64.
        """
        noise = (words, positions, 0)
        cut = self._cut(noise) if self._made is None else self._made
        tokens = cut.gumbel(*noise) if cut.tokens is None else cut.tokens
        cut.tokens = None  # of this noise
        return tokens.view(positions.shape)

    @property
    def norms(self) -> Tensor:
        """[...], logarithms of the sums that divide the laws: NaN for a row that is no law."""
        return self._cut().log_sums.view(self.shape[:-1])

    @property
    def written(self) -> Tensor:
        """The laws [..., V], written once."""
        if self._written is None:
            self._written = self._cut().write().view(self.shape)
        return self._written

    def at(self, place: int) -> Tensor:
        """Those at one place (which may count from the end) of laws [B, T, V], [B, V]."""
        if self._written is not None:
            return self._written[:, place]
        num = self.shape[1]
        return self._cut().write(place % num, num)

    def _cut(self, noise: tuple[Tensor, Tensor, int] | None = None) -> Cut:
        if self._made is None:
            from .triton import Cut

            size, scale, null = self.shape[-1], self._scale, self._null
            if isinstance(scale, Tensor):
                scale = scale.expand(*self.shape[:-1], 1).flatten().float()
            rows = self._logits.reshape(-1, size)
            null = None if null is None else null.reshape(-1, size)
            self._made = Cut(rows, self._how, null, scale, noise)
        return self._made
