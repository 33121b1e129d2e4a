"""Which ids a model's images hold besides the tokens that are drawn, and where everything stands.

An image of such a model is a sequence of drawn tokens with forced ids between them, as the line end
behind each row of Emu3. A forced id is an attachment of the token before it: fed in the same pass,
kept and forgotten together with it. What is predicted after the token is what the network says at
its last attachment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...decoding.tree import Topology
from ...errors import InputError, check_count

Ints = np.ndarray


@dataclass(frozen=True)
class Expansion:
    """T candidates with their attachments, as the S things that are fed.

    The first side b is B, or 1 where all rows are alike. Rows with fewer attachments than others end
    in dummies, behind everything else.

    Attributes:
        own: [b, S], the candidate that a thing is or hangs on.
        forced: [b, S], the id of an attachment, -1 for a candidate.
        begin: [b, T], where each candidate stands among the S.
        end: [b, T], where its last attachment does; the candidate itself without any.
        places: [b, S], places in the sequence of the image.
    """

    own: Ints
    forced: Ints
    begin: Ints
    end: Ints
    places: Ints

    def kept(self, kept: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates to keep, [B, K] and [B], as the things to keep, [B, S'] and [B]."""
        rows = []
        for row, (path, count) in enumerate(zip(kept.tolist(), counts.tolist(), strict=True)):
            own = min(row, len(self.begin) - 1)
            begin, end = self.begin[own], self.end[own]
            rows.append([s for c in path[:count] for s in range(begin[c], end[c] + 1)])
        longest = max(1, *map(len, rows))
        padded = [row + [0] * (longest - len(row)) for row in rows]
        nums = torch.tensor([len(row) for row in rows], device=counts.device)
        return torch.tensor(padded, device=kept.device), nums


@dataclass(frozen=True)
class Fixed:
    """The same in fixed shapes, where lengths are; dummies repeat the last candidate.

    Attributes:
        own: [B, S], the candidate that a thing is or hangs on.
        forced: [B, S], the id of an attachment, -1 for a candidate; None where nothing has any.
        places: [B, S], places in the sequence of the image.
        begin: [B, T], where each candidate stands among the S.
        end: [B, T], where what comes last of it does.
    """

    own: Tensor
    forced: Tensor | None
    places: Tensor
    begin: Tensor
    end: Tensor


MOST_TOKENS = 1 << 20
"""Of an image: a side of 16,384 pixels, far more than any network was trained for."""


