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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

Conditions = Sequence[Any]
"""One entry per image: a class id, a class name or caption, `None`, caption features [T, C], or a
`Prompt` of captions or features."""

Seeds = Sequence[Any]
"""One entry per image: an integer, or a pair (seed, index of the image within that seed)."""

Schedule: TypeAlias = float | Sequence[float]
"""A number for all scales of a scale model, or one for each of them, coarse to fine."""

StepCallback = Callable[[int, dict[str, Any]], Any]
"""Called after every pass with the pass number and {"finished", "total" (tokens of the batch),
"accepted" (tokens that the pass made final, of each image that took part), "drawn" (a function: all
tokens so far and which are final, [B, N, ...] and [B, N])}; the token loop adds "tokens" [B, N] and
"lengths" [B]. A true answer stops the run."""


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
        tokens: [B, N] int64 (token and scale models; [B, N, d] of 0 and 1 where tokens are bits) or
            [B, N, D] float (continuous models).
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

        `parents` is None for a chain, else [T] int64 with `parents[t] < t`, -1 for the prefix; or
        [B, T], a tree for every row, where the state is one of those that take it (`TakesTrees`).
        """
        ...

    def commit(self, kept: Tensor, counts: Tensor) -> None:
        """Keep candidates `kept[b, :counts[b]]` ([B, K] and [B] int64) and forget the rest."""
        ...


@runtime_checkable
class DropsRows(Protocol):
    """A state whose finished rows can leave the batch."""

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows` [B'] and drop the others."""
        ...


@runtime_checkable
class TakesRows(Protocol):
    """A state that takes in the rows of another one of its model, with as much guidance (none, or
    some for each row), behind its own rows."""

    def join(self, other: Any) -> None:
        """Take over the rows of `other`, which is not used any more."""
        ...


@runtime_checkable
class Advances(Protocol):
    """A state that commits chains without asking its device."""

    def advance(self, counts: Tensor, given: Sequence[int]) -> None:
        """Keep the first `counts` [B] candidates of each row and forget the rest.

        `given` are the same numbers on the host.
        """
        ...


@runtime_checkable
class AdvancesAlong(Protocol):
    """A state that takes trees and paths of the loop's own making without asking its device."""

    def extend_along(self, tokens: Tensor, tree: Any) -> Tensor:
        """`TokenState.extend`, which does not look for bad numbers or parents either.

        Args:
            tokens: [B, T].
            tree: `Topology` of the candidates, None for a chain.
        """
        ...

    def advance_along(self, path: Tensor, counts: Tensor, given: Sequence[int]) -> None:
        """Keep candidates `path[b, :counts[b]]` ([B, K] and [B] int64) and forget the rest.

        `given` are the counts on the host.
        """
        ...


