"""Noise as a function of identity: seed, image, position, purpose and number of the round.

It never depends on batch size, device count, rank or the order of calls, so image k of a run is the
same image however it is made. The bits are Philox4x32-10: the key is the seed, the counter is
(image, position, lane, purpose and round).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..contracts import Seeds
from ..errors import InputError, as_integer
from ..kernels import dispatch
from ..kernels.inversion import draw
from ..kernels.philox import philox4x32
from ..kernels.sampling import Laws, draw_gumbel

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

MADE_AT_ONCE = 1 << 15
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

    unread = ("_places", "_host_rows")

    def __init__(self, seeds: Seeds, device: torch.device | str = "cpu") -> None:
        self._words = _words(seeds, device)
        self._memo = _Memo(self._words)
        self._rows = torch.arange(len(self._words), device=self._words.device)[:, None]
        self._host_rows = self._memo.every
        self._places: tuple[Tensor, int] | None = None

    def __len__(self) -> int:
        return len(self._words)

    @property
    def device(self) -> torch.device:
        """Where the numbers are made."""
        return self._words.device

    def select(self, rows: Tensor) -> Noise:
        """The noise of some of the images, rows [B']."""
        return self._of(self._words[rows], self._rows[rows])

    def replace(self, rows: Tensor, seeds: Seeds) -> None:
        """Make the numbers of other images in some rows [A]; selections made before keep theirs no longer."""
        self._words[rows] = _words(seeds, self.device)
        self._memo.forget(rows.tolist())

    def join(self, other: Noise) -> Noise:
        """The noise of these images and, behind them, of others; both selected from the same noise."""
        words = torch.cat([self._words, other._words])
        return self._of(words, torch.cat([self._rows, other._rows]))

    def _of(self, words: Tensor, rows: Tensor) -> Noise:
        chosen = object.__new__(Noise)
        chosen._words, chosen._rows, chosen._memo = words, rows, self._memo
        chosen._places = None
        return chosen

    @cached_property
    def _host_rows(self) -> list[int]:
        """Rows of the memo that the images stand in; those of a selection are read when asked for."""
        return self._rows[:, 0].tolist()

    def reserve(self, begins: Sequence[int], num: int) -> None:
        """Promise what `gumbel` is asked for until the next promise.

        Numbers of earlier positions are forgotten then. Without a promise `gumbel` looks at the
        positions it is given, which an accelerator has to wait for.

        Args:
            begins: first position of each image.
            num: positions of each.
        """
        self._memo.promise(self._host_rows, begins, num)

    def places(self, begin: int, num: int) -> Tensor:
        """Positions `begin`, `begin` + 1, ... of all images, [B, num], which `gumbel` knows again."""
        positions = torch.arange(begin, begin + num, device=self.device).expand(len(self), -1)
        if self._host_rows == self._memo.every:
            self._places = positions, begin
        return positions

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
        if not memo.has_promise:
            first, last = torch.stack(positions.aminmax()).tolist() if positions.numel() else (0, 0)
            memo.want(dict.fromkeys(self._host_rows, (first, last + 1)))
        table = memo.table(num, dtype)
        if table is None:
            return _gumbel(self._words, positions, num).to(dtype)
        mask = table.shape[1] - 1
        if self._places is not None and positions is self._places[0]:
            first, width = self._places[1] & mask, positions.shape[1]
            if first + width <= mask + 1:
                return table[:, first : first + width]
        return table[self._rows, positions & mask]

    def best(self, logp: Tensor | Laws, positions: Tensor) -> Tensor:
        """argmax(log p + g), [B, T], g being the numbers of `gumbel`.

        Elsewhere than on a CPU they are made where they are used, and never stand in memory.

        Args:
            logp: [B, T, V], or [B, 1, V] for one law at all positions.
            positions: [B, T] int64.
        """
        if isinstance(logp, Laws):
            return logp.draw(self._words, positions)
        if dispatch.stays(logp) or torch.compiler.is_compiling():
            return (logp + self.gumbel(positions, logp.shape[-1], logp.dtype)).argmax(-1)
        return draw_gumbel(logp, self._words, positions)


class _Memo:
    """Gumbel numbers of the images that a run began with, at the positions that are at work.

    A ring for each image: position p stands in column p modulo the length, a power of two.

    Attributes:
        wanted: the positions (first, behind the last) of each image that may be asked for.
        has_promise: whether these were promised.
        every: all images.
    """

    def __init__(self, words: Tensor) -> None:
        self._words = words
        self._ring: Tensor | None = None
        self._held: dict[int, tuple[int, int]] = {}
        self.wanted: dict[int, tuple[int, int]] = {}
        self.has_promise = self._is_ready = False
        self.every = list(range(len(words)))

    def promise(self, rows: Sequence[int], begins: Sequence[int], num: int) -> None:
        """Of these images nothing but `num` positions behind `begins` is wanted; see `Noise.reserve`."""
        self.has_promise = True
        self.want({r: (first, first + num) for r, first in zip(rows, begins, strict=True)})
        if self._ring is not None:
            self.table(self._ring.shape[2], self._ring.dtype)

    def want(self, positions: dict[int, tuple[int, int]]) -> None:
        """What `table` is to hold: positions (first, behind the last) of each image."""
        self.wanted, self._is_ready = positions, False

    def forget(self, rows: Sequence[int]) -> None:
        """The words of some images are others now."""
        for row in rows:
            self._held.pop(row, None)
        self._is_ready = False

    def table(self, num: int, dtype: torch.dtype) -> Tensor | None:
        """The rings [B, P, num] with all that is wanted; None where it is too much."""
        ring = self._ring
        if ring is None or ring.shape[2] != num or ring.dtype != dtype:
            self._ring, self._held, self._is_ready = None, {}, False
        if not self._is_ready:
            self._is_ready = True
            self._prepare(num, dtype)
        return self._ring

    def _prepare(self, num: int, dtype: torch.dtype) -> None:
        """Make what is wanted and not there yet, and some of what comes next."""
        batch = len(self._words)
        size = max(1, batch * num)
        widest = max((end - first for first, end in self.wanted.values()), default=1)
        ahead = max(1, min(AHEAD, MADE_AT_ONCE // size)) if self.has_promise else 1
        ring = self._ring
        if ring is None or ring.shape[1] < widest:
            fitting = [1 << (widest + more - 2).bit_length() for more in (ahead, 1)]
            length = next((one for one in fitting if one * size <= MEMO_ELEMENTS), None)
            self._held, self._ring = {}, None
            if length is None:
                return
            ring = self._ring = self._words.new_empty(batch, length, num, dtype=dtype)
        ahead = min(ahead, ring.shape[1] - widest + 1)
        missing: dict[int, list[int]] = {}
        for row, (first, end) in self.wanted.items():
            held_from, held_to = self._held.get(row, (first, first))
            if not held_from <= first <= held_to:
                held_to = first
            if end > held_to:
                missing.setdefault(max(end - held_to, ahead), []).append(row)
            self._held[row] = first, held_to
        for count, rows in missing.items():
            self._make(ring, rows, count)

    def _make(self, ring: Tensor, rows: list[int], count: int) -> None:
        """Make `count` further numbers of some images."""
        device, num = ring.device, ring.shape[2]
        begins = torch.tensor([self._held[row][1] for row in rows], device=device)[:, None]
        index = torch.tensor(rows, device=device)
        words = self._words if rows == self.every else self._words[index]
        # Words and doubles on the way take several times the numbers' memory.
        step = max(1, MADE_AT_ONCE // (len(rows) * num))
        for first in range(0, count, step):
            places = begins + torch.arange(first, min(first + step, count), device=device)
            numbers = _gumbel(words, places, num).to(ring.dtype)
            ring[index[:, None], places & (ring.shape[1] - 1)] = numbers
        for row in rows:
            begin, end = self._held[row]
            self._held[row] = begin, end + count


def _words(seeds: Seeds, device: torch.device | str) -> Tensor:
    """Seed (low and high word) and image of each identity, [B, 3]."""
    words = [(seed & 0xFFFFFFFF, seed >> 32, image) for seed, image in parse_seeds(seeds)]
    return torch.tensor(words, dtype=torch.int64, device=device).view(-1, 3)


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