class Layout:
    """The sequence of one image: N drawn tokens, forced ids behind some, and their positions.

    Args:
        num_tokens: N.
        behind: ids that follow a token, by its number; nothing can hang on the last one, since
            nothing is predicted after it.
        offsets: [A, M] int64, positions of the M things of the sequence on each of A axes, relative
            to the first free position after the prompt; None for 0, 1, 2, ... on one axis.
        tail: ids that close the sequence. They cost no pass.

    Raises:
        InputError: no token, or an attachment of a token that cannot have one.
    """

    def __init__(
        self,
        num_tokens: int,
        behind: Mapping[int, Sequence[int]] | None = None,
        offsets: Tensor | None = None,
        tail: Sequence[int] = (),
    ) -> None:
        if num_tokens < 1:
            raise InputError(f"an image of {num_tokens} tokens: expected at least one")
        check_count("tokens of an image", num_tokens, MOST_TOKENS)
        behind = {token: tuple(ids) for token, ids in (behind or {}).items() if len(ids)}
        for token in behind:
            if not 0 <= token < num_tokens - 1:
                raise InputError(
                    f"forced ids behind token {token}: expected a token in 0..{num_tokens - 2} "
                    "(what follows the last one is the tail)"
                )
        self.num_tokens, self.tail = num_tokens, tuple(tail)
        self.has_forced = bool(behind)
        self._counts = np.zeros(num_tokens + 1, dtype=np.int64)
        self._ids = np.full((num_tokens + 1, max(map(len, behind.values()), default=1)), -1)
        for token, ids in behind.items():
            self._counts[token] = len(ids)
            self._ids[token, : len(ids)] = ids
        self._places = np.concatenate([[0], (1 + self._counts[:-1]).cumsum()])
        self.num_places = int(self._places[-1])
        steps = torch.arange(self.num_places)[None]
        self.offsets = steps if offsets is None else offsets
        self._most = max(map(len, behind.values()), default=0)
        self._widest: dict[tuple[int, ...] | None, int] = {}
        self._tables: dict[torch.device, tuple[Tensor, ...]] = {}
        if self.offsets.shape[1] != self.num_places:
            raise InputError(
                f"offsets {tuple(self.offsets.shape)}: expected [axes, {self.num_places}], tokens "
                "and forced ids"
            )

    @classmethod
    def raster(
        cls, rows: int, columns: int, line_end: int | None = None, tail: Sequence[int] = ()
    ) -> Layout:
        """Rows of tokens, each with a line end behind it where the model has one."""
        check_count("tokens of an image", rows * columns, MOST_TOKENS)
        if line_end is None:
            return cls(rows * columns, tail=tail)
        ends = range(columns - 1, rows * columns - 1, columns)
        return cls(rows * columns, dict.fromkeys(ends, (line_end,)), tail=(line_end, *tail))

    def place(self, tokens: Ints) -> Ints:
        """Places in the sequence of tokens by their number, also past the last one."""
        return self._places[tokens.clip(max=self.num_tokens)] + (tokens - self.num_tokens).clip(0)

    def places_before(self, num: int) -> int:
        """Things that are settled once the first `num` tokens are: these, and what hangs on them."""
        return int(self._places[num])

    def tokens_before(self, places: Ints) -> Ints:
        """Tokens that stand before each of some places, which are places of tokens."""
        return np.searchsorted(self._places, places)

    def expand(self, tokens: Ints) -> Expansion | None:
        """Candidates with what hangs on them; None where nothing does.

        Args:
            tokens: [b, T], numbers of the tokens that the candidates would be.
        """
        if not self.has_forced:
            return None
        known = tokens.clip(max=self.num_tokens)
        widths = 1 + self._counts[known]
        if (widths == 1).all():
            return None
        ends = widths.cumsum(1)
        steps = np.arange(ends[:, -1].max())
        own = (steps[:, None] >= ends[:, None]).sum(2).clip(max=tokens.shape[1] - 1)
        begin = ends - widths
        within = steps - np.take_along_axis(begin, own, 1)
        owner = np.take_along_axis(known, own, 1)
        # A dummy repeats the last candidate.
        is_forced = (within > 0) & (within <= self._counts[owner])
        forced = self._ids[owner, (within - 1).clip(0, self._ids.shape[1] - 1)]
        places = self.place(np.take_along_axis(tokens, own, 1)) + within
        return Expansion(own, np.where(is_forced, forced, -1), begin, ends - 1, places)

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        """How many ids hang on each token, which, and where tokens stand: [N + 1], [N + 1, W], [N + 1]."""
        if device not in self._tables:
            parts = (self._counts, self._ids, self._places)
            self._tables[device] = tuple(torch.from_numpy(part).to(device) for part in parts)
        return self._tables[device]

    def widest(self, num: int, tree: Topology | None = None) -> int:
        """Things that are fed at most for `num` candidates: a chain, or a tree of them."""
        if tree is not None and tree.listed is None:
            # Rows have trees of their own: all may stand where something hangs on them.
            return num * (1 + self._most)
        parents = tuple(range(-1, num - 1)) if tree is None else tree.listed
        if parents not in self._widest:
            depths: list[int] = []
            for parent in parents or ():
                depths.append(depths[parent] + 1 if parent >= 0 else 0)
            begins = np.arange(self.num_tokens)
            hanging = sum(
                self._counts[(begins + depth).clip(max=self.num_tokens)] for depth in depths
            )
            self._widest[parents] = num + int(np.max(hanging))
        return self._widest[parents]

    def fixed(self, lengths: Tensor, num: int, tree: Topology | None = None) -> Fixed:
        """Candidates behind the first `lengths` [B] tokens with what hangs on them, in fixed shapes.

        Args:
            lengths: which only the device knows.
            num: candidates T; those past the last token have nothing that hangs on them.
            tree: of the candidates; None for a chain.
        """
        steps = torch.arange(num, device=lengths.device)
        numbers = lengths[:, None] + (steps if tree is None else tree.depths)
        if not self.has_forced:
            every = steps.expand_as(numbers)
            return Fixed(every, None, numbers, every, every)
        counts, ids, places = self._on(lengths.device)
        known = numbers.clamp(max=self.num_tokens)
        widths = 1 + counts[known]
        ends = widths.cumsum(1)
        order = torch.arange(self.widest(num, tree), device=lengths.device)
        own = (order[:, None] >= ends[:, None]).sum(2).clamp(max=num - 1)
        within = order - (ends - widths).gather(1, own)
        owner = known.gather(1, own)
        is_forced = (within > 0) & (within <= counts[owner])
        forced = torch.where(is_forced, ids[owner, (within - 1).clamp(0, ids.shape[1] - 1)], -1)
        past = (numbers - self.num_tokens).clamp(min=0).gather(1, own)
        return Fixed(own, forced, places[owner] + past + within, ends - widths, ends - 1)

    def begins(self, lengths: Tensor) -> Tensor:
        """Where the things behind the first `lengths` tokens begin, also past the last one."""
        if not self.has_forced:
            return lengths
        places = self._on(lengths.device)[2]
        known = lengths.clamp(max=self.num_tokens)
        return places[known] + lengths - known

    def owners(self) -> tuple[Ints, Ints]:
        """[M] the token that each thing of the sequence is or hangs on, and [M] how far behind."""
        owner = np.repeat(np.arange(self.num_tokens), 1 + self._counts[:-1])
        return owner, np.arange(self.num_places) - self._places[owner]

    def sequence(self, ids: Tensor) -> Tensor:
        """Drawn ids [B, N] with the forced ones and the tail, as the network's own generate gives."""
        owner, within = self.owners()
        forced = self._ids[owner, (within - 1).clip(0)]
        is_forced = torch.from_numpy(within > 0).to(ids.device)
        whole = torch.where(
            is_forced, torch.from_numpy(forced).to(ids.device), ids[:, torch.from_numpy(owner)]
        )
        tail = ids.new_tensor(self.tail).expand(len(ids), -1)
        return torch.cat([whole, tail], dim=1)
