"""The target without some attentions and MLPs drafts for itself; which ones is found on the fly."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ....decoding.tree import TokenTree
from ....decoding.verify import Round, Verdict
from ....errors import InputError
from ...layers import Parts
from ..base import register
from .short_target import ShortTarget

Bits = tuple[bool, ...]
"""What runs: the attentions of all layers, then their MLPs."""


@register("layer_skip", summary="the target without some attentions and MLPs (SWIFT)")
class LayerSkip(ShortTarget):
    """The target with some attentions and MLPs skipped drafts for itself.

    Which ones: sets are tried on recent context (the last `context` tokens are read again, and what
    the short model would have said is compared with what came: the matching ratio). Sets are drawn at
    random, and every `bayes_every` trials the next one is that of the largest expected improvement
    under a Gaussian process over the sets, whose kernel falls with the number of parts in which two
    differ. The search ends after `trials`, or with a set that matches `enough`.

    A chain ends early, behind the first draft of which the short model is not sure.

    Args:
        skip: share of the attentions and MLPs skipped; those of the first and the last layer run.
        num_draft: longest chain.
        confidence: probability below which a draft is the last of its chain.
        trials: sets tried in all texts together.
        context: tokens that a trial reads.
        bayes_every: see above.
        enough: see above.
        whole: skip attention and MLP of a layer together only.
        layers: the layers that run, ascending, if they are known; nothing is tried then.
        seed: of the sets tried.

    Raises:
        InputError: a value out of range.

    Paper: Xia et al., "SWIFT: On-the-Fly Self-Speculative Decoding for LLM Inference Acceleration",
    2024, section 4.
    """

    def __init__(
        self,
        skip: float = 0.4,
        num_draft: int = 4,
        confidence: float = 0.6,
        trials: int = 24,
        context: int = 24,
        bayes_every: int = 4,
        enough: float = 0.95,
        whole: bool = False,
        layers: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= skip < 1 or num_draft < 1 or not 0 <= confidence <= 1 or context < 2:
            raise InputError(
                f"skip {skip}, num_draft {num_draft}, confidence {confidence}, context {context}: "
                "expected 0 <= skip < 1, num_draft >= 1, a probability, context >= 2"
            )
        if bayes_every < 1 or not 0 < enough <= 1:
            raise InputError(
                f"bayes_every {bayes_every}, enough {enough}: expected a number >= 1 and a ratio"
            )
        self.skip, self.num_draft, self.confidence = skip, num_draft, confidence
        self.trials, self.context, self.whole = trials, context, whole
        self.bayes_every, self.enough = bayes_every, enough
        self._given = None if layers is None else list(layers)
        self._random = random.Random(seed)
        self._found: list[tuple[Bits, float]] = []
        self._trial: tuple[Bits, Tensor, int] | None = None

    def begin(self, state: Any) -> None:
        """Start with parts skipped evenly, or with the best set of earlier texts."""
        super().begin(state)
        self._trial = None
        num = state.model.sizes.num_layers
        if self._given is not None and not all(0 <= layer < num for layer in self._given):
            raise InputError(f"layers {self._given}: the model has {num}")
        self._num_layers = num
        self._num_skipped = min(2 * max(0, num - 2), round(self.skip * 2 * num))
        if self._found and len(self._found[0][0]) != 2 * num:
            self._found = []

    @property
    def bits(self) -> Bits:
        """What runs at present."""
        num = self._num_layers
        if self._given is not None:
            return tuple(layer in self._given for layer in range(num)) * 2
        if self._found:
            return max(self._found, key=lambda item: item[1])[0]
        units = self._units()
        count = self._count(units)
        return self._without([units[int(len(units) / max(1, count) * k)] for k in range(count)])

    def parts(self, bits: Bits) -> Parts:
        """The parts that `bits` leave."""
        halves = bits[: self._num_layers], bits[self._num_layers :]
        found = (tuple(n for n, runs in enumerate(half) if runs) for half in halves)
        return Parts(*found)

    def law(self, tokens: Tensor) -> Tensor:
        """See `ShortTarget`."""
        return self.shaped(self.state.draft(tokens, layers=self.parts(self.bits))[:, -1])

    def propose(self, tokens: Tensor, lengths: Tensor, num: int, round_number: int) -> TokenTree:
        """Try a set of parts now and then, and draft with the best."""
        is_open = self._given is None and self._num_skipped and len(self._found) < self.trials
        if is_open and not (self._found and self._best[1] >= self.enough):
            self._try(tokens)
        return super().propose(tokens, lengths, num, round_number)

    @property
    def _best(self) -> tuple[Bits, float]:
        return max(self._found, key=lambda item: item[1])

    def _try(self, tokens: Tensor) -> None:
        if self.state.least_committed() < self.context:
            return
        bits = self._next_set()
        said, came = self.state.replay(tokens, self.context, self.parts(bits))
        self._trial = (bits, (said == came).sum(), came.numel())

    def asks(self, batch: Round, verdict: Verdict) -> Sequence[Tensor]:
        """How many tokens a set of parts that was tried said right."""
        return [] if self._trial is None else [self._trial[1]]

    def hear(self, new: Sequence[list[int]], told: Sequence[list[int]]) -> None:
        """Note how good the set was."""
        if self._trial is not None:
            self._found.append((self._trial[0], told[0][0] / self._trial[2]))
            self._trial = None
        super().hear(new, told)

    def _next_set(self) -> Bits:
        """The first set, a random one, or every `bayes_every` trials the most promising candidate."""
        if not self._found:
            return self.bits
        if len(self._found) % self.bayes_every:
            return self._random_set()
        best = self._best
        candidates = [self._random_set() for _ in range(32)]
        candidates += [self._swapped(best[0]) for _ in range(32)]
        gains = expected_improvement(
            np.array([bits for bits, _ in self._found], dtype=float),
            np.array([score for _, score in self._found]),
            np.array(candidates, dtype=float),
            best[1],
        )
        return candidates[int(gains.argmax())]

    def _units(self) -> list[tuple[int, ...]]:
        """What is skipped or not, as numbers of bits: single parts, or both of a layer."""
        num = self._num_layers
        pairs = [(layer, num + layer) for layer in range(1, num - 1)]
        return pairs if self.whole else [(part,) for pair in pairs for part in pair]

    def _count(self, units: Sequence[tuple[int, ...]]) -> int:
        return self._num_skipped // len(units[0]) if units else 0

    def _without(self, units: Sequence[tuple[int, ...]]) -> Bits:
        left_out = {part for unit in units for part in unit}
        return tuple(part not in left_out for part in range(2 * self._num_layers))

    def _random_set(self) -> Bits:
        units = self._units()
        return self._without(self._random.sample(units, self._count(units)))

    def _swapped(self, bits: Bits) -> Bits:
        """`bits` with one unit skipped for another."""
        units = self._units()
        on = [unit for unit in units if bits[unit[0]]]
        off = [unit for unit in units if not bits[unit[0]]]
        if on and off:
            off[self._random.randrange(len(off))] = self._random.choice(on)
        return self._without(off)


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
    reach = max(1.0, tried.shape[1] / 5)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.exp(-np.abs(a[:, None] - b[None]).sum(-1) / reach)

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
