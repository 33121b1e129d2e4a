"""The decode state of next-scale models: one scale after another over a cache of the coarser ones.

A family says how its network reads and paints (`ScaleNetwork`); the order of calls, scales drawn
elsewhere, and pruning are the same for all of them and live here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, StateError

Part = Callable[[Tensor, Tensor | None], Tensor]
"""What a part of a layer adds to rows [R, k, C] that stand at places [R, k] of their scale; None for
all rows in their order."""

Compute = Callable[[Hashable, Tensor, Part], Tensor]
"""Name of a part, rows [R, n, C] and the part, to what is added to each row."""


def compute_all(name: Hashable, x: Tensor, part: Part) -> Tensor:
    """Every row goes through the part."""
    return part(x, None)


class ScaleCache:
    """Keys and values of all layers, appended scale by scale."""

    def __init__(self) -> None:
        self._parts: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append [R, H, T, D] and return everything so far, [R, H, S, D]."""
        if layer in self._parts:
            old_keys, old_values = self._parts[layer]
            keys, values = (
                torch.cat([old_keys, keys], dim=2),
                torch.cat([old_values, values], dim=2),
            )
        self._parts[layer] = keys, values
        return keys, values


class FixedScaleCache(ScaleCache):
    """A `ScaleCache` whose keys and values keep their places.

    Args:
        capacity: tokens of all scales.

    Attributes:
        first: number of the first token of the scale that is read.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity, self.first = capacity, 0

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write [R, H, T, D] and return everything so far, [R, H, S, D]."""
        if layer not in self._parts:
            self._parts[layer] = self._room(keys), self._room(values)
        stored, end = self._parts[layer], self.first + keys.shape[2]
        for part, new in zip(stored, (keys, values), strict=True):
            part[:, :, self.first : end] = new
        return stored[0][:, :, :end], stored[1][:, :, :end]

    def _room(self, like: Tensor) -> Tensor:
        return like.new_zeros(*like.shape[:2], self._capacity, like.shape[3])


class TokenPruner:
    """Compute some tokens of a large scale in each part of each layer, and restore the others.

    A part keeps the rows that lie furthest from their mean; for the others stands what the same part
    added at the last scale that was computed as a whole, interpolated to the new size. Pruned tokens
    leave no keys and values behind. Every row, conditional or null, keeps tokens of its own.

    Paper: Guo et al., "FastVAR: Linear Visual Autoregressive Modeling via Cached Token Pruning",
    2025, section 4 (pivotal token selection, cached token restoration).
    """

    def __init__(self) -> None:
        self._share, self._whole = 0.0, (0, 0)
        self._keeps = False
        self._size = (1, 1)
        self._memory: dict[Hashable, Tensor] = {}

    @property
    def has_memory(self) -> bool:
        """Whether there is a scale to restore tokens from."""
        return bool(self._memory)

    def begin(
        self,
        size: tuple[int, int],
        share: float = 0.0,
        keeps: bool = False,
        whole: tuple[int, int] = (0, 0),
    ) -> None:
        """Before a scale: its height and width, the share to prune, whether to keep its parts, and how
        many of the first and last layers compute all tokens."""
        self._size, self._share, self._keeps, self._whole = size, share, keeps, whole

    def num_kept(self) -> int:
        """Tokens of the scale that every part computes."""
        num = self._size[0] * self._size[1]
        return max(1, round(num * (1 - self._share)))

    def __call__(self, name: Hashable, x: Tensor, part: Part) -> Tensor:
        """See `Compute`."""
        height, width = self._size
        if self._share == 0 or not self._prunes(name):
            out = part(x, None)
            if self._keeps:
                last = out[:, -height * width :]
                self._memory[name] = last.mT.unflatten(2, self._size)
            return out
        energy = (x - x.mean(1, keepdim=True)).square().sum(-1)
        places = energy.topk(self.num_kept(), dim=1).indices.sort(dim=1).values
        index = places[..., None].expand(-1, -1, x.shape[2])
        fresh = part(x.gather(1, index), places)
        coarse = self._memory[name].float()
        restored = F.interpolate(coarse, size=self._size, mode="area").flatten(2).mT
        return restored.to(fresh.dtype).scatter(1, index, fresh)

    def _prunes(self, name: Hashable) -> bool:
        """Whether the layer of a part (layer, ...) is not one of those that stay whole."""
        if self._whole == (0, 0):
            return True
        layers = [key[0] for key in self._memory if isinstance(key, tuple)]
        layer = name[0] if isinstance(name, tuple) else 0
        return self._whole[0] <= layer <= max(layers) - self._whole[1]


