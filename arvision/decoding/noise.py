"""Noise as a function of identity: seed, image, position, purpose and number of the round.

It never depends on batch size, device count, rank or the order of calls, so image k of a run is the
same image however it is made. The bits are Philox4x32-10: the key is the seed, the counter is
(image, position, lane, purpose and round).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..contracts import Seeds
from ..errors import InputError, as_integer
from ..kernels import dispatch
from ..kernels.inversion import draw
from ..kernels.philox import philox4x32
from ..kernels.sampling import draw_gumbel

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
"""Of these, made in one go."""


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
        self._words = _words(seeds, device)
        self._memo = _Memo(self._words)
        self._rows = torch.arange(len(self._words), device=self._words.device)

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
        chosen._memo = self._memo
        return chosen

    def replace(self, rows: Tensor, seeds: Seeds) -> None:
        """Make the numbers of other images in some rows [A]; selections made before keep theirs no longer."""
        self._words[rows] = _words(seeds, self.device)
        self._memo.remake(rows)

    def join(self, other: Noise) -> Noise:
        """The noise of these images and, behind them, of others; both selected from the same noise."""
        joined = object.__new__(Noise)
        joined._words = torch.cat([self._words, other._words])
        joined._rows = torch.cat([self._rows, other._rows])
        joined._memo = self._memo
        return joined

    def reserve(self, num_positions: int) -> None:
        """Promise that `gumbel` is asked for positions below `num_positions` until the next promise.

        Without a promise `gumbel` looks at the positions it is given, which an accelerator has to
        wait for.
        """
        self._memo.promised = num_positions

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
        if self._memo.promised is None and positions.numel():
            reach = int(positions.max()) + 1
        else:
            reach = self._memo.promised or 0
        table = self._memo.table(reach, num, dtype)
        if table is None:
            return _gumbel(self._words, positions, num).to(dtype)
        return table[self._rows[:, None], positions]

    def best(self, logp: Tensor, positions: Tensor) -> Tensor:
        """argmax(log p + g), [B, T], g being the numbers of `gumbel`.

        Elsewhere than on a CPU they are made where they are used, and never stand in memory.

        Args:
            logp: [B, T, V], or [B, 1, V] for one law at all positions.
            positions: [B, T] int64.
        """
        if dispatch.stays(logp) or torch.compiler.is_compiling():
            return (logp + self.gumbel(positions, logp.shape[-1], logp.dtype)).argmax(-1)
        return draw_gumbel(logp, self._words, positions)


class _Memo:
    """Gumbel numbers of the images that a run began with, computed once as long as they are few."""

    def __init__(self, words: Tensor) -> None:
        self._words = words
        self._table: Tensor | None = None
        self.promised: int | None = None

    def table(self, reach: int, num: int, dtype: torch.dtype) -> Tensor | None:
        """Numbers [B, P, num] of at least `reach` positions; None where they are too many."""
        made = self._table
        is_right = made is not None and made.shape[2] == num and made.dtype == dtype
        if made is not None and is_right and reach <= made.shape[1]:
            return made
        # Room for the positions to come, so that a typical image is computed in one go.
        length = max(64, 1 << (reach - 1).bit_length())
        if len(self._words) * length * num > MEMO_ELEMENTS:
            return None
        batch, device = len(self._words), self._words.device
        self._table = torch.empty(batch, length, num, dtype=dtype, device=device)
        self.remake(slice(None))
        return self._table

    def remake(self, rows: Any) -> None:
        """Compute some rows of what is kept anew, after their words changed."""
        table = self._table
        if table is None:
            return
        words, (_, length, num) = self._words[rows], table.shape
        every = torch.arange(length, device=words.device).expand(len(words), length)
        # Words and doubles on the way take several times the table's memory.
        step = max(1, MADE_AT_ONCE // (max(1, len(words)) * num))
        for first in range(0, length, step):
            part = slice(first, first + step)
            table[rows, part] = _gumbel(words, every[:, part], num).to(table.dtype)


def _words(seeds: Seeds, device: torch.device | str) -> Tensor:
    """Seed (low and high word) and image of each identity, [B, 3]."""
    words = [(seed & 0xFFFFFFFF, seed >> 32, image) for seed, image in parse_seeds(seeds)]
    return torch.tensor(words, dtype=torch.int64, device=device).view(-1, 3)


def _uniform(
    identities: Tensor, positions: Tensor, purpose: str, round_number: Tensor | int, num: int
) -> Tensor:
    """Numbers [B, T, num] for identities [B, 3] (seed low and high, image), positions [B, T]."""
    low, high, image = (word[:, None, None] for word in identities.unbind(1))
    lanes = torch.arange(-(-num // 4), device=positions.device)
    use = torch.as_tensor(round_number, device=positions.device) * 256 + PURPOSES[purpose]
    use = use.expand_as(positions)[..., None] & 0xFFFFFFFF
    words = philox4x32((image, positions[..., None], lanes, use), (low, high)).flatten(-2)
    return ((words.double() + 0.5) * 2.0**-32)[..., :num]


def _gumbel(identities: Tensor, positions: Tensor, num: int) -> Tensor:
    return -(-_uniform(identities, positions, "token", 0, num).log()).log()
