"""One pass of the token loop as a function of fixed shapes, which can be compiled or captured.

Root and drafts go in, the network runs over a preallocated cache, the rule decides, the books are
kept and the next drafts come out: all of it over preallocated buffers, with lengths on the device,
and nothing read back. Finished images stay in the batch, masked, until it shrinks to half.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..contracts import TakesFixedChains
from ..errors import unknown_name
from .noise import Noise
from .run import Run
from .verify import Round, Rule, Verdict

MODES = ("auto", "eager", "default", "reduce-overhead", "max-autotune")
MOST_KEPT = 16
"""Compiled or captured steps that are kept, one for each (images, window); the oldest go first."""

WARM_UP = 3
"""Passes before a graph is captured, as CUDA's libraries choose their kernels in the first ones."""


class FixedStep:
    """One pass of A images with `window` candidates each, over buffers of its own and of the run.

    Calling it makes a pass. The buffers keep their places, so that a captured pass can be replayed.

    Args:
        state: of the model, in whose rows the images stand.
        drafter: whose drafts follow from the last verdict, such as `JacobiDrafter`.
        rule: decides what is final; a rule for chains.
        shape: guided logits to log-probabilities.
        run: the ledger.
        images: [A] int64, which images of the run these are.
        noise: of these images.
        window: candidates of each image, the root included.
        first: drafts [A, window - 1] of the first pass, and their laws [A, window - 1, V] or None.
    """

    def __init__(
        self,
        state: TakesFixedChains,
        drafter: Any,
        rule: Rule,
        shape: Callable[[Tensor], Tensor],
        run: Run,
        images: Tensor,
        noise: Noise,
        window: int,
        first: tuple[Tensor, Tensor | None],
    ) -> None:
        self.state, self.drafter, self.rule, self.shape = state, drafter, rule, shape
        self.run, self.images, self.noise, self.window = run, images, noise, window
        self.lengths = run.lengths[images]
        self.drafts, self.draft_logp = first[0].clone(), first[1]
        if self.draft_logp is not None:
            self.draft_logp = self.draft_logp.clone()
        self.counts = torch.zeros_like(self.lengths)
        self.number = torch.full((), run.num_passes + 1, dtype=torch.int64, device=images.device)
        self.offsets = torch.arange(window, device=images.device)
        # The drafter need not ask how many of its drafts are new: it makes all of them.
        self.given = [window]

    def is_other(self, images: Tensor, window: int) -> bool:
        """Whether a pass of these images and this window needs another step."""
        return window != self.window or images is not self.images

    def buffers(self) -> list[Tensor]:
        """Everything that a pass changes, apart from the cache behind the known tokens."""
        laws = [] if self.draft_logp is None else [self.draft_logp]
        return [self.lengths, self.drafts, self.counts, self.number, *laws, *self.run.buffers()]

    @torch.no_grad()
    def __call__(self) -> None:
        """Make a pass; `counts` [A] then tells how many tokens became final."""
        run, lengths = self.run, self.lengths
        root = run.tokens[self.images].gather(1, lengths[:, None] - 1)
        fed = torch.cat([root, self.drafts], dim=1)
        laws = self.shape(self.state.extend_fixed(fed, lengths - 1))
        run.watch_laws(laws)
        places = lengths[:, None] + self.offsets
        number: Any = self.number
        batch = Round(self.drafts, self.draft_logp, laws, places, self.noise, number)
        verdict = self.rule(batch)
        counts = torch.minimum(verdict.counts, run.num_tokens - lengths)
        run.record_rows(self.images, lengths, verdict.tokens, counts, number)
        run.count(self.images, counts)
        self.counts.copy_(counts)
        lengths.add_(counts)
        self.drafter.observe(batch, Verdict(verdict.tokens, counts, None, self.given))
        known = run.tokens[self.images]
        tree = self.drafter.propose(known, lengths, self.window - 1, number + 1)
        self.drafts.copy_(tree.tokens)
        if self.draft_logp is not None:
            self.draft_logp.copy_(tree.logq)
        number.add_(1)


class Steps:
    """Makes fixed steps run in a mode, and keeps what was compiled for each (images, window).

    Args:
        mode: "eager" runs the step as it is; "default", "reduce-overhead" and "max-autotune" are
            those of `torch.compile`, without a graph break; "auto" captures a CUDA graph on an
            NVIDIA GPU, and elsewhere leaves the ordinary loop as it is.
        reads_every: passes between two looks at how many images go on.

    Raises:
        InputError: an unknown mode.
    """

    def __init__(self, mode: str = "auto", reads_every: int = 1) -> None:
        if mode not in MODES:
            raise unknown_name("mode of a step:", mode, MODES)
        self.mode, self.reads_every = mode, reads_every
        self._compiled: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def drives(self, device: torch.device) -> bool:
        """Whether this mode replaces the ordinary loop on that device."""
        return self.mode != "auto" or device.type == "cuda"

    def ready(self, step: FixedStep) -> Callable[[], None]:
        """What makes a pass of `step` in this mode."""
        if self.mode == "eager":
            return step
        if self.mode == "auto":
            return capture(step)
        key = (len(step.images), step.window)
        if key not in self._compiled:
            self._compiled[key] = torch.compile(
                FixedStep.__call__,
                mode=self.mode,
                fullgraph=True,
                dynamic=False,
                isolate_recompiles=True,
            )
        self._compiled.move_to_end(key)
        while len(self._compiled) > MOST_KEPT:
            self._compiled.popitem(last=False)
        compiled = self._compiled[key]
        return lambda: compiled(step)


def capture(step: FixedStep) -> Callable[[], None]:
    """A CUDA graph of `step`: what it replays changes the same buffers."""
    kept = [buffer.clone() for buffer in step.buffers()]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for buffer, old in zip(step.buffers(), kept, strict=True):
        buffer.copy_(old)
    return graph.replay
