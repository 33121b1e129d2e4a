"""The one decoding loop of token models: draft, extend, verify, commit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..contracts import Conditions, Samples, Seeds, Stats, StepCallback, TokenModel
from ..errors import InputError
from .noise import Noise
from .tree import TokenTree, Topology, is_chain, topology
from .verify import Round, Rule, Verdict


class Drafter(Protocol):
    """Proposes the tokens that the target verifies.

    A drafter may also offer `attach(state, conditions)`, called once after the prefill, if it looks
    at the prompts or drafts with the help of the target's own state.
    """

    def start(self, noise: Noise, vocab_size: int, num_tokens: int) -> None:
        """A new batch of images begins."""
        ...

    def propose(self, tokens: Tensor, lengths: Tensor, num: int, round_number: int) -> TokenTree:
        """Drafts for the positions after the known ones: a chain or a tree of at most `num`.

        Where a row has fewer than others there is -1.

        Args:
            tokens: [B, N], of which `tokens[b, :lengths[b]]` are final.
            lengths: [B].
            num: drafts wanted.
            round_number: of this round; the prefill is 0.
        """
        ...

    def observe(self, batch: Round, verdict: Verdict, /) -> None:
        """Learn from a round."""
        ...

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows`, the others are finished."""
        ...


class NoDrafter:
    """Drafts nothing: the loop is then plain autoregressive sampling."""

    def start(self, noise: Noise, vocab_size: int, num_tokens: int) -> None:
        """Nothing to prepare."""

    def propose(self, tokens: Tensor, lengths: Tensor, num: int, round_number: int) -> TokenTree:
        """No drafts, [B, 0]."""
        return TokenTree(tokens[:, :0])

    def observe(self, chain: Round, verdict: Verdict) -> None:
        """Nothing to learn."""

    def select(self, rows: Tensor) -> None:
        """Nothing to drop."""


class WindowPolicy(Protocol):
    """How many candidates, the last known token included, a pass may hold."""

    def next(self, num_rows: int, most: int) -> int:
        """Candidates of the next pass of `num_rows` images, at most `most`."""
        ...

    def observe(self, num_candidates: int, counts: Tensor, num_useful: Tensor) -> None:
        """Counts [B] of final tokens that a pass gave, of at most `num_useful` [B] possible."""
        ...


class FixedWindow:
    """The same number of candidates in every pass."""

    def __init__(self, window: int) -> None:
        self.window = window

    def next(self, num_rows: int, most: int) -> int:
        """The window, cut to what the images still need."""
        return min(self.window, most)

    def observe(self, num_candidates: int, counts: Tensor, num_useful: Tensor) -> None:
        """Nothing to adapt."""


StopCheck = Callable[[Tensor, Tensor, Tensor], "tuple[Tensor, Tensor]"]
"""Ends rows before their last token: rows [B'] of the batch, new tokens [B', K] and their counts
[B'] to the counts that stay, and which rows are finished, [B'] bool."""


