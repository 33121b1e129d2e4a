"""The decoding loop of scale models: all tokens of one resolution per pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contracts import Conditions, Samples, ScaleModel, Seeds, Stats, StepCallback
from ..errors import InputError, check_count
from .noise import Noise
from .verify import gumbel_draw

Pick = Callable[[Tensor, Tensor, Noise], Tensor]
"""Log-probabilities [B, n, V] of tokens at flat positions [B, n], and noise, to tokens [B, n]."""


@dataclass(frozen=True, kw_only=True)
class ScalePlan:
    """How the scales are drawn where that is not one plain pass per scale.

    Attributes:
        prune: share of the tokens of the last scales that is interpolated instead of computed.
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
        return self.prune if max(1, num_scales - self.prune_scales) <= scale else 0.0


PLAIN = ScalePlan()


@torch.no_grad()
def decode_scales(
    model: ScaleModel,
    conditions: Conditions,
    *,
    shape: Callable[[Tensor], Tensor],
    seeds: Seeds,
    guidance_scale: float = 1.0,
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
        shape: guided logits to log-probabilities.
        seeds: one per image; the noise of a token is a function of it and of the token's place
            among the tokens of all scales.
        guidance_scale: weight of the conditional logits.
        on_step: called after each pass; a true answer stops the run, tokens not drawn yet stay 0.
        pick: from laws and noise to tokens; an exact draw by default.
        plan: see `ScalePlan`.
        draft: draws the first scales in place of the model.
        draft_scales: how many.

    Returns:
        Tokens [B, N]; with `more_smooth` also `embeddings` [B, N, D], which are what is decoded.
        Stats: `forward_passes` (both models), `tokens`, `tokens_per_pass`, `passes_per_image` [B],
        `commit_pass` [B][N]; `draft_passes` with a draft; `computed_tokens` (per image, that went
        through a network) where a state counts them.

    Raises:
        InputError: another number of seeds than of conditions, or a plan beyond the model.
    """
    if len(seeds) != len(conditions):
        raise InputError(f"{len(seeds)} seeds for {len(conditions)} conditions: expected one each")
    num_scales = len(model.scales)
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
        logits = state.next() if share == 0 else _next_pruned(state, share)
        if run is None:
            run = _ScaleRun(model, seeds, logits.device)
        positions = run.positions(logits.shape[1])
        laws = shape(logits)
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


def _next_pruned(state: Any, share: float) -> Tensor:
    if not hasattr(state, "next_pruned"):
        raise InputError(f"prune {share}: this model computes all tokens, expected 0")
    return state.next_pruned(share)


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

    def __init__(self, model: ScaleModel, seeds: Seeds, device: torch.device) -> None:
        self.noise = Noise(seeds, device)
        shape = (len(self.noise), model.num_tokens)
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self.commit_pass = torch.zeros_like(self.tokens)
        self.done = 0
        self._vectors: list[Tensor] = []

    def positions(self, num: int) -> Tensor:
        """Places [B, n] of the next `num` tokens among those of all scales."""
        places = torch.arange(self.done, self.done + num, device=self.tokens.device)
        return places.expand(len(self.tokens), num)

    def record(self, drawn: Tensor, vectors: Tensor | None, pass_number: int) -> None:
        """Write the tokens [B, n] of a scale down, and the vectors that were fed in their place."""
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
        batch, total = self.tokens.shape
        return {"finished": batch * self.done, "total": batch * total, "accepted": [num] * batch}