@runtime_checkable
class TakesFixedChains(Protocol):
    """A state whose pass can be a function of fixed shapes, with lengths that only the device knows.

    It is then driven by `extend_fixed` alone: what is fed behind `lengths` is forgotten by the next
    call that says so, and nothing is committed. A state that cannot do it always has `why_not_fixed`,
    the reason in words, or None.
    """

    def extend_fixed(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Guided logits [B, T, V] of what follows chains [B, T] behind the first `lengths` [B] tokens.

        Places past the last token may be asked for; their logits mean nothing.
        """
        ...


@runtime_checkable
class TakesFixedTrees(TakesFixedChains, Protocol):
    """A state of which trees are passes of fixed shapes, too.

    `extend_fixed` then takes a `Topology` of the candidates [B, T] as a third argument.
    """

    def keep_fixed(self, path: Tensor, counts: Tensor, lengths: Tensor) -> None:
        """Of the last candidates, fed behind `lengths` [B], keep `path[b, :counts[b]]` in order."""
        ...


@runtime_checkable
class Overruns(Protocol):
    """A state that may accept candidates past the last token (their logits mean nothing)."""

    allows_overrun: bool


@runtime_checkable
class TakesTrees(Protocol):
    """A model whose states take a tree of its own for every row: `extend` with parents [B, T]."""

    takes_trees: bool


@runtime_checkable
class TellsHidden(Protocol):
    """A state that tells what the network's last layer says of the last candidates."""

    hidden: Tensor | None
    """[B, T, C]."""


Edit: TypeAlias = "Mapping[int, Callable[[Tensor], Tensor]]"
"""Numbers of layers to functions from a layer's input [B, T, C] to what takes its place."""


@runtime_checkable
class Editable(Protocol):
    """A state whose hidden states a drafter may change during one pass."""

    def extend_edited(self, tokens: Tensor, parents: Tensor | None, edit: Edit) -> Tensor:
        """`TokenState.extend` with an edit of this pass alone."""
        ...


@runtime_checkable
class FeedsAnywhere(Protocol):
    """A state that takes tokens at any positions of the image, not only behind a prefix."""

    def extend_at(self, tokens: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """Guided logits [B, T, V] of what follows tokens [B, T] at positions [B, T].

        `positions` lie on the host or where the tokens are. Row t is the law of position
        `positions[b, t] + 1`. What is fed stays where it is until the
        position is fed again; candidate t looks at the conditions, at itself, and at the positions
        that `visible` [B, T, N] marks (fed earlier, or in the same call), so the caller alone says
        what counts. Position -1 marks padding. A state is driven either by `extend` and `commit` or
        by `extend_at`.
        """
        ...


@runtime_checkable
class HasCodebook(Protocol):
    """A model whose tokens stand for vectors, whose distances say which tokens look alike."""

    codebook: Tensor | None
    """[V, D]; None where a model of this family has none."""


def codebook_of(model: Any) -> Tensor | None:
    """The codebook [V, D] of a model that has one, else None."""
    return model.codebook if isinstance(model, HasCodebook) else None


@runtime_checkable
class Encodes(Protocol):
    """A model that turns pictures into tokens, of any kind."""

    picture_size: tuple[int, int]
    """Height and width of its pictures, in pixels."""

    def tokens_of(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] to the tokens of all images, as `decode` takes them."""
        ...


@runtime_checkable
class DecodesPart(Protocol):
    """A model that makes pictures of tokens of which some are not drawn yet."""

    def decode_part(self, tokens: Tensor, is_final: Tensor) -> Tensor:
        """Tokens [B, N, ...], final where `is_final` [B, N], to pixels [B, 3, H, W], about [-1, 1]."""
        ...


def device_of(model: Any) -> torch.device:
    """Where a model says that it lies; the CPU where it does not say."""
    return torch.device(getattr(model, "device", "cpu"))


def is_causal(model: Any) -> bool:
    """Whether a continuous model draws in raster order, one latent at a time: if it says so."""
    return bool(getattr(model, "is_causal", False))


@runtime_checkable
class TellsCost(Protocol):
    """A model that names what a pass of it costs."""

    cost_key: str | None
    """Everything the cost depends on apart from the machine: sizes, device, dtype."""


@runtime_checkable
class TellsCalibration(Protocol):
    """A draft model that knows how likely its drafts are accepted."""

    calibration: dict[str, list[float]] | None
    """Weights, see `arvision.decoding.draft_model.Calibration`."""


@runtime_checkable
class TokenModel(Protocol):
    """A model that draws one discrete token after another.

    A state may offer more, which samplers use where it exists: `DropsRows`, `TakesRows`, `Advances`,
    `AdvancesAlong`, `Overruns`, `TellsHidden`, `FeedsAnywhere`. So may a model: `TakesTrees`, `HasCodebook`,
    `TellsCost`, `TellsCalibration`.
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

    A state may offer more, which samplers use where it exists: `catch_up(tokens [B, n])`, which
    takes the tokens of the first scales, drawn elsewhere, all at once; `Prunes`; `CountsComputed`.
    """

    def next(self) -> Tensor:
        """Guided logits [B, n, V] of the tokens of the next scale, raster order; see `num_bits`."""
        ...

    def feed(self, tokens: Tensor) -> None:
        """Tokens [B, n] of that scale, or vectors [B, n, D] in the place of their codes."""
        ...


@runtime_checkable
class Prunes(Protocol):
    """A scale state that can leave tokens out."""

    def next_pruned(self, share: float, whole: tuple[int, int] = (0, 0)) -> Tensor:
        """`ScaleState.next` with a share of the tokens restored in every layer, not computed; all are
        computed in the first and last layers, as many as `whole` says."""
        ...

    def next_reference(self) -> Tensor:
        """`ScaleState.next`, and keep what pruned tokens of later scales are restored from."""
        ...


@runtime_checkable
class CountsComputed(Protocol):
    """A scale state that counts the tokens of an image that went through the network."""

    computed_tokens: int


@runtime_checkable
class ScaleModel(Protocol):
    """A model that draws all tokens of one resolution at a time.

    A model may have `codebook` [V, D], the vectors behind the tokens; or `num_bits`, d: its tokens
    are d bits each, independent given the coarser scales. `vocab_size` is then 2, logits are
    [B, n, d, 2], and tokens are [B, n, d] of 0 and 1 wherever a contract says [B, n].
    """

    vocab_size: int

    @property
    def num_tokens(self) -> int:
        """Tokens of one image, over all scales."""
        ...

    @property
    def scales(self) -> tuple[Any, ...]:
        """Sizes of the scales, growing: sides of square maps, or pairs (height, width)."""
        ...

    def start(self, conditions: Conditions, guidance_scale: Any = 1.0) -> ScaleState:
        """A state in which nothing is drawn.

        `guidance_scale` is a number, whose meaning at each scale is the family's (VAR grows it
        linearly from 1 at the first scale, Infinity takes it everywhere), or a list with the weight
        of each scale.
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
class KeepsFeatures(Protocol):
    """A latent state that can reuse features of earlier passes."""

    def keep_features(
        self,
        refresh: int,
        reuse_guidance: bool,
        first: int = 0,
        shares: Sequence[float] | None = None,
    ) -> None:
        """Compute everything anew every `refresh` passes only, and in the first ones; see `LatentPlan`.

        `shares` are the shares of the places that each pass computes in between; None for those
        alone that must be.
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
