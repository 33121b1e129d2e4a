"""The decoding loop of scale models: all tokens of one resolution per pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contracts import Conditions, Samples, ScaleModel, Schedule, Seeds, Stats, StepCallback
from ..errors import InputError, check_count
from .noise import Noise
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
        more_smooth: mix the codes of likely tokens into each position instead of taking one.

    Raises:
        InputError: a value out of range.
    """

    prune: float = 0.0
    prune_scales: int = 2
    more_smooth: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.prune < 1:
            raise InputError(f"prune {self.prune!r}: expected a share, 0 <= prune < 1")
        check_count("prune_scales", self.prune_scales)

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


@torch.no_grad()
def decode_scales(
    model: ScaleModel,
    conditions: Conditions,
    *,
    shape: Shape | Sequence[Shape],
    seeds: Seeds,
    guidance_scale: Schedule = 1.0,
    on_step: StepCallback | None = None,
    pick: Pick = gumbel_draw,
    plan: ScalePlan = PLAIN,
    draft: ScaleModel | None = None,
    draft_scales: int = 0,
) -> Samples:
    """Draw one image per condition, scale by scale.

    Args:
        model: a scale model.
        conditions: one per image.
        shape: guided logits to log-probabilities, for all scales or one for each.
        seeds: one per image; the noise of a token is a function of it and of the token's place
            among the tokens of all scales.
        guidance_scale: weight of the conditional logits, or a list with one for each scale.
        on_step: called after each pass; a true answer stops the run, tokens not drawn yet stay 0.
        pick: from laws and noise to tokens; an exact draw by default.
        plan: see `ScalePlan`.
        draft: draws the first scales in place of the model.
        draft_scales: how many.

    Returns:
        Tokens [B, N], of bits [B, N, d]; with `more_smooth` also `embeddings` [B, N, D], which are what is decoded.
        Stats: `forward_passes` (both models), `tokens`, `tokens_per_pass`, `passes_per_image` [B],
        `commit_pass` [B][N]; `draft_passes` with a draft; `computed_tokens` (per image, that went
        through a network) where a state counts them.

    Raises:
        InputError: another number of seeds than of conditions, or a plan beyond the model.
    """
    if len(seeds) != len(conditions):
        raise InputError(f"{len(seeds)} seeds for {len(conditions)} conditions: expected one each")
    num_scales = len(model.scales)
    shapes = list(shape) if isinstance(shape, Sequence) else [shape] * num_scales
    states: list[Any] = []
    run: _ScaleRun | None = None
    passes = 0
    for scale in range(num_scales):
        if scale in (0, draft_scales):
            drawer = draft if draft is not None and scale < draft_scales else model
            states.append(drawer.start(conditions, guidance_scale))
            if run is not None:
                states[-1].catch_up(run.tokens[:, : run.done])
        state = states[-1]
        share = plan.share(scale, num_scales)
        logits = _logits(state, share, plan.is_reference(scale, num_scales))
        if run is None:
            run = _ScaleRun(model, seeds, logits)
        positions = run.positions(logits.shape[1])
        laws = shapes[scale](logits)
        drawn = pick(laws, positions, run.noise)
        fed = drawn
        if plan.more_smooth:
            fed = smooth_codes(laws, positions, run.noise, model, scale / max(1, num_scales - 1))
        state.feed(fed)
        passes += 1
        run.record(drawn, fed if plan.more_smooth else None, passes)
        if on_step is not None and on_step(passes, run.progress(logits.shape[1])):
            break
    assert run is not None
    stats = Stats(
        forward_passes=passes,
        tokens=model.num_tokens,
        tokens_per_pass=model.num_tokens / passes,
        passes_per_image=[passes] * len(run.tokens),
        commit_pass=run.commit_pass.tolist(),
    )
    if draft is not None:
        stats["draft_passes"] = min(passes, draft_scales)
    if hasattr(states[-1], "computed_tokens"):
        stats["computed_tokens"] = sum(state.computed_tokens for state in states)
    return Samples(run.tokens, stats, embeddings=run.embeddings())


def _logits(state: Any, share: float, is_reference: bool) -> Tensor:
    """Guided logits of the next scale, a share of whose tokens is pruned."""
    if share == 0 and not is_reference:
        return state.next()
    if not hasattr(state, "next_pruned"):
        raise InputError("prune: this model computes all tokens, expected 0")
    return state.next_reference() if is_reference else state.next_pruned(share)


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
    codebook = getattr(model, "codebook", None)
    if codebook is None:
        raise InputError("more_smooth: this model has no codebook to mix codes of")
    temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
    numbers = noise.gumbel(positions, laws.shape[-1], laws.dtype)
    mix = ((laws * (1 + progress) + numbers) / temperature).softmax(-1)
    return mix.to(codebook.dtype) @ codebook


class _ScaleRun:
    """Bookkeeping of a batch: all images move scale by scale."""

    def __init__(self, model: ScaleModel, seeds: Seeds, logits: Tensor) -> None:
        self.noise = Noise(seeds, logits.device)
        places = (len(self.noise), model.num_tokens)
        kind = {"dtype": torch.int64, "device": logits.device}
        self.tokens = torch.zeros(*places, *logits.shape[2:-1], **kind)
        self.commit_pass = torch.zeros(places, **kind)
        self.done = 0
        self._vectors: list[Tensor] = []

    def positions(self, num: int) -> Tensor:
        """Places [B, n] of the next `num` tokens among those of all scales."""
        places = torch.arange(self.done, self.done + num, device=self.tokens.device)
        return places.expand(len(self.tokens), num)

    def record(self, drawn: Tensor, vectors: Tensor | None, pass_number: int) -> None:
        """Write the tokens [B, n] or [B, n, d] of a scale down, and the vectors that were fed in their place."""
        end = self.done + drawn.shape[1]
        self.tokens[:, self.done : end] = drawn
        self.commit_pass[:, self.done : end] = pass_number
        self.done = end
        if vectors is not None:
            self._vectors.append(vectors)

    def embeddings(self) -> Tensor | None:
        """Vectors [B, N, D] fed in the place of codes (0 where nothing was drawn), or None."""
        if not self._vectors:
            return None
        vectors = torch.cat(self._vectors, dim=1)
        out = vectors.new_zeros(*self.tokens.shape, vectors.shape[-1])
        out[:, : vectors.shape[1]] = vectors
        return out

    def progress(self, num: int) -> dict[str, Any]:
        """Figures of a pass that made `num` tokens of each image final."""
        batch, total = self.tokens.shape[:2]
        return {"finished": batch * self.done, "total": batch * total, "accepted": [num] * batch}