def decode_tokens(
    model: TokenModel,
    conditions: Conditions,
    *,
    drafter: Drafter,
    rule: Rule,
    shape: Callable[[Tensor], Tensor],
    policy: WindowPolicy,
    seeds: Seeds,
    guidance_scale: float = 1.0,
    on_step: StepCallback | None = None,
    num_tokens: int | None = None,
    stop: StopCheck | None = None,
) -> Samples:
    """Draw one image per condition.

    A round drafts a chain or a tree behind the last known token, asks the model for the laws along it in one
    pass, lets the rule decide what is final, and commits that, row by row. Finished rows leave the
    batch where the state can drop rows.

    Args:
        model: a token model.
        conditions: one per image.
        drafter: proposes chains or trees.
        rule: decides what is final.
        shape: guided logits to log-probabilities.
        policy: length of a pass.
        seeds: one per image.
        guidance_scale: weight of the conditional logits.
        on_step: called after each pass; a true answer stops the run, tokens not drawn yet stay 0.
        num_tokens: tokens of a row, those of the model by default.
        stop: ends rows early.

    Returns:
        Tokens [B, N]; stats: `forward_passes` (model calls on image tokens, without the prefill),
        `tokens` (N), `tokens_per_pass` (N over the mean number of passes that an image took part
        in), `passes_per_image` [B], `commit_pass` [B][N] (the pass that made each token final, 0
        for the prefill), `candidates` (tokens fed, all rows and passes), `windows` (candidates
        per image of each pass), `lengths` [B] (tokens drawn).

    Raises:
        InputError: another number of seeds than of conditions.
    """
    if len(seeds) != len(conditions):
        raise InputError(f"{len(seeds)} seeds for {len(conditions)} conditions: expected one each")
    state, logits = model.start(conditions, guidance_scale)
    num_tokens = num_tokens or model.num_tokens
    run = _Run(logits.device, len(conditions), num_tokens, seeds, stop)
    drafter.start(run.noise, model.vocab_size, num_tokens)
    if hasattr(drafter, "attach"):
        drafter.attach(state, conditions)  # pyright: ignore[reportAttributeAccessIssue]
    prefill = _prefill_chain(logits, shape, run.noise, getattr(state, "hidden", None))
    first = run.curtail(rule(prefill))
    going = run.record(first, pass_number=0)
    drafter.observe(prefill, first)
    _leave(run, state, drafter, going)
    can_overrun = getattr(state, "allows_overrun", False)
    passes, candidates = 0, 0
    windows: list[int] = []
    while run.num_active:
        passes += 1
        room = run.room()
        # With a draft even for the last token, an image does not depend on how long others take.
        most = int(room.max()) + 1 if can_overrun else min(int(room.min()), run.frozen_room)
        num = max(1, policy.next(run.num_active, most))
        known, lengths = run.known()
        tree = drafter.propose(known, lengths, num - 1, passes)
        drafts = tree.tokens
        # A drafter may have less to say than asked: the pass shrinks to what there is.
        num = drafts.shape[1] + 1
        root = known.gather(1, lengths[:, None] - 1)
        fed = run.spread(torch.cat([root, drafts.clamp(min=0)], dim=1))
        parents, offsets, shape_of_tree = _layout(tree, lengths.device)
        logits = state.extend(fed) if parents is None else state.extend(fed, parents)
        laws = shape(logits[run.in_state])
        candidates += laws.shape[0] * num
        windows.append(num)
        positions = lengths[:, None] + offsets
        hidden = getattr(state, "hidden", None)
        hidden = None if hidden is None else hidden[run.in_state]
        batch = Round(drafts, tree.logq, laws, positions, run.noise, passes, shape_of_tree, hidden)
        verdict = rule(batch)
        useful = (num_tokens - lengths).clamp(max=num)
        counts = torch.minimum(verdict.counts, useful)
        verdict = run.curtail(Verdict(verdict.tokens, counts, verdict.path))
        policy.observe(num, verdict.counts, useful)
        going = run.record(verdict, pass_number=passes)
        drafter.observe(batch, verdict)
        wants_stop = on_step is not None and on_step(passes, run.progress(verdict))
        _commit(state, run, verdict, going, num)
        _leave(run, state, drafter, going)
        if wants_stop:
            break
    stats = Stats(
        forward_passes=passes,
        tokens=num_tokens,
        tokens_per_pass=num_tokens / max(1e-9, float(run.passes.double().mean())),
        passes_per_image=run.passes.tolist(),
        commit_pass=run.commit_pass.tolist(),
        candidates=candidates,
        windows=windows,
        lengths=run.final_lengths.tolist(),
    )
    return Samples(run.tokens, stats)


def _leave(run: _Run, state: Any, drafter: Drafter, going: Tensor) -> None:
    """Let finished rows leave the run, the state and the drafter."""
    if bool(going.all()):
        return
    keep = going.nonzero()[:, 0]
    drafter.select(keep)
    run.drop(state, keep)


def _layout(tree: TokenTree, device: torch.device) -> tuple[Tensor | None, Tensor, Topology | None]:
    """How a pass is laid out: parents [1 + T] of the root and the drafts (None for a chain), how
    far behind the known tokens each law stands [1 + T], and the topology of the drafts."""
    num = tree.tokens.shape[1]
    own = None if tree.parents is None else tuple(tree.parents.tolist())
    if own is None or is_chain(own):
        return None, torch.arange(num + 1, device=device), None
    assert tree.parents is not None
    shape = topology(own, device)
    root = tree.parents.new_full((1,), -1)
    parents = torch.cat([root, tree.parents + 1]).to(device)
    return parents, torch.cat([root.to(device) + 1, shape.depths + 1]), shape


def _prefill_chain(
    logits: Tensor, shape: Callable[[Tensor], Tensor], noise: Noise, hidden: Tensor | None
) -> Round:
    """A chain without drafts: the prefill's law of the first token."""
    laws = shape(logits)[:, None]
    positions = torch.zeros(len(logits), 1, dtype=torch.int64, device=logits.device)
    return Round(positions[:, :0], laws[:, :0], laws, positions, noise, 0, hidden=hidden)


