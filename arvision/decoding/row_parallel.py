"""Several rows of the image at once: row r + 1 starts before row r is finished.

A row that is being drawn is a chain of its own: its last known token, and behind that, drafts. All
rows of all images share one pass. Candidates look at what is final in any row above and left of
them, and at the drafts of their own row (the row-causal mask); what is final further down is
invisible, as in raster order. Keys and values stand at absolute positions, so what a rejected draft
left behind is not looked at until it is written again.

The first token of a row is predicted by the last one of the row above. Where that is not known
yet, the latest known token of that row stands in for it, at its place; the real one is fed, and its
keys and values replaced, as soon as it is known.

With an adaptive lead the first token of a row is a guess at first. It is asked for again with every
further token of the row above, and judged by rejection sampling: law p_k saw k tokens above, the next
one k + 1. The row goes on when the guess stands, or when the row above is whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..contracts import Conditions, DropsRows, FeedsAnywhere, Samples, TokenModel
from ..errors import InputError
from .noise import Noise, draw
from .run import Run
from .verify import gumbel_draw, num_final


def decode_rows(
    model: TokenModel,
    conditions: Conditions,
    run: Run,
    *,
    lead: int,
    window: int,
    shape: Callable[[Tensor], Tensor],
    adapts: bool = False,
) -> Samples:
    """Draw one image per condition, several rows at a time.

    Tokens are drawn with the Gumbel noise of their position, so with a `lead` of a whole row or
    more (one row at a time) they are those of plain sampling.

    Args:
        model: a token model with a grid, whose state has `extend_at`.
        conditions: one per image.
        run: the ledger; tokens that are not drawn because `on_step` stopped the run stay 0.
        lead: tokens of a row that must be final before the next one starts; the first row is
            always finished before the second starts.
        window: candidates per row and pass, the last known token included; 1 drafts nothing.
        shape: guided logits to log-probabilities.
        adapts: whether `lead` is where a row's first token is guessed, and more are needed until it
            stands; without drafts (`window` 1) only.

    Returns:
        Tokens [B, N] and the statistics of `arvision.decoding.loop.decode_tokens`; `windows` are
        the candidates per image of each pass, all rows together.

    Raises:
        InputError: a state without `extend_at`, or a law made of NaN or infinity.
    """
    assert model.grid is not None
    state, logits = model.start(conditions, run.guidance_scale)
    if not isinstance(state, FeedsAnywhere):
        raise InputError(
            f"{type(model).__name__} cannot be fed rows in parallel: its state has no `extend_at` "
            "(see arvision.contracts.FeedsAnywhere)"
        )
    run.begin(logits.device)
    run.noise.reserve([0] * run.batch, run.num_tokens)
    known = _Rows(run.noise, model.grid, lead, window, logits.device)
    known.first = _FirstTokens(known.counts, model.grid[1], logits) if adapts else None
    active = torch.arange(run.batch, device=logits.device)
    laws = shape(logits)
    run.watch_laws(laws)
    known.begin(laws)
    run.record(active[:, None], torch.zeros_like(active)[:, None], known.tokens[:, :1])
    run.report(known.num_final())
    going = known.num_final() < run.num_tokens
    candidates, windows = 0, []
    while run.check(going) and not run.stopped:
        if isinstance(state, DropsRows) and len(going) > int(going.sum()):
            keep = going.nonzero()[:, 0]
            known.select(keep)
            active = active[keep]
            state.select(keep)
        plan = known.plan()
        before = known.num_final()
        is_at_work = before < run.num_tokens
        run.next_pass(active[is_at_work])
        laws = shape(state.extend_at(plan.tokens, plan.positions, plan.visible))
        run.watch_laws(laws)
        images, positions = known.settle(plan, laws)
        run.record(active[images], positions, known.tokens[images, positions])
        candidates += int((plan.positions >= 0).sum())
        windows.append(plan.tokens.shape[1])
        after = known.num_final()
        run.report((after - before)[is_at_work], active[is_at_work])
        going = after < run.num_tokens
    return run.samples(candidates=candidates, windows=windows)


def check_row_parallel(model: TokenModel, sampler: str) -> tuple[int, int]:
    """The grid of a model whose image rows can be told apart.

    Raises:
        InputError: the model has no grid.
    """
    if model.grid is None:
        raise InputError(
            f"sampler {sampler!r} draws rows of an image in parallel, and this model has no grid"
        )
    return model.grid


def check_lead(local_window: object) -> None:
    """Refuse a local window that is neither None nor a positive integer.

    Raises:
        InputError: see above.
    """
    if local_window is None:
        return
    if not isinstance(local_window, int) or isinstance(local_window, bool) or local_window < 1:
        raise InputError(f"local_window {local_window!r}: expected an integer >= 1, or None")


def lead_of(columns: int) -> int:
    """Tokens of a row that must be known before the next one starts, where nobody chose.

    The published default of 8, or half the row where a row is shorter than 16.
    """
    return min(8, -(-columns // 2))


@dataclass
class _Pass:
    """One pass: K chains of up to W candidates, packed into T places of each of B images."""

    images: Tensor  # [K], whose chain it is
    rows: Tensor  # [K]
    nums: Tensor  # [K], candidates of each chain
    drafts: Tensor  # [K, W - 1], behind the roots
    tokens: Tensor  # [B, T]
    positions: Tensor  # [B, T], -1 for padding
    visible: Tensor  # [B, T, N]
    places: Tensor  # [K, W], where in T each candidate stands


class _Rows:
    """What is known of the active images, row by row.

    Args:
        noise: of the B images.
        grid: rows G and columns of the image.
        lead: tokens of a row that must be final before the next one starts.
        window: candidates per row and pass, the root included.
        device: of all tensors.
    """

    def __init__(
        self, noise: Noise, grid: tuple[int, int], lead: int, window: int, device: torch.device
    ) -> None:
        self.noise, self.lead = noise, lead
        self.num_rows, self.columns = grid
        self.window = min(window, self.columns)
        batch, num = len(noise), grid[0] * grid[1]
        self.tokens = torch.zeros(batch, num, dtype=torch.int64, device=device)
        self.counts = torch.zeros(batch, self.num_rows, dtype=torch.int64, device=device)
        # Positions whose keys and values are in place, and those fed with a stand-in.
        self.written = torch.zeros(batch, num, dtype=torch.bool, device=device)
        self.stands_in = torch.zeros(batch, self.num_rows, dtype=torch.bool, device=device)
        self.guesses = torch.zeros(batch, num, dtype=torch.int64, device=device)
        self.has_guess = torch.zeros(batch, num, dtype=torch.bool, device=device)
        self.first: _FirstTokens | None = None

    def begin(self, logp: Tensor) -> None:
        """Draw the first token of every image from its law [B, V]."""
        positions = torch.zeros_like(self.counts[:, :1])
        self.tokens[:, :1] = gumbel_draw(logp[:, None], positions, self.noise)
        self.counts[:, 0] = 1

    def num_final(self) -> Tensor:
        """[B] final tokens."""
        return self.counts.sum(1)

    def select(self, images: Tensor) -> None:
        """Keep the given images [B'], the others are finished."""
        self.noise = self.noise.select(images)
        for name in ("tokens", "counts", "written", "stands_in", "guesses", "has_guess"):
            setattr(self, name, getattr(self, name)[images])
        if self.first is not None:
            self.first = self.first.select(images)

    def is_going(self) -> Tensor:
        """[B, G] bool, rows that may draw tokens now; the first row is drawn alone."""
        need = torch.full_like(self.counts[:, :-1], min(self.lead, self.columns))
        need[:, :1] = self.columns
        is_ready = torch.ones_like(self.counts, dtype=torch.bool)
        is_ready[:, 1:] = self.counts[:, :-1] >= need
        return is_ready & (self.counts < self.columns)

    def roots(self) -> Tensor:
        """[B, G] last known token of each row; before a row has any, that of the row above."""
        first = torch.arange(self.num_rows, device=self.counts.device) * self.columns
        last = first + self.counts - 1
        last = torch.where(self.counts == 0, last.roll(1, dims=1), last)
        return self.tokens.gather(1, last)

    def plan(self) -> _Pass:
        """The candidates of the next pass."""
        images, rows = self.is_going().nonzero(as_tuple=True)
        counts = self.counts[images, rows]
        offsets = torch.arange(self.window, device=counts.device)
        slots = (rows * self.columns + counts - 1)[:, None] + offsets
        inside = (images[:, None], slots.clamp(max=self.tokens.shape[1] - 1))
        # A chain ends with its row, or before the first position that nobody has guessed yet.
        is_fed = (offsets == 0) | self.has_guess[inside]
        is_fed = is_fed.long().cumprod(dim=1).bool() & (counts[:, None] + offsets < self.columns)
        fed = self.guesses[inside]
        fed[:, 0] = self.roots()[images, rows]
        # Rows that have just been completed replace what stood in for their last token.
        is_whole = self.counts.roll(1, dims=1) == self.columns
        # Those that have no token yet feed it as their root.
        again, again_rows = (self.stands_in & is_whole & (self.counts > 0)).nonzero(as_tuple=True)
        again_slots = again_rows * self.columns - 1
        self.stands_in &= ~is_whole
        self.stands_in[images, rows] |= (counts == 0) & ~is_whole[images, rows]
        wide = images[:, None].expand_as(slots)
        entries = torch.stack(
            [
                torch.cat([wide[is_fed], again]),
                torch.cat([fed[is_fed], self.tokens[again, again_slots]]),
                torch.cat([slots[is_fed], again_slots]),
                torch.cat([slots[:, :1].expand_as(slots)[is_fed], again_slots]),
            ]
        )
        (tokens, positions, starts), place = _pack(entries, len(self.tokens))
        places = torch.zeros_like(slots)
        places[is_fed] = place[: len(place) - len(again)]
        final = self.written.clone()
        final[images, slots[:, 0]] = True
        final[again, again_slots] = True
        every = torch.arange(final.shape[1], device=final.device)
        is_own = every >= starts[..., None]
        visible = (every <= positions[..., None]) & (final[:, None] | is_own)
        self.written[again, again_slots] = True
        return _Pass(images, rows, is_fed.sum(1), fed[:, 1:], tokens, positions, visible, places)

    def settle(self, plan: _Pass, laws: Tensor) -> tuple[Tensor, Tensor]:
        """Verify the drafts, write down what is final, and guess what follows.

        Args:
            plan: the pass.
            laws: [B, T, V] log-probabilities.

        Returns:
            Images and positions of the tokens that became final, two [M].
        """
        images, rows = plan.images, plan.rows
        offsets = torch.arange(self.window, device=laws.device)
        begin = rows * self.columns + self.counts[images, rows]
        positions = begin[:, None] + offsets
        is_fed = offsets < plan.nums[:, None]
        wide = images[:, None].expand_as(positions)
        drawn = torch.zeros_like(positions)
        drawn[is_fed] = self._draw(
            laws[wide[is_fed], plan.places[is_fed]], wide[is_fed], positions[is_fed]
        )
        accepted = torch.minimum(num_final(plan.drafts == drawn[:, :-1]), plan.nums)
        if self.first is not None:
            places = (images, rows, laws[images, plan.places[:, 0]])
            drawn[:, 0], stands = self.first.judge(*places, drawn[:, 0], self.counts, self.noise)
            accepted = accepted * stands
        is_final = offsets < accepted[:, None]
        where = (wide[is_final], positions[is_final])
        self.tokens[where] = drawn[is_final]
        self.counts[images, rows] += accepted
        # The root and the accepted drafts stand in the cache; the last final token does not.
        self.written[where[0], where[1] - 1] = True
        if self.window > 1:
            ends = plan.places.gather(1, plan.nums[:, None] - 1)[:, 0]
            self._guess(plan, drawn, positions, laws[images, ends])
        return where

    def _draw(self, laws: Tensor, images: Tensor, positions: Tensor) -> Tensor:
        """Tokens [M] of images [M] at positions [M] under laws [M, V], by the noise of these alone."""
        noise = self.noise.select(images)
        return gumbel_draw(laws[:, None], positions[:, None], noise)[:, 0]

    def _guess(self, plan: _Pass, drawn: Tensor, positions: Tensor, prior: Tensor) -> None:
        """Drafts of the next pass: what was drawn here, and draws from the chain's last law.

        Args:
            plan: the pass.
            drawn: [K, W] tokens drawn at `positions` [K, W].
            positions: the first one is the first that was not final before the pass.
            prior: [K, V], law of each chain's last candidate.
        """
        images, rows, width = plan.images, plan.rows, self.window
        offsets = torch.arange(width, device=drawn.device)
        was_drawn = offsets < plan.nums[:, None]
        wide = images[:, None].expand_as(positions)
        self.guesses[wide[was_drawn], positions[was_drawn]] = drawn[was_drawn]
        self.has_guess[wide[was_drawn], positions[was_drawn]] = True
        # The next window reaches as far as the row does.
        first = torch.arange(self.num_rows, device=drawn.device) * self.columns
        ahead = (first + self.counts)[..., None] + offsets[: width - 1]
        exists = ahead < (first + self.columns)[:, None]
        ahead = ahead.clamp(max=self.tokens.shape[1] - 1)
        ahead, exists = ahead[images, rows], exists[images, rows]
        wide = wide[:, : width - 1]
        chain, place = (exists & ~self.has_guess[wide, ahead]).nonzero(as_tuple=True)
        where = (images[chain], ahead[chain, place])
        self.guesses[where] = self._draw(prior[chain], *where)
        self.has_guess[where] = True


class _FirstTokens:
    """Guesses of the first token of each row, with an adaptive lead.

    Args:
        counts: [B, G], gives the sizes.
        columns: of the image.
        logits: [B, V], gives the vocabulary.
    """

    def __init__(self, counts: Tensor, columns: int, logits: Tensor) -> None:
        self.columns = columns
        self.tokens = torch.full_like(counts, -1)
        self.logp = logits.new_zeros(*counts.shape, logits.shape[-1])

    def select(self, images: Tensor) -> _FirstTokens:
        """Keep the given images."""
        self.tokens, self.logp = self.tokens[images], self.logp[images]
        return self

    def judge(
        self,
        images: Tensor,
        rows: Tensor,
        logp: Tensor,
        drawn: Tensor,
        counts: Tensor,
        noise: Noise,
    ) -> tuple[Tensor, Tensor]:
        """Tokens [K] of the places that a pass asked for, and which of them are final.

        Args:
            images: [K], whose place it is.
            rows: [K].
            logp: [K, V], its law.
            drawn: [K], a draw from it.
            counts: [B, G], final tokens before the pass; only first places are judged.
            noise: of the B images.
        """
        is_first = (counts[images, rows] == 0) & (rows > 0)
        above = counts[images, rows - 1]
        guess = self.tokens[images, rows]
        was_guessed = is_first & (guess >= 0)
        before, own = self.logp[images, rows], noise.select(images)
        place = (rows * self.columns)[:, None]
        tried, fresh = (
            own.uniform(place, purpose, above[:, None])[:, 0] for purpose in ("accept", "recover")
        )
        chosen = guess.clamp(min=0)[:, None]
        ratio = (logp - before).gather(1, chosen)[:, 0]
        stands = was_guessed & (tried.log() < ratio)
        residual = (logp.exp() - before.exp()).clamp(min=0)
        again = draw(residual, fresh)
        tokens = torch.where(was_guessed, torch.where(stands, guess, again), drawn)
        is_final = ~is_first | stands | (above == self.columns)
        self.tokens[images[is_first], rows[is_first]] = tokens[is_first]
        self.logp[images[is_first], rows[is_first]] = logp[is_first]
        return tokens, is_final


def _pack(entries: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Lay M entries out by image.

    Args:
        entries: [1 + C, M] int64, the first row says whose entry it is.
        batch: B.

    Returns:
        The other rows as [C, B, T], -1 where an image has fewer entries than others (0 in the first
        of them, tokens), and the place [M] of each entry in its image.
    """
    images = entries[0]
    order = images.argsort(stable=True)
    num = torch.bincount(images, minlength=batch)
    place = torch.empty_like(order)
    place[order] = (
        torch.arange(len(order), device=order.device) - (num.cumsum(0) - num)[images[order]]
    )
    packed = entries.new_full((len(entries) - 1, batch, int(num.max())), -1)
    packed[0] = 0
    packed[:, images, place] = entries[1:]
    return packed, place