class ScaleNetwork(Protocol):
    """A network with the conditions of B images bound to it; R rows, the conditional ones first."""

    batch: int
    """B."""

    @property
    def sizes(self) -> Sequence[tuple[int, int]]:
        """Height and width of each scale in tokens."""
        ...

    def blank(self) -> Tensor:
        """The canvas [B, ...] before the first scale."""
        ...

    def inputs(self, canvas: Tensor, scale: int) -> Tensor:
        """Embedded inputs [R, n, C] of a scale, from what is painted so far."""
        ...

    def logits(
        self, x: Tensor, scale: int, *, mask: Tensor | None, cache: ScaleCache, compute: Compute
    ) -> Tensor:
        """Inputs [R, T, C] through the network to guided logits [B, n, V] or [B, n, d, 2] of a scale.

        `x` ends with the tokens of `scale`; T is larger where coarser ones are read with them, and
        then `mask` [T, T] says who may look at whom.
        """
        ...

    def paint(self, canvas: Tensor, tokens: Tensor, scale: int) -> Tensor:
        """The canvas after the tokens of a scale, which are checked first."""
        ...

    def painted(self, canvas: Tensor, tokens: Tensor, scale: int) -> Tensor:
        """`paint` of tokens that were drawn from the network's own laws: nothing is looked at."""
        ...


