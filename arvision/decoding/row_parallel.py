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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..contracts import Conditions, DropsRows, FeedsAnywhere, Samples, TokenModel
from ..errors import InputError
from .logits import Laws, laws_of, leave_guidance, written
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
    leave_guidance(state, logits)
    run.begin(logits.device)
    run.warn_of_loop("which rows take part in a pass, and where, is decided on the host")
    run.noise.reserve([0] * run.batch, run.num_tokens)
    known = _Rows(run.noise, model.grid, lead, window, logits.device)
    active = np.arange(run.batch)
    laws = laws_of(shape, logits)[:, None]
    if adapts:
        known.first = _FirstTokens(known.to_device(known.counts), known.columns, logits)
    known.begin(laws)
    run.watch_laws(laws)
    run.read()
    every = known.images
    run.record(every[:, None], torch.zeros_like(every)[:, None], known.tokens[:, :1])
    run.report(torch.ones_like(every), given=known.num_final().tolist())
    candidates, windows = 0, []
    while (known.num_final() < run.num_tokens).any() and not run.stopped:
        going = np.flatnonzero(known.num_final() < run.num_tokens)
        if isinstance(state, DropsRows) and len(going) < len(active):
            active = active[going]
            state.select(known.select(going))
            going = np.arange(len(active))
        plan = known.plan()
        before = known.num_final()
        at_work = known.to_device(active[going])
        run.next_pass(at_work)
        fed = known.feed(plan)
        laws = laws_of(
            shape, state.extend_at(fed, torch.from_numpy(plan.positions), known.visible(plan))
        )
        images, positions, new = known.settle(plan, laws, run)
        run.record(known.to_device(active[images]), known.to_device(positions), new)
        candidates += int((plan.positions >= 0).sum())
        windows.append(plan.positions.shape[1])
        counts = (known.num_final() - before)[going]
        run.report(known.to_device(counts), at_work, counts.tolist())
    return run.samples(candidates=candidates, windows=windows, step="loop")


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
    """One pass: K chains of up to W candidates, packed into T places of each of B images.

    All of it is planned on the host, which knows how far every row is.
    """

    images: np.ndarray  # [K], whose chain it is
    rows: np.ndarray  # [K]
    is_fed: np.ndarray  # [K, W], candidates of each chain
    sources: np.ndarray  # [2, B, T], where the tokens stand: 0 for final ones, 1 for guesses; place
    positions: np.ndarray  # [B, T], -1 for padding
    starts: np.ndarray  # [B, T], first position of the own chain
    final: np.ndarray  # [B, N], positions that count besides the own chain
    places: np.ndarray  # [K, W], where in T each candidate stands


