"""The Jacobi drafter: the last pass's guesses for what follows are the next pass's drafts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..contracts import Conditions
from ..errors import InputError, unknown_name
from .first_laws import FirstLaws, LawMemory
from .noise import Noise, draw
from .tree import TokenTree
from .verify import Round, Verdict

INITS = {
    "random": "a uniformly random token",
    "prior": "a draw from the last law that the model gave",
    "repeat_left": "the token to the left (the one before)",
    "repeat_above": "the token above",
    "neighbour_mix": "half the last law, a quarter each the tokens to the left and above",
    "above": "a draw from the newest law of the position above",
    "memory": "the same, averaged with the laws of the position in the images drawn before",
}
SPATIAL = ("repeat_left", "repeat_above", "neighbour_mix")
NEEDS_GRID = ("repeat_above", "neighbour_mix", "above", "memory")
FROM_LAWS = ("prior", "above", "memory")
"""Those that say a law and no more, as trees need it."""


def check_init(init: str, grid: tuple[int, int] | None, *, remembers: bool = False) -> None:
    """Refuse an unknown way to start new positions, or one that needs what is not there.

    Args:
        init: a name in `INITS`.
        grid: of the images.
        remembers: whether the sampler keeps a memory of earlier images.

    Raises:
        InputError: see above.
    """
    if init not in INITS:
        raise unknown_name("init", init, INITS)
    if init == "memory" and not remembers:
        free = [name for name in INITS if name != "memory"]
        raise InputError(
            f'init "memory" is for sampler "sjd" under coupling "gumbel": expected one of '
            f"{', '.join(free)}"
        )
    if init in NEEDS_GRID and grid is None:
        free = [name for name in INITS if name not in NEEDS_GRID]
        raise InputError(
            f"init {init!r} looks at the image grid, and this model has none: expected one of "
            f"{', '.join(free)}"
        )


def first_laws(init: str, grid: tuple[int, int] | None, memory: LawMemory | None) -> FirstLaws:
    """The first laws of an init in `FROM_LAWS`; `memory` for the one that has it."""
    columns = grid[1] if grid is not None and init != "prior" else None
    return FirstLaws(columns, memory if init == "memory" else None)


class JacobiDrafter:
    """Drafts are what the last pass put behind its final tokens; new positions are initialised.

    Each draft carries the law that it was drawn from, so that any coupling of the laws of two
    successive passes can verify it.

    Args:
        init: how a position that enters the window gets its first draft, see `INITS`.
        grid: rows and columns of the image, for the spatial choices.
        share_noise: draw first drafts with the position's own Gumbel noise. Only right under
            Gumbel coupling, where it makes the first draft agree with the final token more often.
        keeps_laws: whether the rule looks at the drafts' laws; without them no law is stored.
        memory: of earlier images, for init "memory".
    """

    renewed = ("_drafts", "_laws", "_prior", "_num_held", "_least_held")

    def __init__(
        self,
        init: str,
        grid: tuple[int, int] | None,
        *,
        share_noise: bool = False,
        keeps_laws: bool = True,
        memory: LawMemory | None = None,
    ) -> None:
        check_init(init, grid, remembers=memory is not None)
        looks_up = init in FROM_LAWS and init != "prior"
        self._first_laws = first_laws(init, grid, memory) if looks_up else None
        self._init = init
        self._columns = grid[1] if grid is not None else 1
        self._share_noise, self._keeps_laws = share_noise, keeps_laws

    has_fixed_shapes = repeats_laws = True

    def fix(self, num: int) -> None:
        """Nothing that is kept depends on the number of candidates."""

    def carry(self) -> list[Tensor]:
        """What is known of the laws of places; see `arvision.decoding.drafter.Carries`."""
        return [] if self._first_laws is None else self._first_laws.carry()

    def restore(self, carried: list[Tensor]) -> None:
        """Go on from what a pass left."""
        if self._first_laws is not None:
            self._first_laws.restore(carried)

    def start(self, noise: Noise, vocab_size: int, num_tokens: int) -> None:
        """Forget everything of an earlier batch."""
        self._noise, self._vocab_size = noise, vocab_size
        self._drafts: Tensor | None = None
        self._laws: Tensor | None = None
        self._prior: Tensor | None = None
        self._num_held = torch.zeros(len(noise), dtype=torch.int64, device=noise.device)
        self._least_held = 0

    def attach(self, state: object, conditions: Conditions) -> None:
        """See `arvision.decoding.loop.Attached`."""
        if self._first_laws is not None:
            self._first_laws.start(len(self._noise), self._vocab_size, conditions)

    def propose(self, tokens: Tensor, lengths: Tensor, num: int, round_number: int) -> TokenTree:
        """See `arvision.decoding.loop.Drafter`."""
        batch, device = len(tokens), tokens.device
        drafts = torch.zeros(batch, num, dtype=torch.int64, device=device)
        laws = None
        if self._keeps_laws:
            assert self._prior is not None
            laws = self._prior.new_zeros(batch, num, self._vocab_size)
        held = self._num_held.clamp(max=num)
        if self._drafts is not None:
            width = min(num, self._drafts.shape[1])
            drafts[:, :width] = self._drafts[:, :width]
            if laws is not None and self._laws is not None:
                laws[:, :width] = self._laws[:, :width]
        first = min(self._least_held, num) if batch else num
        # A spatial choice may look at the draft just made to its left: one position at a time.
        stride = 1 if self._init in SPATIAL else max(1, num)
        for place in range(first, num, stride):
            places = torch.arange(place, min(place + stride, num), device=device)
            if self._first_laws is None:
                law = self._first_law(tokens, drafts, lengths, place)[:, None]
            else:
                law = self._first_laws.at(lengths[:, None] + places)
            token = self._first_drafts(law, lengths, places, round_number)
            is_new = places >= held[:, None]
            drafts[:, places] = torch.where(is_new, token, drafts[:, places])
            if laws is not None:
                laws[:, places] = torch.where(is_new[..., None], law, laws[:, places])
        return TokenTree(drafts, laws)

    def _first_drafts(
        self, law: Tensor, lengths: Tensor, places: Tensor, round_number: int
    ) -> Tensor:
        """First drafts [B, k] of positions `lengths + places`, drawn from laws [B, 1 or k, V]."""
        positions = lengths[:, None] + places
        if self._share_noise:
            return self._noise.best(law, positions)
        uniforms = self._noise.uniform(positions, "init", round_number)
        return draw(law.exp().expand(-1, len(places), -1), uniforms)

    def _first_law(self, tokens: Tensor, drafts: Tensor, lengths: Tensor, place: int) -> Tensor:
        """Law [B, V] of first drafts; for spatial choices that of the one at `lengths + place`."""
        assert self._prior is not None
        if self._init == "prior":
            return self._prior
        if self._init == "random":
            return torch.full_like(self._prior, -math.log(self._vocab_size))
        left = self._point(tokens, drafts, lengths, place, 1)
        if self._init == "repeat_left":
            return left.log()
        above = self._point(tokens, drafts, lengths, place, self._columns)
        if self._init == "repeat_above":
            return above.log()
        return (0.5 * self._prior.exp() + 0.25 * left + 0.25 * above).log()

    def _point(
        self, tokens: Tensor, drafts: Tensor, lengths: Tensor, place: int, back: int
    ) -> Tensor:
        """Point mass [B, V] on the token `back` positions earlier; uniform before the image."""
        source = lengths + place - back
        known = tokens.gather(1, source.clamp(0, tokens.shape[1] - 1)[:, None])[:, 0]
        guess = drafts[:, place - back] if place >= back else known
        token = torch.where(source < lengths, known, guess)
        assert self._prior is not None
        point = torch.zeros_like(self._prior)
        point.scatter_(1, token[:, None], 1.0)
        return torch.where((source < 0)[:, None], 1.0 / self._vocab_size, point)

    def observe(self, chain: Round, verdict: Verdict) -> None:
        """Keep what the pass put behind its final tokens."""
        num = verdict.tokens.shape[1]
        if self._first_laws is not None:
            offsets = torch.arange(num, device=verdict.counts.device).expand(len(chain.drafts), num)
            self._first_laws.observe(chain, verdict, offsets, num)
        counts = verdict.counts
        given = counts.tolist() if verdict.given is None else verdict.given
        if verdict.known is not None:
            given = [own + more for own, more in zip(given, verdict.known, strict=True)]
            counts = torch.tensor(given, device=counts.device)
        places = counts[:, None] + torch.arange(num - 1, device=counts.device)
        places = places.clamp(max=num - 1)
        self._drafts = verdict.tokens.gather(1, places)
        self._num_held = (num - counts).clamp(min=0)
        self._least_held = max(0, num - max(given, default=0))
        self._prior = chain.law(-1)
        if self._keeps_laws:
            index = places[..., None].expand(-1, -1, self._vocab_size)
            self._laws = chain.target_logp.gather(1, index)

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows`."""
        self._noise = self._noise.select(rows)
        if self._first_laws is not None:
            self._first_laws.select(rows)
        self._num_held = self._num_held[rows]
        if self._drafts is not None:
            self._drafts = self._drafts[rows]
        if self._laws is not None:
            self._laws = self._laws[rows]
        if self._prior is not None:
            self._prior = self._prior[rows]

    def join(self, other: JacobiDrafter) -> None:
        """Take in the rows of a drafter with the same options, behind the own ones."""
        if self._first_laws is not None and other._first_laws is not None:
            self._first_laws.join(other._first_laws)
        assert self._prior is not None
        assert other._prior is not None
        self._noise = self._noise.join(other._noise)
        self._num_held = torch.cat([self._num_held, other._num_held])
        self._least_held = min(self._least_held, other._least_held)
        self._prior = torch.cat([self._prior, other._prior])
        self._drafts = _stacked(self._drafts, other._drafts)
        self._laws = _stacked(self._laws, other._laws)


def _stacked(own: Tensor | None, others: Tensor | None) -> Tensor | None:
    """Rows [B, w, ...] of two groups, the narrower ones with zeros behind, as they hold no more."""
    if own is None or others is None:
        return None
    width = max(own.shape[1], others.shape[1])
    wide = own.new_zeros(len(own) + len(others), width, *own.shape[2:])
    wide[: len(own), : own.shape[1]] = own
    wide[len(own) :, : others.shape[1]] = others
    return wide
