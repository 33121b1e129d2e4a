"""One pass of the token loop as a function of fixed shapes, which can be compiled or captured.

Root and drafts go in, the network runs over a preallocated cache, the rule decides, the books are
kept and the next drafts come out: all of it over preallocated buffers, with lengths on the device,
and nothing read back. Finished images stay in the batch, masked, until it shrinks to half.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from ..contracts import TakesFixedChains, TakesFixedTrees
from ..errors import InputError, as_integer, unknown_name
from .drafter import (
    LARGEST_TREE,
    Branches,
    Carries,
    Drafter,
    FixedDrafter,
    NeedsHidden,
    RepeatsLaws,
    WindowPolicy,
)
from .graphs import GraphPool, prepared
from .logits import laws_of, leave_guidance
from .noise import Noise
from .run import Run
from .tree import TokenTree, Topology, topology_of
from .verify import Round, Rule, Verdict

MODES = ("auto", "eager", "default", "reduce-overhead", "max-autotune")
MOST_KEPT = 16
"""Compiled steps that are kept, one for each (images, window); the oldest go first."""

ISOLATED = (
    {"isolate_recompiles": True}
    if "isolate_recompiles" in signature(torch.compile).parameters
    else {}
)
"""Compiled steps do not count as recompilations of one another; older torch lacks the word."""


@runtime_checkable
class MakesRoom(Protocol):
    """A state that has to be told of passes of fixed shapes before the first one of its shape."""

    def make_room(self, num: int, tree: Any) -> None:
        """Passes of `num` candidates follow: chains (None), or trees like this `Topology`."""
        ...


@runtime_checkable
class TellsFixedHidden(Protocol):
    """A state whose passes of fixed shapes tell `hidden`, where that is asked for."""

    hidden: Tensor | None
    keeps_hidden: bool
    """To be set before the first such pass."""


class FixedStep:
    """One pass of A images with `window` candidates each, over buffers of its own and of the run.

    Calling it makes a pass. The buffers keep their places, so that a captured pass can be replayed,
    also for another call: see `arvision.decoding.graphs`.

    Args:
        state: of the model, in whose rows the images stand.
        drafter: whose drafts follow from the last verdict, such as `JacobiDrafter`.
        rule: decides what is final; a rule for chains.
        shape: guided logits to log-probabilities.
        run: the ledger.
        images: [A] int64, which images of the run these are.
        noise: of these images.
        wanted: candidates that are asked for, the root included; the drafter may have fewer.
        first: drafts [A, window - 1] of the first pass.
    """

    unread = ("_asked",)

    def __init__(
        self,
        state: TakesFixedChains,
        drafter: Any,
        rule: Rule,
        shape: Callable[[Tensor], Tensor],
        run: Run,
        images: Tensor,
        noise: Noise,
        wanted: int,
        first: TokenTree,
    ) -> None:
        self.state, self.drafter, self.rule, self.shape = state, drafter, rule, shape
        self._asked = images
        self.run, self.images, self.noise = run, images, noise
        self.wanted, self.window = wanted, first.tokens.shape[1] + 1
        self.lengths = run.lengths[images]
        self.drafts, self.draft_logp = first.tokens.clone(), first.logq
        if self.draft_logp is not None:
            self.draft_logp = self.draft_logp.clone()
        self.topology, self.parents = None, first.parents
        if first.parents is not None and first.parents.dim() == 2:
            self.parents = first.parents.clone()
        elif first.parents is not None:
            self.topology = first.topology(images.device)
        self.rooted = None if self.topology is None else self.topology.with_root()
        self.num_levels, self.most_children = first.num_levels, first.most_children
        self.tells_hidden = isinstance(state, TellsFixedHidden) and any(
            isinstance(part, NeedsHidden) and part.needs_hidden for part in (drafter, rule)
        )
        if self.tells_hidden:
            cast(TellsFixedHidden, state).keeps_hidden = True
        leave_guidance(state, images)
        self.watches_drafts = not isinstance(drafter, RepeatsLaws)
        self.carried: list[Tensor] = []
        if isinstance(drafter, Carries):
            self.carried = [part.clone() for part in drafter.carry()]
        if isinstance(state, MakesRoom):
            state.make_room(self.window, self._tree()[1])
        self.ends = torch.full_like(self.lengths, run.num_tokens)
        self.counts = torch.zeros_like(self.lengths)
        self.number = torch.full((), run.num_passes + 1, dtype=torch.int64, device=images.device)
        self.offsets = torch.arange(self.window, device=images.device)
        # The drafter need not ask how many of its drafts are new: it makes all of them.
        self.given = [self.window]

    @property
    def size(self) -> tuple[int, int]:
        """Images and candidates."""
        return len(self.lengths), self.window

    @property
    def device(self) -> torch.device:
        """Of all buffers."""
        return self.lengths.device

    def is_other(self, images: Tensor, wanted: int) -> bool:
        """Whether a pass of these images needs another step, where `wanted` candidates are asked for."""
        return wanted != self.wanted or images is not self._asked

    def end(self, lengths: Sequence[int], ends: Sequence[int]) -> None:
        """Let the images stand at `lengths` [A] again, and draw each up to `ends` [A] only."""
        device = self.lengths.device
        self.lengths.copy_(torch.tensor(lengths, device=device))
        self.ends.copy_(torch.tensor(ends, device=device))

    def buffers(self) -> list[Tensor]:
        """Everything that a pass changes, apart from the cache behind the known tokens."""
        more = [] if self.draft_logp is None else [self.draft_logp]
        if self.topology is None and self.parents is not None:
            more.append(self.parents)
        own = [self.lengths, self.drafts, self.counts, self.number, *more, *self.carried]
        return [*own, *self.run.buffers()]

    @torch.no_grad()
    def __call__(self) -> None:
        """Make a pass; `counts` [A] then tells how many tokens became final."""
        run, lengths, drafter = self.run, self.lengths, self.drafter
        if self.carried:
            drafter.restore(self.carried)
        topology, rooted = self._tree()
        begin = lengths - 1
        root = run.tokens[self.images].gather(1, begin[:, None])
        fed = torch.cat([root, self.drafts.clamp(min=0)], dim=1)
        trees = [] if rooted is None else [rooted]
        laws = laws_of(self.shape, self.state.extend_fixed(fed, begin, *trees))
        if self.draft_logp is not None and self.watches_drafts:
            run.watch_laws(self.draft_logp)
        hidden = cast(TellsFixedHidden, self.state).hidden if self.tells_hidden else None
        places = lengths[:, None] + (self.offsets if rooted is None else rooted.depths)
        number: Any = self.number
        batch = Round(
            self.drafts, self.draft_logp, laws, places, self.noise, number, topology, hidden
        )
        verdict = self.rule(batch)
        run.watch_laws(laws)
        counts = torch.minimum(verdict.counts, self.ends - lengths)
        if verdict.path is not None:
            path = torch.nn.functional.pad(verdict.path + 1, (1, 0))
            cast(TakesFixedTrees, self.state).keep_fixed(path, counts, begin)
        run.record_rows(self.images, lengths, verdict.tokens, counts, number)
        run.count(self.images, counts)
        self.counts.copy_(counts)
        lengths.add_(counts)
        drafter.observe(batch, Verdict(verdict.tokens, counts, verdict.path, self.given))
        known = run.tokens[self.images]
        tree = drafter.propose(known, lengths, self.window - 1, number + 1)
        self.drafts.copy_(tree.tokens)
        if self.draft_logp is not None:
            self.draft_logp.copy_(tree.logq)
        if self.topology is None and self.parents is not None:
            self.parents.copy_(tree.parents)
        # From the oldest on, which is what was newer before and is written over next.
        left = drafter.carry() if self.carried else []
        for buffer, new in zip(reversed(self.carried), reversed(left), strict=True):
            if new is not buffer:  # else it was changed in place
                buffer.copy_(new)
        number.add_(1)

    def _tree(self) -> tuple[Topology | None, Topology | None]:
        """How the drafts hang together, without the root and with it; None for a chain."""
        if self.topology is not None or self.parents is None:
            return self.topology, self.rooted
        tree = topology_of(self.parents, self.num_levels, self.most_children)
        return tree, tree.with_root()


class Steps:
    """Makes fixed steps run in a mode, and keeps what was compiled for each (images, window).

    Args:
        mode: "eager" runs the step as it is; "default", "reduce-overhead" and "max-autotune" are
            those of `torch.compile`, without a graph break; "auto" captures a CUDA graph for each
            window on an NVIDIA GPU, and elsewhere leaves the ordinary loop as it is. Captured
            graphs are kept in `graphs` for later calls.
        reads_every: passes between two looks at how many images go on; passes after the last token
            of an image change nothing.

    Raises:
        InputError: an unknown mode, or no positive number of passes.
    """

    def __init__(self, mode: str = "auto", reads_every: int = 1) -> None:
        if mode not in MODES:
            raise unknown_name("mode of a step:", mode, MODES)
        number = as_integer(reads_every)
        if number is None or number < 1:
            raise InputError(f"reads_every {reads_every!r}: expected an integer >= 1")
        self.mode, self.reads_every = mode, number
        self._known: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self.graphs = GraphPool()

    def drives(self, device: torch.device) -> bool:
        """Whether this mode replaces the ordinary loop on that device."""
        return self.mode != "auto" or device.type == self.graphs.device_type

    def captures(self, device: torch.device) -> bool:
        """Whether graphs are captured on that device."""
        return self.mode == "auto" and self.drives(device)

    def ready(self, step: FixedStep) -> Callable[[], Any]:
        """What makes a pass of `step` in this mode."""
        if self.mode == "eager":
            return step
        if self.mode == "auto":
            return self.graphs.ready(step)
        key = (len(step.images), step.window)
        if key not in self._known:
            compiled = cast(Any, torch).compile(
                FixedStep.__call__,
                mode=self.mode,
                fullgraph=True,
                dynamic=False,
                **ISOLATED,
            )
            prepared(step, lambda: compiled(step))
            self._known[key] = compiled
            while len(self._known) > MOST_KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return partial(self._known[key], step)


def why_no_fixed_rounds(run: Run, state: Any, drafter: Any) -> str | None:
    """Why a run cannot be made of fixed steps; None where it can."""
    if run.given is not None:
        return "runs of given tokens are fed with the pass behind them"
    if not isinstance(state, TakesFixedChains):
        return "this model has no passes of fixed shapes"
    why = getattr(state, "why_not_fixed", None)
    if why is not None:
        return why
    if not isinstance(drafter, FixedDrafter) or not drafter.has_fixed_shapes:
        why = getattr(drafter, "why_not_fixed", None)
        return why or f"the drafts of {type(drafter).__name__} are made on the host"
    if _branches(drafter) and not isinstance(state, TakesFixedTrees):
        return "this model has no trees of fixed shapes"
    return None


def _branches(drafter: Any) -> bool:
    return isinstance(drafter, Branches) and drafter.branches


def fixed_rounds(
    rows: Any,
    state: Any,
    drafter: Drafter,
    rule: Rule,
    shape: Callable[[Tensor], Tensor],
    policy: WindowPolicy,
) -> tuple[int, list[int]]:
    """The rounds after the prefill, made of fixed steps; candidates and windows.

    Args:
        rows: which images are still being drawn, see `arvision.decoding.loop.decode_tokens`.
        state: of the model.
        drafter: whose drafts follow from the last verdict.
        rule: decides what is final; a rule for chains.
        shape: guided logits to log-probabilities.
        policy: length of a pass.
    """
    run, candidates, windows = rows.run, 0, []
    run.noise.reserve([0] * run.batch, 2 * run.num_tokens)
    ready, step = None, None
    try:
        while rows.num_going and not run.stopped:
            if step is not None and isinstance(drafter, Carries):
                drafter.restore(step.carried)
            rows.shrink(drafter)
            most = LARGEST_TREE if _branches(drafter) else run.num_tokens
            wanted = max(1, policy.next(rows.num_active, most))
            if ready is None or step is None or step.is_other(rows.active, wanted):
                known, lengths = rows.known()
                if isinstance(drafter, Carries):
                    drafter.fix(wanted)
                first = drafter.propose(known, lengths, wanted - 1, run.num_passes + 1)
                step = FixedStep(
                    state, drafter, rule, shape, run, rows.active, rows.noise, wanted, first
                )
                ready = run.steps.ready(step)
            for _ in range(run.steps.reads_every):
                ready()
                run.num_passes += 1
                windows.append(step.window)
            candidates += run.steps.reads_every * rows.num_active * step.window
            room = rows.room
            rows.catch_up(step)
            policy.observe(step.window, [a - b for a, b in zip(room, rows.room, strict=True)], room)
    finally:
        if step is not None and isinstance(drafter, Carries):
            # Where it stands is for other calls.
            drafter.restore([part.clone() for part in step.carried])
        run.leave_graphs()
    return candidates, windows
