"""Decode state of a VAR model: one scale after another over a cache of the coarser ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...decoding.logits import guide
from ...errors import InputError, StateError
from .quantizer import MultiScaleQuantizer
from .transformer import VARTransformer


class _Cache:
    """Keys and values of all layers, appended scale by scale."""

    def __init__(self, num_layers: int) -> None:
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append [R, H, T, D] and return everything so far."""
        old_keys, old_values = self._keys[layer], self._values[layer]
        if old_keys is not None and old_values is not None:
            keys = torch.cat([old_keys, keys], dim=2)
            values = torch.cat([old_values, values], dim=2)
        self._keys[layer], self._values[layer] = keys, values
        return keys, values


class VARState:
    """See `arvision.contracts.ScaleState`.

    With guidance the batch holds 2B rows, the conditional ones first. Guidance grows with the scale:
    none at the first one, `guidance_scale` at the last.

    Args:
        transformer: the network.
        quantizer: paints the canvas.
        rows: embeddings of the conditions [R, C], R = B or 2B.
        guidance_scale: weight of the conditional logits at the last scale.
        batch_size: B.

    Paper: Tian et al., "Visual Autoregressive Modeling", 2024, appendix (guidance); the ramp is that
    of the authors' sampler, whose `cfg` is `guidance_scale - 1`.
    """

    def __init__(
        self,
        transformer: VARTransformer,
        quantizer: MultiScaleQuantizer,
        rows: Tensor,
        guidance_scale: float,
        batch_size: int,
    ) -> None:
        self._transformer, self._quantizer = transformer, quantizer
        self._rows, self._batch = rows, batch_size
        self._guidance_scale = guidance_scale
        self._is_doubled = len(rows) != batch_size
        self._modulations = transformer.modulations(rows)
        self._cache = _Cache(len(transformer.blocks))
        self._offsets = transformer.offsets()
        self._canvas = quantizer.blank(batch_size, rows)
        self._features: Tensor | None = None
        self._unread: list[Tensor] = []
        self._is_waiting = False
        self.scale = 0
        """Number of scales fed so far, which is the index of the next one."""
        self.computed_tokens = 0
        """Tokens that went through the network, per image."""

    @property
    def canvas(self) -> Tensor:
        """The sum of all codes fed, upsampled and smoothed, [B, D, P, P]."""
        return self._canvas

    @torch.no_grad()
    def catch_up(self, tokens: Tensor) -> None:
        """Take the tokens [B, n] of the first scales, drawn elsewhere, all at once.

        The network reads them together with the scale that `next` asks for, in one pass.

        Raises:
            StateError: scales were drawn or fed already.
            InputError: tokens that are not those of whole scales, all but the last at most.
        """
        if self.scale or self._is_waiting:
            raise StateError("catch_up comes before the first scale")
        if tokens.dim() != 2 or tokens.shape[1] not in self._offsets[1:-1]:
            raise InputError(
                f"tokens {tuple(tokens.shape)}: expected those of whole scales, "
                f"{', '.join(map(str, self._offsets[1:-1]))} per image"
            )
        scales = self._offsets.index(tokens.shape[1])
        for first, last in zip(self._offsets[:scales], self._offsets[1 : scales + 1], strict=True):
            self._unread.append(self._inputs())
            self._is_waiting = True
            self.feed(tokens[:, first:last])

    @torch.no_grad()
    def next(self) -> Tensor:
        """Guided logits [B, n, V] of the next scale.

        Raises:
            StateError: the last scale was not fed, or there are no more scales.
        """
        self._check_next()
        inputs = self._inputs()
        return self._logits(self._read(inputs) if self._unread else self._run(inputs))

    @torch.no_grad()
    def next_pruned(self, share: float) -> Tensor:
        """As `next`, without computing a share of the tokens. Lossy.

        Those whose inputs differ least from the scale's mean take their features from the coarser
        scale's, interpolated, and leave no keys and values behind.

        Args:
            share: of the scale's tokens, 0 < share < 1.

        Raises:
            StateError: as `next`, or there is no coarser scale to interpolate from.

        Paper: Guo et al., "FastVAR: Linear Visual Autoregressive Modeling via Cached Token Pruning",
        2025, section 3. There each layer prunes and restores; here the network does, once per scale.
        """
        self._check_next()
        if self._features is None:
            raise StateError("next_pruned at the first scale that the network reads")
        return self._logits(self._pruned(self._inputs(), share))

    def _check_next(self) -> None:
        if self._is_waiting:
            raise StateError("next before feed: the last scale waits for its tokens")
        if self.scale == len(self._transformer.scales):
            raise StateError(f"all {self.scale} scales are drawn")

    def _logits(self, features: Tensor) -> Tensor:
        """Guided logits [B, n, V] of the features [R, n, C] of a scale."""
        self._features, self._is_waiting = features, True
        return self._guided(self._transformer.logits(features, self._modulations))

    def _inputs(self) -> Tensor:
        """Embedded inputs [R, n, C] of the next scale."""
        first, last = self._offsets[self.scale : self.scale + 2]
        network = self._transformer
        if self.scale == 0:
            rows = network.start_rows(self._rows)
        else:
            views = self._quantizer.view(self._canvas, self.scale)
            rows = network.word_embed(views.to(self._rows.dtype))
            if self._is_doubled:
                rows = torch.cat([rows, rows])
        return rows + network.places(first, last)

    def _read(self, inputs: Tensor) -> Tensor:
        """Features [R, n, C] of `inputs` behind the scales that the network has not read yet."""
        num = inputs.shape[1]
        inputs = torch.cat([*self._unread, inputs], dim=1)
        self._unread = []
        mask = self._transformer.mask()[: inputs.shape[1], : inputs.shape[1]]
        return self._run(inputs, mask)[:, -num:]

    def _run(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        self.computed_tokens += inputs.shape[1]
        return self._transformer.features(inputs, self._modulations, mask=mask, cache=self._cache)

    def _pruned(self, inputs: Tensor, share: float) -> Tensor:
        """Features [R, n, C] of which a share is interpolated from the coarser scale."""
        assert self._features is not None
        before, side = self._transformer.scales[self.scale - 1 : self.scale + 1]
        coarse = self._features.transpose(1, 2).unflatten(2, (before, before))
        features = F.interpolate(coarse.float(), size=(side, side), mode="bilinear")
        features = features.flatten(2).transpose(1, 2).to(inputs.dtype)
        kept = max(1, round(inputs.shape[1] * (1 - share)))
        # Both halves of a guided batch keep the same tokens, chosen by the conditional one.
        half = inputs[: self._batch]
        energy = (half - half.mean(1, keepdim=True)).square().sum(-1)
        places = energy.topk(kept, dim=1).indices.sort(dim=1).values
        if self._is_doubled:
            places = torch.cat([places, places])
        index = places[..., None].expand(-1, -1, inputs.shape[2])
        fresh = self._run(inputs.gather(1, index))
        return features.scatter(1, index, fresh)

    def _guided(self, logits: Tensor) -> Tensor:
        if not self._is_doubled:
            return logits
        conditional, null = logits.chunk(2)
        progress = self.scale / max(1, len(self._transformer.scales) - 1)
        return guide(conditional, null, 1 + (self._guidance_scale - 1) * progress)

    @torch.no_grad()
    def feed(self, tokens: Tensor) -> None:
        """Take the tokens [B, n] of the scale that `next` gave the law of.

        `tokens` may be vectors [B, n, D] in the place of codes.

        Raises:
            StateError: `next` was not called.
            InputError: another shape, or a token out of range.
        """
        if not self._is_waiting:
            raise StateError("feed before next: no scale waits for tokens")
        num = self._transformer.scales[self.scale] ** 2
        codes = self._quantizer.codes()
        if tokens.is_floating_point():
            if tokens.shape != (self._batch, num, codes.shape[1]):
                raise InputError(
                    f"vectors {tuple(tokens.shape)}: expected [{self._batch}, {num}, "
                    f"{codes.shape[1]}]"
                )
            vectors = tokens.to(codes.dtype)
        else:
            if tokens.shape != (self._batch, num):
                raise InputError(
                    f"tokens {tuple(tokens.shape)}: expected [{self._batch}, {num}] at scale "
                    f"{self.scale}"
                )
            if not 0 <= int(tokens.min()) <= int(tokens.max()) < len(codes):
                raise InputError(f"tokens must lie in 0..{len(codes) - 1}")
            vectors = codes[tokens]
        self._canvas = self._quantizer.paint(self._canvas, vectors, self.scale)
        self.scale += 1
        self._is_waiting = False