def _commit(state: Any, run: _Run, verdict: Verdict, going: Tensor, num: int) -> None:
    """Keep the root and the accepted drafts; the last final token is the root of the next round.

    Rows that are finished keep nothing: they leave, or wait where they are.
    """
    counts = torch.where(going, verdict.counts, 0)
    if verdict.path is None:
        kept = torch.arange(num, device=counts.device).expand(run.num_in_state, num)
    else:
        root = verdict.path.new_zeros(len(verdict.path), 1)
        path = torch.cat([root, verdict.path + 1], dim=1)
        kept = run.spread(path)
    state.commit(kept, run.spread(counts))


class _Run:
    """Bookkeeping of a batch: what is final, which rows are still going, where they stand."""

    def __init__(
        self,
        device: torch.device,
        batch: int,
        num_tokens: int,
        seeds: Seeds,
        stop: StopCheck | None,
    ) -> None:
        self.num_tokens = num_tokens
        self._stop, self._stopped = stop, None
        self.final_lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(batch, num_tokens, dtype=torch.int64, device=device)
        self.commit_pass = torch.zeros_like(self.tokens)
        self.passes = torch.zeros(batch, dtype=torch.int64, device=device)
        self.noise = Noise(seeds, device)
        self.active = torch.arange(batch, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.in_state: Any = slice(None)
        self.num_in_state = batch
        self.frozen_room = num_tokens

    @property
    def num_active(self) -> int:
        """Rows that are not finished."""
        return len(self.active)

    def room(self) -> Tensor:
        """Candidates [B'] that each active row can use: one per position still to be drawn."""
        return self.num_tokens - self.lengths

    def known(self) -> tuple[Tensor, Tensor]:
        """Tokens [B', N] and lengths [B'] of the active rows."""
        whole = len(self.active) == len(self.tokens)
        return (self.tokens if whole else self.tokens[self.active]), self.lengths

    def spread(self, rows: Tensor) -> Tensor:
        """Values of the active rows [B', ...] laid out over the rows of the state, 0 elsewhere."""
        if isinstance(self.in_state, slice):
            return rows
        out = rows.new_zeros(self.num_in_state, *rows.shape[1:])
        out[self.in_state] = rows
        return out

    def curtail(self, verdict: Verdict) -> Verdict:
        """What is left of a verdict where the run's `stop` ends a row."""
        if self._stop is None:
            return verdict
        counts, self._stopped = self._stop(self.active, verdict.tokens, verdict.counts)
        return Verdict(verdict.tokens, counts, verdict.path)

    def record(self, verdict: Verdict, pass_number: int) -> Tensor:
        """Write final tokens down; which active rows are still going, [B'] bool."""
        num = verdict.tokens.shape[1]
        offsets = torch.arange(num, device=self.lengths.device)
        rows, places = (offsets < verdict.counts[:, None]).nonzero(as_tuple=True)
        where = (self.active[rows], self.lengths[rows] + places)
        self.tokens[where] = verdict.tokens[rows, places]
        self.commit_pass[where] = pass_number
        if pass_number > 0:
            self.passes[self.active] += 1
        self.lengths = self.lengths + verdict.counts
        self.final_lengths[self.active] = self.lengths
        going = self.lengths < self.num_tokens
        return going if self._stopped is None else going & ~self._stopped

    def drop(self, state: Any, keep: Tensor) -> None:
        """Let the finished rows leave; rows `keep` of the active ones stay."""
        if not hasattr(state, "select"):
            # They stay in the batch with what they had committed before their last pass.
            if isinstance(self.in_state, slice):
                self.in_state = torch.arange(self.num_in_state, device=keep.device)
            self.in_state = self.in_state[keep]
            waiting = int(state.lengths.max())
            self.frozen_room = self.num_tokens - 1 - waiting
        else:
            state.select(keep)
            self.num_in_state = len(keep)
        self.active, self.lengths = self.active[keep], self.lengths[keep]
        self.noise = self.noise.select(keep)

    def progress(self, verdict: Verdict) -> dict[str, Any]:
        """Figures for progress bars."""
        done = self.num_tokens * (len(self.tokens) - len(self.active)) + int(self.lengths.sum())
        return {
            "finished": done,
            "total": self.tokens.numel(),
            "accepted": verdict.counts.tolist(),
            "tokens": self.tokens,
            "lengths": self.final_lengths,
        }
