"""What a round of text costs on this machine: drafting, the pass and the verdict, by rows and window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..contracts import Conditions, Sampler
from ..decoding.costs import MEASURING
from ..decoding.drafter import (
    Attached,
    Carries,
    Drafter,
    FixedDrafter,
    Hears,
    NeedsHidden,
    NoDrafter,
)
from ..decoding.loop import FixedWindow, decode_tokens
from ..decoding.noise import Noise
from ..decoding.run import Run
from ..decoding.tree import TokenTree
from ..decoding.verify import Round, Verdict, greedy
from ..decoding.window import WINDOWS as WIDTHS
from ..decoding.window import measured_costs, model_key, time_passes
from .model import HFCausalLM

WINDOWS = (1, 2, 4, 8, 16, 32, 65)
"""Candidates of a pass that `num_draft="auto"` chooses from; 1 is plain decoding."""

_MEASURED: dict[str, list[list[float]]] = {}


class Resting:
    """A drafter that is left alone from the round on in which nothing is asked of it.

    Plain decoding shall cost what plain decoding costs: a draft model does not read along.
    """

    def __init__(self, inner: Drafter) -> None:
        self._inner, self._rests = inner, False

    def start(self, noise: Noise, vocab_size: int, num_tokens: int) -> None:
        """A new batch begins."""
        self._rests = False
        self._inner.start(noise, vocab_size, num_tokens)

    def attach(self, state: Any, conditions: Conditions) -> None:
        """The prompts were read."""
        if isinstance(self._inner, Attached):
            self._inner.attach(state, conditions)

    def propose(self, tokens: Tensor, lengths: Tensor, num: int, round_number: int) -> TokenTree:
        """See `arvision.decoding.loop.Drafter`."""
        self._rests = self._rests or num == 0
        if self._rests:
            return TokenTree(tokens[:, :0])
        return self._inner.propose(tokens, lengths, num, round_number)

    @property
    def why_not_fixed(self) -> str | None:
        """Why drafts are not made by a function of fixed shapes."""
        if isinstance(self._inner, FixedDrafter) and self._inner.has_fixed_shapes:
            return None
        return getattr(self._inner, "why_not_fixed", "these drafts are made on the host")

    @property
    def has_fixed_shapes(self) -> bool:
        """See `arvision.decoding.drafter.FixedDrafter`."""
        return self.why_not_fixed is None

    @property
    def needs_hidden(self) -> bool:
        """See `arvision.decoding.drafter.NeedsHidden`."""
        return isinstance(self._inner, NeedsHidden) and self._inner.needs_hidden

    def fix(self, num: int) -> None:
        """See `arvision.decoding.drafter.Carries`."""
        if isinstance(self._inner, Carries):
            self._inner.fix(num)

    def carry(self) -> list[Tensor]:
        """What the drafter keeps."""
        return self._inner.carry() if isinstance(self._inner, Carries) else []

    def restore(self, carried: list[Tensor]) -> None:
        """Let the drafter go on from that."""
        if isinstance(self._inner, Carries):
            self._inner.restore(carried)

    def observe(self, batch: Round, verdict: Verdict) -> None:
        """Learn from a pass."""
        if not self._rests:
            self._inner.observe(batch, verdict)

    def asks(self, batch: Round, verdict: Verdict) -> Sequence[Tensor]:
        """See `arvision.decoding.drafter.Hears`."""
        if isinstance(self._inner, Hears) and not self._rests:
            return self._inner.asks(batch, verdict)
        return ()

    def hear(self, new: Sequence[list[int]], told: Sequence[list[int]]) -> None:
        """See `arvision.decoding.drafter.Hears`."""
        if isinstance(self._inner, Hears) and not self._rests:
            self._inner.hear(new, told)

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows`."""
        if not self._rests:
            self._inner.select(rows)


def label_of(drafter: Any) -> str:
    """What the cost of drafting depends on: the kind of drafter, its options, its models."""
    parts = [type(drafter).__name__]
    for name, value in sorted(vars(drafter).items()):
        # A tokenizer has a vocabulary, too.
        if hasattr(value, "cost_key") or (hasattr(value, "vocab_size") and hasattr(value, "grid")):
            parts.append(f"{name}={model_key(value)}")
        elif hasattr(value, "propose"):
            parts.append(f"{name}=({label_of(value)})")
        elif isinstance(value, int | float | str | tuple) and name not in (
            "num_tokens",
            "vocab_size",
        ):
            parts.append(f"{name}={value}")
    return " ".join(parts)


def round_costs(
    model: Any,
    label: str,
    make: Callable[[int], Sampler],
    prompts: Sequence[Tensor],
    most: int,
) -> list[list[float]]:
    """Rows [texts, candidates, seconds, tokens per pass] for `arvision.decoding.window.CostTable`.

    Measured once per model, drafter, number of threads and size of batch in a process: 1, 4, 16, ...
    texts up to the first number that is not less than the batch, whole rounds of a real run.

    Args:
        model: a text model.
        label: of drafter and rule, see `label_of`.
        make: a run with that many candidates in every pass.
        prompts: of the run; the first ones are used for measuring.
        most: candidates at most, the last known token not counted.
    """
    table = []
    rows = 1
    while True:
        key = f"{model_key(model)} {torch.get_num_threads()} threads {label} {rows} {most}"
        with MEASURING:
            if key not in _MEASURED:
                some = [prompts[row % len(prompts)] for row in range(rows)]
                _MEASURED[key] = [
                    [rows, window, *time_passes(make(window), model, some, 1.0)]
                    for window in WINDOWS
                    if window <= most + 1
                ]
        table += _MEASURED[key]
        if rows >= len(prompts):
            return table
        rows *= 4


class Copies(NoDrafter):
    """A chain of the last known token again and again: passes of a width, and nothing to draft."""

    def propose(self, tokens: Tensor, lengths: Tensor, num: int, round_number: int) -> TokenTree:
        """See `arvision.decoding.loop.Drafter`."""
        return TokenTree(tokens.gather(1, lengths[:, None] - 1).expand(-1, num))


def width_costs(model: HFCausalLM, num_rows: int) -> list[list[float]]:
    """Rows [texts, candidates, seconds, ...] of passes alone, whatever is drafted.

    Measured once per model and machine and kept, see `arvision.decoding.window.measured_costs`.
    """

    def make(width: int) -> Any:
        return lambda lm, conditions, *, seeds, guidance_scale, on_step: decode_tokens(
            lm,
            conditions,
            Run(len(conditions), lm.num_tokens, seeds, on_step),
            drafter=Copies(),
            rule=greedy,
            shape=lambda logits: logits,
            policy=FixedWindow(width),
        )

    prompt = [0] * 32
    room = model.sizes.num_positions - len(prompt)
    lm = HFCausalLM(model.called, min(max(WIDTHS), room))
    return measured_costs(make, "passes of copies", lm, [prompt] * num_rows, 1.0)