class _Rows:
    """What is known of the active images, row by row: counts on the host, tokens on the device.

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
        self.noise, self.lead, self._device = noise, lead, device
        self.num_rows, self.columns = grid
        self.window = min(window, self.columns)
        batch, num = len(noise), grid[0] * grid[1]
        # Final tokens, and guesses.
        self._known = torch.zeros(2, batch, num, dtype=torch.int64, device=device)
        self.counts = np.zeros((batch, self.num_rows), dtype=np.int64)
        # Positions whose keys and values are in place, and rows that were fed with a stand-in.
        self.written = np.zeros((batch, num), dtype=bool)
        self.stands_in = np.zeros((batch, self.num_rows), dtype=bool)
        self.has_guess = np.zeros((batch, num), dtype=bool)
        self.first: _FirstTokens | None = None

    @property
    def tokens(self) -> Tensor:
        """[B, N], 0 where nothing is final."""
        return self._known[0]

    @property
    def images(self) -> Tensor:
        """[B], 0, 1, 2, ..."""
        return torch.arange(len(self.counts), device=self._device)

    def to_device(self, numbers: np.ndarray) -> Tensor:
        """Numbers of the host where the tokens are."""
        return torch.from_numpy(np.ascontiguousarray(numbers)).to(self._device)

    def begin(self, laws: Tensor | Laws) -> None:
        """Draw the first token of every image from its law [B, 1, V]."""
        self.noise.reserve([0] * len(self.counts), self.num_rows * self.columns)
        positions = torch.zeros_like(self.images)[:, None]
        self._known[0, :, :1] = gumbel_draw(laws, positions, self.noise)
        self.counts[:, 0] = 1

    def num_final(self) -> np.ndarray:
        """[B] final tokens."""
        return self.counts.sum(1)

    def select(self, images: np.ndarray) -> Tensor:
        """Keep the given images [B'], the others are finished; they, on the device."""
        keep = self.to_device(images)
        self.noise = self.noise.select(keep)
        self._known = self._known[:, keep]
        for name in ("counts", "written", "stands_in", "has_guess"):
            setattr(self, name, getattr(self, name)[images])
        if self.first is not None:
            self.first = self.first.select(keep)
        return keep

    def is_going(self) -> np.ndarray:
        """[B, G] bool, rows that may draw tokens now; the first row is drawn alone."""
        need = np.full_like(self.counts[:, :-1], min(self.lead, self.columns))
        need[:, :1] = self.columns
        is_ready = np.ones(self.counts.shape, dtype=bool)
        is_ready[:, 1:] = self.counts[:, :-1] >= need
        return is_ready & (self.counts < self.columns)

    def roots(self) -> np.ndarray:
        """[B, G] place of the last known token of each row; before it has any, of the row above."""
        last = np.arange(self.num_rows) * self.columns + self.counts - 1
        return np.where(self.counts == 0, np.roll(last, 1, axis=1), last)

    def plan(self) -> _Pass:
        """The candidates of the next pass."""
        images, rows = self.is_going().nonzero()
        counts = self.counts[images, rows]
        offsets = np.arange(self.window)
        slots = (rows * self.columns + counts - 1)[:, None] + offsets
        inside = slots.clip(max=self.written.shape[1] - 1)
        # A chain ends with its row, or before the first position that nobody has guessed yet.
        is_fed = (offsets == 0) | self.has_guess[images[:, None], inside]
        is_fed = np.logical_and.accumulate(is_fed, axis=1)
        is_fed &= counts[:, None] + offsets < self.columns
        places = np.where(offsets == 0, self.roots()[images, rows][:, None], inside)
        # Rows that have just been completed replace what stood in for their last token.
        is_whole = np.roll(self.counts, 1, axis=1) == self.columns
        # Those that have no token yet feed it as their root.
        again, again_rows = (self.stands_in & is_whole & (self.counts > 0)).nonzero()
        again_slots = again_rows * self.columns - 1
        self.stands_in &= ~is_whole
        self.stands_in[images, rows] |= (counts == 0) & ~is_whole[images, rows]
        guessed = np.broadcast_to(offsets > 0, slots.shape)
        starts = np.broadcast_to(slots[:, :1], slots.shape)
        owners = np.concatenate([np.broadcast_to(images[:, None], slots.shape)[is_fed], again])
        entries = np.stack(
            [
                np.concatenate([guessed[is_fed], np.zeros_like(again, dtype=bool)]).astype(int),
                np.concatenate([places[is_fed], again_slots]),
                np.concatenate([slots[is_fed], again_slots]),
                np.concatenate([starts[is_fed], again_slots]),
            ]
        )
        packed, place = _pack(owners, entries, len(self.counts))
        stands = np.zeros_like(slots)
        stands[is_fed] = place[: len(place) - len(again)]
        final = self.written.copy()
        final[images, slots[:, 0]] = True
        final[again, again_slots] = True
        self.written[again, again_slots] = True
        sources, positions, starts = packed[:2].clip(min=0), packed[2], packed[3]
        return _Pass(images, rows, is_fed, sources, positions, starts, final, stands)

    def feed(self, plan: _Pass) -> Tensor:
        """Tokens [B, T] of a pass; what padding holds does not matter."""
        kind, place = self.to_device(plan.sources)
        return self._known[kind, self.images[:, None], place]

    def visible(self, plan: _Pass) -> Tensor:
        """[B, T, N] bool, what the candidates of a pass look at."""
        ends = self.to_device(np.stack([plan.positions, plan.starts]))[..., None]
        every = torch.arange(plan.final.shape[1], device=self._device)
        return (every <= ends[0]) & (self.to_device(plan.final)[:, None] | (every >= ends[1]))

    def settle(self, plan: _Pass, laws: Any, run: Run) -> tuple[np.ndarray, np.ndarray, Tensor]:
        """Verify the drafts, write down what is final, and guess what follows.

        The one place where a pass waits for the device.

        Args:
            plan: the pass.
            laws: [B, T, V] log-probabilities, or `Laws`.
            run: the ledger.

        Returns:
            Images and positions of the tokens that became final, two [M], and these tokens.

        Raises:
            InputError: a law made of NaN or infinity.
        """
        images, rows = plan.images, plan.rows
        offsets = np.arange(self.window)
        positions = (rows * self.columns + self.counts[images, rows])[:, None] + offsets
        chain, candidate = plan.is_fed.nonzero()
        where = np.stack(
            [images[chain], plan.places[chain, candidate], positions[chain, candidate]]
        )
        whose, place, position = self.to_device(where)
        at, number = self.to_device(np.stack([chain, candidate]))
        drawn = self._known.new_zeros(len(images), self.window)
        asked = laws[whose, place][:, None]
        drawn[at, number] = self._draw(asked, whose, position)
        run.watch_laws(asked)
        whose, row, root, nums = self.to_device(
            np.stack([images, rows, plan.places[:, 0], plan.is_fed.sum(1)])
        )
        drafts = self._known[1, whose[:, None], self.to_device(self._drafted(positions))]
        accepted = torch.minimum(num_final(drafts == drawn[:, :-1]), nums)
        if self.first is not None:
            counts = self.to_device(self.counts)
            drawn[:, 0], stands = self.first.judge(
                whose, row, written(laws[whose, root]), drawn[:, 0], counts, self.noise
            )
            accepted = accepted * stands
        (found,) = run.read(accepted)
        is_final = offsets < np.array(found)[:, None]
        chain, candidate = is_final.nonzero()
        final = images[chain], positions[chain, candidate]
        whose, place, at, number = self.to_device(np.stack([*final, chain, candidate]))
        new = drawn[at, number]
        self._known[0, whose, place] = new
        self.counts[images, rows] += found
        # The root and the accepted drafts stand in the cache; the last final token does not.
        self.written[final[0], final[1] - 1] = True
        if self.window > 1:
            self._guess(plan, drawn, positions, laws)
        return *final, new

    def _drafted(self, positions: np.ndarray) -> np.ndarray:
        """[K, W - 1], where the drafts of the chains with laws at `positions` [K, W] stand."""
        return positions[:, :-1].clip(max=self.written.shape[1] - 1)

    def _draw(self, laws: Tensor | Laws, images: Tensor, positions: Tensor) -> Tensor:
        """Tokens [M] of images [M] at positions [M] under laws [M, 1, V], by the noise of these alone."""
        noise = self.noise.select(images)
        return gumbel_draw(laws, positions[:, None], noise)[:, 0]

    def _guess(self, plan: _Pass, drawn: Tensor, positions: np.ndarray, laws: Any) -> None:
        """Drafts of the next pass: what was drawn here, and draws from the chain's last law.

        Args:
            plan: the pass.
            drawn: [K, W] tokens drawn at `positions` [K, W].
            positions: the first one is the first that was not final before the pass.
            laws: [B, T, V] of the pass.
        """
        images, rows, width = plan.images, plan.rows, self.window
        chain, candidate = plan.is_fed.nonzero()
        now = images[chain], positions[chain, candidate]
        whose, place, at, number = self.to_device(np.stack([*now, chain, candidate]))
        self._known[1, whose, place] = drawn[at, number]
        self.has_guess[now] = True
        # The next window reaches as far as the row does.
        begin = rows * self.columns
        ahead = (begin + self.counts[images, rows])[:, None] + np.arange(width - 1)
        exists = ahead < (begin + self.columns)[:, None]
        ahead = ahead.clip(max=self.written.shape[1] - 1)
        chain, number = (exists & ~self.has_guess[images[:, None], ahead]).nonzero()
        if len(chain) == 0:
            return
        new = images[chain], ahead[chain, number]
        ends = plan.places[chain, plan.is_fed.sum(1)[chain] - 1]
        whose, place, end = self.to_device(np.stack([*new, ends]))
        self._known[1, whose, place] = self._draw(laws[whose, end][:, None], whose, place)
        self.has_guess[new] = True


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
        self.tokens[images, rows] = torch.where(is_first, tokens, guess)
        self.logp[images, rows] = torch.where(is_first[:, None], logp, before)
        return tokens, is_final


def _pack(images: np.ndarray, entries: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Lay M entries out by image.

    Args:
        images: [M], whose entry it is.
        entries: [C, M].
        batch: B.

    Returns:
        [C, B, T], -1 where an image has fewer entries than others, and the place [M] of each entry
        in its image.
    """
    order = images.argsort(kind="stable")
    num = np.bincount(images, minlength=batch)
    place = np.empty_like(order)
    place[order] = np.arange(len(order)) - (num.cumsum() - num)[images[order]]
    packed = np.full((len(entries), batch, num.max()), -1)
    packed[:, images, place] = entries
    return packed, place
