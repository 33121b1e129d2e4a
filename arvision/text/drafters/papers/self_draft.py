"""The target drafts for itself with some of its layers."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....decoding.logits import Shaping
from ....decoding.tree import TokenTree, none_left
from ....decoding.verify import Round, Verdict
from ....errors import InputError
from ..base import TextDrafter, register


class ShortTarget(TextDrafter):
    """A chain from passes of some of the target's layers; nothing is committed in between."""

    max_draft: int
    confidence: float

    def __init__(self) -> None:
        self.shaping = Shaping()

    def begin(self, state: Any) -> None:
        """Hold on to the target's state.

        Raises:
            InputError: a state that cannot skip layers.
        """
        if not hasattr(state, "draft"):
            raise InputError(
                f"{type(self).__name__} skips layers of the target, and this model's state has no "
                "`draft`: expected a language model of transformers"
            )
        self.state = state

    def law(self, tokens: Tensor) -> Tensor:
        """Laws [B, V] after the last of candidates [B, T]; subclasses pick the layers."""
        raise NotImplementedError

    def propose(self, tokens: Tensor, lengths: Tensor, num: int, round_number: int) -> TokenTree:
        """A chain that ends where every row is unsure; see `arvision.decoding.loop.Drafter`."""
        self.follow(tokens, lengths)
        fed = tokens.gather(1, lengths[:, None] - 1)
        sure = torch.ones_like(lengths, dtype=torch.bool)
        drafts = fed[:, :0]
        for place in range(num):
            law = self.law(fed)
            scores = law
            if self.shaping.temperature > 0:
                where = (lengths + place)[:, None].clamp(max=self.num_tokens - 1)
                scores = law + self.noise.gumbel(where, law.shape[-1], law.dtype)[:, 0]
            token = scores.argmax(-1)
            drafts = torch.cat([drafts, token.where(sure, -1)[:, None]], dim=1)
            fed = torch.cat([fed, token[:, None]], dim=1)
            sure = sure & (law.amax(-1).exp() >= self.confidence)
            if none_left(sure):
                break
        return TokenTree(drafts)

    def shaped(self, logits: Tensor) -> Tensor:
        """Log-probabilities [B, V] of logits; at temperature 0 those of temperature 1."""
        return (self.shaping if self.shaping.temperature else Shaping())(logits)


def num_skipped(num_layers: int, share: float) -> int:
    """How many layers a share of all is, if the first and the last always run."""
    return min(num_layers - 2, round(share * num_layers)) if num_layers > 2 else 0


def spread_layers(num_layers: int, num_skipped: int) -> list[int]:
    """The layers that run if the skipped ones lie evenly between the first and the last."""
    step = (num_layers - 2) / max(1, num_skipped)
    left_out = {1 + int(step * k) for k in range(num_skipped)}
    return [layer for layer in range(num_layers) if layer not in left_out]


