"""What models, samplers and pipelines promise each other.

Shape letters used throughout the package: B batch, N tokens per image, T candidates, K kept,
V vocabulary, C width, D head width or latent width, S cache length, R cache rows (B, or 2B with
guidance), H W pixels.

Words used throughout:

- *law*: a probability distribution of what comes next, shaped (temperature, top-k, top-p) and
  normalised; `probs`, or `logp` for its logarithm. "The model's own law" is the joint one of plain
  sampling, which a lossless sampler keeps.
- *position*: a place in the image or in the text, counted in drawing order from the first drawn
  token. Noise is a function of (seed, image, position, purpose, round).
- *slot*: a place in memory, or in the work of a pass, that holds one position of one image for a
  while: a column of the cache, a row of flat work. Slots move, positions do not.
- *round*: one turn of a decoding loop, that is drafts, a pass of the model over them, a verdict, a
  commit. Rounds count from 1 (the prefill is 0) and make numbers fresh that a position needs anew
  each time it is judged.
- *pass*: one call of the model on drawn tokens; the prefill is none.
- *coupling*: the joint law of a draft and the token that takes its place, "gumbel", "maximal" or
  "independent", see `arvision.decoding.verify`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

Conditions = Sequence[Any]
"""One entry per image: a class id, a class name or caption, `None`, or caption features [T, C]."""

Seeds = Sequence[Any]
"""One entry per image: an integer, or a pair (seed, index of the image within that seed)."""

StepCallback = Callable[[int, dict[str, Any]], Any]
"""Called after every pass with the pass number and {"finished", "total", "accepted"} (token models
add "tokens" [B, N] and "lengths" [B]); a true answer stops the run."""


class Stats(dict[str, Any]):
    """Measurements of one run; a dict whose entries can also be read as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no statistic {name!r}; there are {', '.join(self)}") from None


@dataclass
class Samples:
    """What a sampler returns.

    Attributes:
        tokens: [B, N] int64 (token and scale models) or [B, N, D] float (continuous models).
        stats: see `arvision.pipeline.SampleOutput`.
        embeddings: [B, N, D] vectors that are decoded in the place of the tokens' codes, where a
            sampler leaves the codebook; None where the tokens say it all.
    """

    tokens: Tensor
    stats: Stats = field(default_factory=Stats)
    embeddings: Tensor | None = None


class TokenState(Protocol):
    """Decode state of a token model: a committed prefix and, between calls, some candidates."""

    lengths: Tensor
    """[B] int64, committed tokens of each row."""

    def extend(self, tokens: Tensor, parents: Tensor | None = None) -> Tensor:
        """Guided logits [B, T, V] of what follows each of the candidates `tokens` [B, T].

        `parents` is None for a chain, else [T] int64 with `parents[t] < t`, -1 for the prefix.
        """
        ...

    def commit(self, kept: Tensor, counts: Tensor) -> None:
        """Keep candidates `kept[b, :counts[b]]` ([B, K] and [B] int64) and forget the rest."""
        ...


@runtime_checkable
class TokenModel(Protocol):
    """A model that draws one discrete token after another.

    A state may offer more, which samplers use where it exists:

    - `select(rows)` keeps the given batch rows and drops the others.
    - A true `allows_overrun` says that `extend` accepts candidates past the last token (their
      logits mean nothing).
    - `extend_at(tokens [B, T], positions [B, T], visible [B, T, N]) -> [B, T, V]` feeds tokens at
      any positions of the image, not only behind a committed prefix. Row t of the guided logits is
      the law of position `positions[b, t] + 1`. What is fed stays where it is until the position
      is fed again; candidate t looks at the conditions, at itself, and at the positions that
      `visible[b, t]` marks (fed earlier, or in the same call), so the caller alone says what
      counts. Position -1 marks padding. A state is driven either by `extend` and `commit` or by
      `extend_at`.

    So may a model: `codebook` [V, D], the vectors behind the tokens, whose distances say which
    tokens look alike (None where there are none); `cost_key`, a string that names everything the
    cost of a pass depends on apart from the machine (sizes, device, dtype); `calibration`, weights
    that tell how likely its drafts are accepted when it drafts for another model, see
    `arvision.decoding.draft_model.Calibration`.
    """

    vocab_size: int
    num_tokens: int
    grid: tuple[int, int] | None

    def start(
        self, conditions: Conditions, guidance_scale: float = 1.0
    ) -> tuple[TokenState, Tensor]:
        """Prefill `conditions`; the state and the guided logits [B, V] of the first token."""
        ...

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N] to pixels [B, 3, H, W] in [-1, 1]."""
        ...


class ScaleState(Protocol):
    """Decode state of a scale model: all images of a batch stand at the same scale.

    A state may offer more, which samplers use where it exists:

    - `catch_up(tokens [B, n])` takes the tokens of the first scales, drawn elsewhere, all at once.
    - `next_pruned(share)` is `next` with a share of the tokens interpolated instead of computed.
    - `computed_tokens` counts the tokens of an image that went through the network.
    """

    def next(self) -> Tensor:
        """Guided logits [B, n, V] of the tokens of the next scale, raster order."""
        ...

    def feed(self, tokens: Tensor) -> None:
        """Tokens [B, n] of that scale, or vectors [B, n, D] in the place of their codes."""
        ...


@runtime_checkable
class ScaleModel(Protocol):
    """A model that draws all tokens of one resolution at a time.

    `codebook` [V, D] are the vectors behind the tokens.
    """

    vocab_size: int
    num_tokens: int
    scales: tuple[int, ...]
    """Side lengths, growing; scale k has `scales[k] ** 2` tokens."""

    def start(self, conditions: Conditions, guidance_scale: float = 1.0) -> ScaleState:
        """A state in which nothing is drawn.

        Guidance grows linearly from 1 at the first scale to `guidance_scale` at the last.
        """
        ...

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N] of all scales, or vectors [B, N, D], to pixels [B, 3, H, W] in [-1, 1]."""
        ...