class NextScaleState:
    """See `arvision.contracts.ScaleState`.

    Args:
        network: with the conditions of the batch.
    """

    unread = ("_pruner", "_unread", "computed_tokens")

    def __init__(self, network: ScaleNetwork) -> None:
        self._network = network
        self._ends = list(accumulate((h * w for h, w in network.sizes), initial=0))
        self._cache = ScaleCache()
        self._pruner = TokenPruner()
        self._unread: list[Tensor] = []
        self._is_waiting = False
        self.canvas = network.blank()
        """The sum of all codes fed, upsampled, [B, D, H, W]."""
        self.scale = 0
        """Number of scales fed so far, which is the index of the next one."""
        self.computed_tokens = 0
        """Tokens that went through the network, per image."""

    @torch.no_grad()
    def catch_up(self, tokens: Tensor) -> None:
        """Take the tokens [B, n] or [B, n, d] of the first scales, drawn elsewhere, all at once.

        The network reads them together with the scale that `next` asks for, in one pass.

        Raises:
            StateError: scales were drawn or fed already.
            InputError: tokens that are not those of whole scales, all but the last at most.
        """
        if self.scale or self._is_waiting:
            raise StateError("catch_up comes before the first scale")
        if tokens.dim() < 2 or tokens.shape[1] not in self._ends[1:-1]:
            raise InputError(
                f"tokens {tuple(tokens.shape)}: expected those of whole scales, "
                f"{', '.join(map(str, self._ends[1:-1]))} per image"
            )
        scales = self._ends.index(tokens.shape[1])
        for first, last in zip(self._ends[:scales], self._ends[1 : scales + 1], strict=True):
            self._unread.append(self._network.inputs(self.canvas, self.scale))
            self._is_waiting = True
            self.feed(tokens[:, first:last])

    @torch.no_grad()
    def next(self) -> Tensor:
        """Guided logits of the next scale.

        Raises:
            StateError: the last scale was not fed, or there are no more scales.
        """
        return self._next(0.0, keeps=False)

    @torch.no_grad()
    def next_reference(self) -> Tensor:
        """As `next`; what each layer adds is kept, for `next_pruned` to restore tokens from."""
        return self._next(0.0, keeps=True)

    @torch.no_grad()
    def next_pruned(self, share: float, whole: tuple[int, int] = (0, 0)) -> Tensor:
        """As `next`, without computing a share of the tokens in any layer. Lossy.

        Args:
            share: of the scale's tokens, 0 < share < 1.
            whole: first and last layers that compute all tokens.

        Raises:
            StateError: as `next`, or no scale was drawn with `next_reference`.
        """
        if not self._pruner.has_memory:
            raise StateError("next_pruned without next_reference at a coarser scale")
        return self._next(share, keeps=False, whole=whole)

    def fix(self) -> None:
        """Keep all keys and values in one place: `draw_next` follows, from the second scale on."""
        self._cache = FixedScaleCache(self._ends[-1])

    @property
    def is_fixed(self) -> bool:
        """Whether `fix` was called."""
        return isinstance(self._cache, FixedScaleCache)

    @property
    def num_next(self) -> int:
        """Tokens of the next scale."""
        return self._ends[self.scale + 1] - self._ends[self.scale]

    @torch.no_grad()
    def draw_next(self, pick: Callable[[Tensor], Tensor]) -> Tensor:
        """`next`, tokens out of its logits by `pick`, and `feed`, with nothing read or counted."""
        inputs = self._network.inputs(self.canvas, self.scale)
        logits = self._network.logits(
            inputs, self.scale, mask=None, cache=self._cache, compute=compute_all
        )
        drawn = pick(logits)
        self.canvas.copy_(self._network.painted(self.canvas, drawn, self.scale))
        return drawn

    def go_on(self) -> None:
        """Count the scale that `draw_next` drew."""
        self.computed_tokens += self.num_next
        self._count()

    def _count(self) -> None:
        self.scale += 1
        if isinstance(self._cache, FixedScaleCache):
            self._cache.first = self._ends[self.scale]

    def _next(self, share: float, keeps: bool, whole: tuple[int, int] = (0, 0)) -> Tensor:
        if self._is_waiting:
            raise StateError("next before feed: the last scale waits for its tokens")
        if self.scale == len(self._network.sizes):
            raise StateError(f"all {self.scale} scales are drawn")
        inputs = self._network.inputs(self.canvas, self.scale)
        mask = None
        if self._unread:
            inputs = torch.cat([*self._unread, inputs], dim=1)
            self._unread = []
            mask = block_mask(tuple(self._network.sizes), inputs.device)
            mask = mask[: inputs.shape[1], : inputs.shape[1]]
        self._pruner.begin(self._network.sizes[self.scale], share, keeps, whole)
        self.computed_tokens += inputs.shape[1] if share == 0 else self._pruner.num_kept()
        self._is_waiting = True
        return self._network.logits(
            inputs, self.scale, mask=mask, cache=self._cache, compute=self._pruner
        )

    @torch.no_grad()
    def feed(self, tokens: Tensor) -> None:
        """Take the tokens of the scale that `next` gave the law of.

        Raises:
            StateError: `next` was not called.
            InputError: another shape, or a token out of range.
        """
        if not self._is_waiting:
            raise StateError("feed before next: no scale waits for tokens")
        self.canvas = self._network.paint(self.canvas, tokens, self.scale)
        self._is_waiting = False
        self._count()


@lru_cache(maxsize=64)
def levels_of(sizes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """[L] int64, the number of the scale that each token belongs to; made once."""
    counts = [height * width for height, width in sizes]
    levels = [level for level, count in enumerate(counts) for _ in range(count)]
    return torch.tensor(levels, device=device)


@lru_cache(maxsize=16)
def block_mask(sizes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """[L, L] bool, true where a token may look: at its own scale and the coarser ones; made once."""
    level = levels_of(sizes, device)
    return level[:, None] >= level[None, :]