@register("layer_skip", summary="the target without some of its middle layers (SWIFT)")
class LayerSkip(ShortTarget):
    """The target with some middle layers skipped drafts for itself.

    Which layers: sets are tried on recent context (the last `context` tokens are read again, and
    what the short model would have said is compared with what came), and the next set to try is the
    one of the largest expected improvement under a Gaussian process over the sets, whose kernel
    falls with the number of layers in which two differ.

    Args:
        skip: share of the layers skipped; the first and the last always run.
        num_draft: longest chain.
        confidence: probability below which a draft is the last of its chain.
        trials: sets tried in a text.
        context: tokens that a trial reads.
        layers: the layers that run, ascending, if they are known; nothing is tried then.
        seed: of the sets tried.

    Raises:
        InputError: a value out of range.

    Paper: Xia et al., "SWIFT: On-the-Fly Self-Speculative Decoding for LLM Inference Acceleration",
    2024, section 4 (there attention and MLP are skipped one by one).
    """

    def __init__(
        self,
        skip: float = 0.4,
        num_draft: int = 4,
        confidence: float = 0.6,
        trials: int = 24,
        context: int = 24,
        layers: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= skip < 1 or num_draft < 1 or not 0 <= confidence <= 1 or context < 2:
            raise InputError(
                f"skip {skip}, num_draft {num_draft}, confidence {confidence}, context {context}: "
                "expected 0 <= skip < 1, num_draft >= 1, a probability, context >= 2"
            )
        self.skip, self.num_draft, self.confidence = skip, num_draft, confidence
        self.trials, self.context = trials, context
        self._given = None if layers is None else list(layers)
        self._random = random.Random(seed)
        self._found: list[tuple[tuple[bool, ...], float]] = []
        self._trial: tuple[tuple[bool, ...], Tensor, int] | None = None

    def begin(self, state: Any) -> None:
        """Start with layers skipped evenly, or with the best set of earlier texts."""
        super().begin(state)
        self._trial = None
        num = state.model.sizes.num_layers
        if self._given is not None and not all(0 <= layer < num for layer in self._given):
            raise InputError(f"layers {self._given}: the model has {num}")
        self._num_skipped = num_skipped(num, self.skip)
        if self._found and len(self._found[0][0]) != num:
            self._found = []

    @property
    def layers(self) -> list[int]:
        """The layers that run at present."""
        if self._given is not None:
            return self._given
        num = self.state.model.sizes.num_layers
        if not self._found:
            return spread_layers(num, self._num_skipped)
        best = max(self._found, key=lambda item: item[1])[0]
        return [layer for layer, runs in enumerate(best) if runs]

    def law(self, tokens: Tensor) -> Tensor:
        """See `ShortTarget`."""
        return self.shaped(self.state.draft(tokens, layers=self.layers)[:, -1])

    def propose(self, tokens: Tensor, lengths: Tensor, num: int, round_number: int) -> TokenTree:
        """Try a set of layers now and then, and draft with the best."""
        if self._given is None and self._num_skipped and len(self._found) < self.trials:
            self._try(tokens, lengths)
        return super().propose(tokens, lengths, num, round_number)

    def _try(self, tokens: Tensor, lengths: Tensor) -> None:
        if self.state.least_committed() < self.context:
            return
        num = self.state.model.sizes.num_layers
        runs = self._next_set(num)
        layers = [layer for layer in range(num) if runs[layer]]
        said, came = self.state.replay(tokens, self.context, layers)
        self._trial = (runs, (said == came).sum(), came.numel())

    def asks(self, batch: Round, verdict: Verdict) -> Sequence[Tensor]:
        """How many tokens a set of layers that was tried said right."""
        return [] if self._trial is None else [self._trial[1]]

    def hear(self, new: Sequence[list[int]], told: Sequence[list[int]]) -> None:
        """Note how good the set was."""
        if self._trial is not None:
            self._found.append((self._trial[0], told[0][0] / self._trial[2]))
            self._trial = None
        super().hear(new, told)

    def _next_set(self, num: int) -> tuple[bool, ...]:
        """The candidate set of the largest expected improvement."""

        def random_set() -> tuple[bool, ...]:
            skipped = set(self._random.sample(range(1, num - 1), self._num_skipped))
            return tuple(layer not in skipped for layer in range(num))

        if not self._found:
            running = set(self.layers)
            return tuple(layer in running for layer in range(num))
        best_set, best = max(self._found, key=lambda item: item[1])
        candidates = [random_set() for _ in range(32)]
        for _ in range(32):
            swapped = list(best_set)
            on = [layer for layer in range(1, num - 1) if swapped[layer]]
            off = [layer for layer in range(1, num - 1) if not swapped[layer]]
            if on and off:
                a, b = self._random.choice(on), self._random.choice(off)
                swapped[a], swapped[b] = False, True
            candidates.append(tuple(swapped))
        gains = expected_improvement(
            np.array([runs for runs, _ in self._found], dtype=float),
            np.array([score for _, score in self._found]),
            np.array(candidates, dtype=float),
            best,
        )
        return candidates[int(gains.argmax())]


def expected_improvement(
    tried: np.ndarray, scores: np.ndarray, candidates: np.ndarray, best: float
) -> np.ndarray:
    """Expected improvement [C] over `best` under a Gaussian process.

    Args:
        tried: [M, D] of 0 and 1.
        scores: [M].
        candidates: [C, D].
        best: the largest score.
    """

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.exp(-np.abs(a[:, None] - b[None]).sum(-1) / 6.0)

    mean, spread = scores.mean(), max(float(scores.std()), 0.05)
    inverse = np.linalg.inv(kernel(tried, tried) + 0.05 * np.eye(len(tried)))
    cross = kernel(candidates, tried)
    expected = mean + cross @ inverse @ (scores - mean)
    variance = np.clip(1.0 - ((cross @ inverse) * cross).sum(-1), 1e-9, None)
    deviation = spread * np.sqrt(variance)
    z = (expected - best) / deviation
    normal = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in z])
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return (expected - best) * normal + deviation * density


@register("nested_exit", summary="the target's first layers, as many as are needed (S2D)")
class NestedExit(ShortTarget):
    """Nested sub-models of the target, the smallest first: each draft comes from the first sure one.

    Made for models whose first layers were trained to be models of their own (sorted fine-tuning);
    with others it drafts little.

    Args:
        exits: numbers of first layers, as shares of the model, ascending.
        num_draft: longest chain.
        confidence: probability from which an exit's token is drafted.

    Raises:
        InputError: exits that do not ascend in (0, 1].

    Paper: Kavehzadeh et al., "S2D: Sorted Speculative Decoding For More Efficient Deployment of
    Nested Large Language Models", 2024, sections 3-4 (its draft models are nested by depth).
    """

    def __init__(
        self,
        exits: Sequence[float] = (0.5, 0.75),
        num_draft: int = 4,
        confidence: float = 0.6,
    ) -> None:
        super().__init__()
        if not exits or list(exits) != sorted(exits) or not 0 < exits[0] <= exits[-1] <= 1:
            raise InputError(f"exits {tuple(exits)}: expected ascending shares in (0, 1]")
        self.exits, self.num_draft, self.confidence = tuple(exits), num_draft, confidence

    def law(self, tokens: Tensor) -> Tensor:
        """See `ShortTarget`."""
        num = self.state.model.sizes.num_layers
        law = None
        for share in self.exits:
            layers = range(max(1, round(share * num)))
            found = self.shaped(self.state.draft(tokens, layers=layers)[:, -1])
            if law is None:
                law = found
            else:
                unsure = law.amax(-1).exp() < self.confidence
                law = torch.where(unsure[:, None], found, law)
            if none_left(law.amax(-1).exp() < self.confidence):
                break
        assert law is not None
        return law
