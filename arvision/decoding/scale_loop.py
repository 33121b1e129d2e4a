"""The decoding loop of scale models: all tokens of one resolution per pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..contracts import (
    Conditions,
    CountsComputed,
    Prunes,
    Samples,
    ScaleModel,
    codebook_of,
    device_of,
)
from ..errors import InputError, check_count
from .logits import laws_of, written
from .noise import Noise
from .parts import fixed_part
from .run import Run
from .scale_state import NextScaleState
from .verify import gumbel_draw

Pick = Callable[[Tensor, Tensor, Noise], Tensor]
"""Log-probabilities [B, n, V] of tokens at flat positions [B, n], and noise, to tokens [B, n]; of
bits [B, n, d, 2] to [B, n, d]."""

Shape = Callable[[Tensor], Tensor]
"""Guided logits to log-probabilities, same shape."""


@dataclass(frozen=True, kw_only=True)
class ScalePlan:
    """How the scales are drawn where that is not one plain pass per scale.

    Attributes:
        prune: share of the tokens of the last scales that each layer restores from the last whole
            scale instead of computing them.
        prune_scales: number of last scales that are pruned.
        prune_whole: numbers of first and of last layers that compute all tokens all the same.
        more_smooth: mix the codes of likely tokens into each position instead of taking one.

    Raises:
        InputError: a value out of range.
    """

    prune: float = 0.0
    prune_scales: int = 2
    prune_whole: Sequence[int] = (0, 0)
    more_smooth: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.prune < 1:
            raise InputError(f"prune {self.prune!r}: expected a share, 0 <= prune < 1")
        check_count("prune_scales", self.prune_scales)
        whole = self.prune_whole
        if len(whole) != 2 or not all(type(num) is int and num >= 0 for num in whole):
            raise InputError(
                f"prune_whole {whole!r}: expected two numbers of layers, the first and the last ones"
            )

    @property
    def is_plain(self) -> bool:
        """Whether every token is computed, drawn from its law, and fed as it is."""
        return self.prune == 0 and not self.more_smooth

    def share(self, scale: int, num_scales: int) -> float:
        """Share of the tokens of a scale that is pruned; never of the first."""
        return self.prune if self._first(num_scales) <= scale else 0.0

    def is_reference(self, scale: int, num_scales: int) -> bool:
        """Whether pruned tokens are restored from this scale, the last one computed as a whole."""
        return self.prune > 0 and scale == self._first(num_scales) - 1

    def _first(self, num_scales: int) -> int:
        return max(1, num_scales - self.prune_scales)


PLAIN = ScalePlan()


@dataclass
class ScaleDraw:
    """Draws the next scale of a state: a function of fixed shapes.

    Attributes:
        state: a `NextScaleState` that keeps its keys and values in one place.
        shape: guided logits to log-probabilities.
        pick: see `Pick`.
        run: the ledger, which watches the laws.
        positions: [B, n] of the scale.
    """

    state: Any
    shape: Shape
    pick: Pick
    run: Run
    positions: Tensor

    def __call__(self) -> Tensor:
        """Tokens [B, n] of the scale, or bits [B, n, d]."""
        return self.state.draw_next(self._picked)

    def _picked(self, logits: Tensor) -> Tensor:
        laws = _laws(self.shape, self.pick, logits)
        drawn = self.pick(laws, self.positions, self.run.noise)
        self.run.watch_laws(laws)
        return drawn


@torch.no_grad()
def decode_scales(
    model: ScaleModel,
    conditions: Conditions,
    run: Run,
    *,
    shape: Shape | Sequence[Shape],
    pick: Pick = gumbel_draw,
    plan: ScalePlan = PLAIN,
    draft: ScaleModel | None = None,
    draft_scales: int = 0,
) -> Samples:
    """Draw one image per condition, scale by scale.

    Args:
        model: a scale model.
        conditions: one per image.
        run: the ledger; the noise of a token is a function of its image's seed and of its place
            among the tokens of all scales. Tokens that are not drawn stay 0.
        shape: guided logits to log-probabilities, for all scales or one for each.
        pick: from laws and noise to tokens; an exact draw by default.
        plan: see `ScalePlan`.
        draft: draws the first scales in place of the model.
        draft_scales: how many.

    Returns:
        Tokens [B, N], of bits [B, N, d]; with `more_smooth` also `embeddings` [B, N, D], which are what is decoded.
        The statistics of `Run.stats` (passes of both models); `draft_passes` with a draft;
        `computed_tokens` (per image, that went through a network) where a state counts them.

    Raises:
        InputError: a plan beyond the model, given tokens with a plan that is not plain, or a law made
            of NaN or infinity.
    """
    num_scales = len(model.scales)
    lead = 0 if run.given is None else _num_given_scales(model, run, plan)
    shapes = list(shape) if isinstance(shape, Sequence) else [shape] * num_scales
    states: list[Any] = []
    vectors: list[Tensor] = []
    done = int(run.lengths.max()) if lead else 0
    # Where one plain model draws everything, each scale behind the first has fixed shapes.
    is_plain = draft is None and run.given is None and plan.is_plain
    for scale in range(lead, num_scales):
        if scale in (lead, draft_scales):
            drawer = draft if draft is not None and scale < draft_scales else model
            states.append(drawer.start(conditions, run.guidance_scale))
            if done:
                states[-1].catch_up(run.tokens[:, :done])
        state = states[-1]
        if is_plain and scale == 0 and _can_fix(state, run):
            state.fix()
        if scale > 0 and isinstance(state, NextScaleState) and state.is_fixed:
            done = _draw_fixed(state, shapes[scale], pick, run, done)
            if run.stopped:
                break
            continue
        share = plan.share(scale, num_scales)
        is_reference = plan.is_reference(scale, num_scales)
        logits = _logits(state, share, is_reference, tuple(plan.prune_whole))
        if scale == 0:
            run.begin(logits.device, logits.shape[2:-1])
        if scale == lead:
            images = torch.arange(run.batch, device=logits.device)[:, None]
            if run.steps is not None and run.steps.captures(logits.device):
                run.noise.reserve([0] * run.batch, run.num_tokens)
        positions = torch.arange(done, done + logits.shape[1], device=logits.device)
        positions = positions.expand(run.batch, -1)
        done += logits.shape[1]
        laws = _laws(shapes[scale], pick, logits)
        run.next_pass()
        drawn = pick(laws, positions, run.noise)
        run.watch_laws(laws)
        if run.given is not None:
            drawn = run.given.over(drawn, positions)
        fed = drawn
        if plan.more_smooth:
            fed = smooth_codes(
                written(laws), positions, run.noise, model, scale / max(1, num_scales - 1)
            )
            vectors.append(fed)
        run.record(images, positions, drawn)
        run.check()
        state.feed(fed)
        run.report(torch.full_like(run.lengths, logits.shape[1]))
        if run.stopped:
            break
    drafted = min(run.num_passes, max(0, draft_scales - lead))
    more = {} if draft is None else {"draft_passes": drafted}
    if isinstance(states[-1], CountsComputed):
        more["computed_tokens"] = sum(state.computed_tokens for state in states)
    return run.samples(_embeddings(vectors, run.num_tokens), **more, **run.told)


def _draw_fixed(state: NextScaleState, shape: Shape, pick: Pick, run: Run, done: int) -> int:
    """Draw a scale behind the first `done` tokens by a function of fixed shapes; tokens drawn then."""
    num = state.num_next
    positions = torch.arange(done, done + num, device=run.tokens.device).expand(run.batch, -1)
    run.next_pass()
    draw = ScaleDraw(state, shape, pick, run, positions)
    drawn = fixed_part(run, draw, changes=[state.canvas])
    run.record(torch.arange(run.batch, device=drawn.device)[:, None], draw.positions, drawn)
    run.check()
    state.go_on()
    run.report(torch.full_like(run.lengths, num))
    return done + num


def _laws(shape: Shape, pick: Pick, logits: Tensor) -> Any:
    """Log-probabilities like `logits`, or `Laws` for a pick that takes them."""
    return laws_of(shape, logits) if pick is gumbel_draw and logits.dim() == 3 else shape(logits)


def _can_fix(state: Any, run: Run) -> bool:
    """Whether passes of fixed shapes are asked for, and the state has them."""
    if run.steps is None or not isinstance(state, NextScaleState):
        return False
    return run.steps.drives(state.canvas.device)


def _num_given_scales(model: ScaleModel, run: Run, plan: ScalePlan) -> int:
    """First scales of which all tokens are given in all images; they are final before the first pass.

    Raises:
        InputError: a plan that is not plain.
    """
    if not plan.is_plain:
        raise InputError("given tokens with prune or more_smooth: expected neither")
    given = run.given
    assert given is not None
    scales = [(size, size) if isinstance(size, int) else size for size in model.scales]
    ends = list(accumulate(height * width for height, width in scales))
    whole = [end for end in ends if bool(given.mask[:, :end].all())]
    if whole:
        run.begin(device_of(model), given.values.shape[2:])
        run.skip([whole[-1]] * run.batch)
    return len(whole)


def _embeddings(vectors: list[Tensor], num_tokens: int) -> Tensor | None:
    """Vectors [B, N, D] fed in the place of codes (0 where nothing was drawn), or None."""
    if not vectors:
        return None
    drawn = torch.cat(vectors, dim=1)
    out = drawn.new_zeros(len(drawn), num_tokens, drawn.shape[-1])
    out[:, : drawn.shape[1]] = drawn
    return out


def _logits(state: Any, share: float, is_reference: bool, whole: Any) -> Tensor:
    """Guided logits of the next scale, a share of whose tokens is pruned."""
    if share == 0 and not is_reference:
        return state.next()
    if not isinstance(state, Prunes):
        raise InputError("prune: this model computes all tokens, expected 0")
    return state.next_reference() if is_reference else state.next_pruned(share, whole)


def smooth_codes(
    laws: Tensor, positions: Tensor, noise: Noise, model: ScaleModel, progress: float
) -> Tensor:
    """Codes [B, n, D] mixed by a Gumbel softmax, softer at the coarse scales. For display only.

    Args:
        laws: log-probabilities [B, n, V].
        positions: [B, n].
        noise: of the images.
        model: gives the codebook.
        progress: 0 at the first scale, 1 at the last.

    Raises:
        InputError: a model without a codebook.

    Paper: none; the option `more_smooth` of VAR's sampler, with its constants.
    """
    codebook = codebook_of(model)
    if codebook is None:
        raise InputError("more_smooth: this model has no codebook to mix codes of")
    temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
    numbers = noise.gumbel(positions, laws.shape[-1], laws.dtype)
    mix = ((laws * (1 + progress) + numbers) / temperature).softmax(-1)
    return mix.to(codebook.dtype) @ codebook
