"""Noise as a function of identity: seed, image, position, purpose and number of the round.

It never depends on batch size, device count, rank or the order of calls, so image k of a run is the
same image however it is made. The bits are Philox4x32-10: the key is the seed, the counter is
(image, position, lane, purpose and round).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..contracts import Seeds
from ..errors import InputError, as_integer
from ..kernels.inversion import draw
from ..kernels.philox import philox4x32

__all__ = ["MEMO_ELEMENTS", "PURPOSES", "Noise", "draw", "parse_seeds"]

PURPOSES = {
    "token": 0,
    "accept": 1,
    "recover": 2,
    "init": 3,
    "draft": 4,
    "latent": 5,
    "order": 6,
    "residual": 7,
    "flow": 8,
}
"""What a number is used for; streams of different purposes are independent."""

MEMO_ELEMENTS = 1 << 23
"""Gumbel values kept per `Noise`: up to this many, each is computed once."""

MADE_AT_ONCE = 1 << 16
"""Of these, made in one go: words and doubles on the way take several times their memory."""

AHEAD = 32
"""Positions made ahead of need at most, where they are few values: a call costs as much as many."""


def parse_seeds(seeds: Seeds) -> list[tuple[int, int]]:
    """Pairs (seed, image) from integers (image 0 of that seed) or pairs.

    Raises:
        InputError: an entry that is neither, or out of range (seed 64 bit, image 32 bit).
    """
    if isinstance(seeds, Tensor):
        seeds = seeds.tolist()
    pairs = []
    for entry in seeds:
        pair = tuple(entry) if isinstance(entry, Sequence) else (entry, 0)
        seed, image = map(as_integer, pair) if len(pair) == 2 else (None, None)
        if seed is None or image is None:
            raise InputError(f"seed {entry!r}: expected an integer or a pair (seed, image)")
        if not (0 <= seed < 1 << 64 and 0 <= image < 1 << 32):
            raise InputError(f"seed {entry!r}: expected 0 <= seed < 2^64 and 0 <= image < 2^32")
        pairs.append((seed, image))
    return pairs


class Noise:
    """Random numbers of B images.

    Args:
        seeds: one entry per image, see `parse_seeds`.
        device: where the numbers are wanted.
    """

    def __init__(self, seeds: Seeds, device: torch.device | str = "cpu") -> None:
        pairs = parse_seeds(seeds)
        words = [(seed & 0xFFFFFFFF, seed >> 32, image) for seed, image in pairs]
        self._words = torch.tensor(words, dtype=torch.int64, device=device).view(-1, 3)
        self._memo = _Memo(self._words)
        self._rows = torch.arange(len(words), device=self._words.device)[:, None]
        self._places: tuple[Tensor, int] | None = None
        self._is_whole = True

    def __len__(self) -> int:
        return len(self._words)

    @property
    def device(self) -> torch.device:
        """Where the numbers are made."""
        return self._words.device

    def select(self, rows: Tensor) -> Noise:
        """The noise of some of the images, rows [B']."""
        chosen = object.__new__(Noise)
        chosen._words, chosen._rows = self._words[rows], self._rows[rows]
        chosen._memo, chosen._places, chosen._is_whole = self._memo, None, False
        return chosen

    def places(self, begin: int, num: int) -> Tensor:
        """Positions `begin`, `begin` + 1, ... of all images, [B, num], which `gumbel` knows again."""
        line = torch.arange(begin, begin + num, device=self.device)
        positions = line.expand(len(self), -1)
        if self._is_whole:
            self._places = positions, begin
        return positions

    def reserve(self, end: int, begin: int = 0) -> None:
        """Promise that `gumbel` is asked for positions `begin` to `end` - 1 until the next promise.

        Numbers of earlier positions are forgotten then. Without a promise `gumbel` looks at the
        positions it is given, which an accelerator has to wait for.
        """
        self._memo.promise(begin, end)

    def uniform(
        self,
        positions: Tensor,
        purpose: str,
        round_number: Tensor | int = 0,
        num: int | None = None,
    ) -> Tensor:
        """Uniform numbers in (0, 1), float64.

        Args:
            positions: [B, T] int64.
            purpose: a name in `PURPOSES`.
            round_number: the round that the number is for, where a rule needs fresh randomness each
                time a position is judged: [B, T] int64 or one integer below 2^24.
            num: numbers per position.

        Returns:
            [B, T], or [B, T, num].
        """
        uniforms = _uniform(self._words, positions, purpose, round_number, num or 1)
        return uniforms[..., 0] if num is None else uniforms

    def normal(
        self, positions: Tensor, num: int, purpose: str, round_number: Tensor | int = 0
    ) -> Tensor:
        """Standard normal numbers [B, T, num] float64 of positions [B, T].

        Number i depends on i and not on `num`. Arguments as in `uniform`.
        """
        pairs = self.uniform(positions, purpose, round_number, num + num % 2).unflatten(-1, (-1, 2))
        radius, angle = (-2 * pairs[..., 0].log()).sqrt(), 2 * torch.pi * pairs[..., 1]
        both = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
        return both.flatten(-2)[..., :num]

    def gumbel(self, positions: Tensor, num: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Standard Gumbel numbers [B, T, num] for the tokens at positions [B, T].

        They have no round: every pass, window and sampler sees the same ones.
        """
        memo = self._memo
        begin, end = memo.promised or _range(positions)
        table = memo.table(begin, end, num, dtype)
        if table is None:
            return _gumbel(self._words, positions, num).to(dtype)
        length = table.shape[1]
        if self._places is not None and positions is self._places[0]:
            first = self._places[1] & (length - 1)
            if first + positions.shape[1] <= length:
                return table[:, first : first + positions.shape[1]]
        return table[self._rows, positions & (length - 1)]


def _range(positions: Tensor) -> tuple[int, int]:
    """The first position and the one behind the last."""
    if not positions.numel():
        return 0, 0
    first, last = torch.stack(positions.aminmax()).tolist()
    return first, last + 1


class _Memo:
    """Gumbel numbers of the images that a run began with, at the positions that are at work.

    A ring: position p stands in row p modulo its length, a power of two.
    """

    def __init__(self, words: Tensor) -> None:
        self._words = words
        self._ring: Tensor | None = None
        self._begin = self._end = 0
        self.promised: tuple[int, int] | None = None

    def promise(self, begin: int, end: int) -> None:
        """Nothing outside of this range is asked for; see `Noise.reserve`."""
        self.promised = begin, end
        if self._ring is not None:
            self.table(begin, end, self._ring.shape[2], self._ring.dtype)

    def table(self, begin: int, end: int, num: int, dtype: torch.dtype) -> Tensor | None:
        """The ring [B, P, num] with all of a range of positions; None where they are too many."""
        ring = self._ring
        is_right = ring is not None and ring.shape[2] == num and ring.dtype == dtype
        if ring is not None and is_right and self._begin <= begin and end <= self._end:
            return ring
        size = max(1, len(self._words) * num)
        ahead = max(1, min(AHEAD, MADE_AT_ONCE // size)) if self.promised else 1
        end = -(-end // ahead) * ahead
        length = 1 << max(0, end - begin - 1).bit_length()
        if length * size > MEMO_ELEMENTS:
            self._ring = None
            return None
        goes_on = is_right and self._begin <= begin <= self._end
        made = self._end if goes_on else begin
        if ring is None or not goes_on or length > ring.shape[1]:
            wider = self._words.new_empty(len(self._words), length, num, dtype=dtype)
            if ring is not None and goes_on:
                held = torch.arange(begin, made, device=wider.device)
                wider[:, held & (length - 1)] = ring[:, held & (ring.shape[1] - 1)]
            self._ring = ring = wider
        step = max(1, MADE_AT_ONCE // size)
        for first in range(made, end, step):
            part = torch.arange(first, min(first + step, end), device=ring.device)
            numbers = _gumbel(self._words, part.expand(len(self._words), -1), num)
            ring[:, part & (ring.shape[1] - 1)] = numbers.to(dtype)
        self._begin, self._end = begin, end
        return ring


def _uniform(
    identities: Tensor, positions: Tensor, purpose: str, round_number: Tensor | int, num: int
) -> Tensor:
    """Numbers [B, T, num] for identities [B, 3] (seed low and high, image), positions [B, T]."""
    low, high, image = identities.t()[..., None, None]
    lanes = torch.arange(-(-num // 4), device=positions.device)
    use = torch.as_tensor(round_number, device=positions.device) * 256 + PURPOSES[purpose]
    if use.dim():
        use = use.expand_as(positions)[..., None]
    words = (image, positions[..., None], lanes, use & 0xFFFFFFFF)
    return philox4x32(words, (low, high)).flatten(-2).double().add_(0.5).mul_(2.0**-32)[..., :num]


def _gumbel(identities: Tensor, positions: Tensor, num: int) -> Tensor:
    return _uniform(identities, positions, "token", 0, num).log_().neg_().log_().neg_()