class LatentState(Protocol):
    """Decode state of a continuous model: which latents of each image are known."""

    lengths: Tensor
    """[B] int64, latents fed of each row."""

    def condition(self, count: int) -> Tensor:
        """Conditions z [B, count, Dz] of the head for the next `count` positions of the order.

        All positions not fed yet count as masked. Dz is the width, or twice the width where
        guidance needs the unconditional z beside the conditional one.
        """
        ...

    def feed(self, latents: Tensor) -> None:
        """Latents [B, count, D] of the next positions become known."""
        ...

    def contexts(self, latents: Tensor, known: Tensor, images: Tensor) -> Tensor:
        """Conditions z [R, N, Dz] of every position in R hypothetical contexts, in one pass.

        Args:
            latents: [R, N, D], by position; what stands at unknown positions does not matter.
            known: [R, N] bool; rows may know different numbers of latents.
            images: [R] int64, which image of the batch a context belongs to.
        """
        ...


@runtime_checkable
class ContinuousModel(Protocol):
    """A model whose tokens are vectors, drawn by a head from p(latent | z).

    `head.law(z [M, Dz], guidance_scale)` is a law of latents, see
    `arvision.decoding.latents.chain`; `head.num_steps` and `head.latent_dim` are its sizes.
    """

    num_tokens: int
    head: Any
    grid: tuple[int, int] | None

    def start(
        self, conditions: Conditions, guidance_scale: float = 1.0, order: Tensor | None = None
    ) -> LatentState:
        """A state in which nothing is known; `order` [B, N] are positions as they will be drawn."""
        ...

    def decode(self, tokens: Tensor) -> Tensor:
        """Latents [B, N, D] to pixels [B, 3, H, W] in [-1, 1]."""
        ...


@runtime_checkable
class StudentModel(Protocol):
    """A model that predicts all tokens of an image at once, from codes of the first and noise.

    A unit is what its teacher draws in one pass: a token, or a scale.
    """

    vocab_size: int
    num_tokens: int
    codebook: Tensor
    """[V, D]."""
    timesteps: tuple[int, ...]
    """Numbers of known units that it was trained for, 0 first."""
    unit_ends: tuple[int, ...]
    """Tokens up to the end of each unit."""
    split: int
    """From this unit on its vectors are decoded as they are, not the codes of its tokens."""

    def predict(self, conditions: Conditions, vectors: Tensor, known: int) -> tuple[Tensor, Tensor]:
        """Logits [B, N, V] and vectors [B, N, D] of all positions.

        `vectors` [B, N, D] are the codes of the first `known` units, then noise.
        """
        ...

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N], or vectors [B, N, D], to pixels [B, 3, H, W] in [-1, 1]."""
        ...


class Sampler(Protocol):
    """A loop around a model; it knows the contract and never the network."""

    def __call__(
        self,
        model: Any,
        conditions: Conditions,
        *,
        seeds: Seeds,
        guidance_scale: float = 1.0,
        on_step: StepCallback | None = None,
    ) -> Samples:
        """Draw one sample per condition."""
        ...
