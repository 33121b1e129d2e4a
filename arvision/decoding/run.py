"""The ledger of one run: whose images are drawn, what is final, and what it cost.

Every loop keeps its books here: the token loop, several rows at once, scales, latents and students.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from ..contracts import Samples, Seeds, Stats, StepCallback
from ..errors import InputError
from ..kernels.sampling import Laws
from .given import Given
from .noise import Noise


class Run:
    """One call of a sampler over a batch of B images of N tokens.

    A loop calls `begin` once it knows the device, then for every pass of the model `next_pass`,
    `record` for what became final, and `report`.

    Args:
        batch: B.
        num_tokens: N, tokens (or latents) of an image.
        seeds: one per image, an integer or a pair (seed, image).
        on_step: see `arvision.contracts.StepCallback`.
        guidance_scale: weight of the condition, for the models.
        steps: how passes of fixed shapes run, see `arvision.decoding.fixed_step.Steps`; None for the
            ordinary loop.
        given: tokens that are not drawn; None for none.

    Attributes:
        noise: of the B images.
        tokens: [B, N] int64, [B, N, d] for bits, or [B, N, D] for latents; 0 where nothing is final yet,
            given tokens from the start.
        commit_pass: [B, N] int64, the pass that made a token final; 0 for the prefill.
        lengths: [B] int64, final tokens of each image, in the order of drawing.
        passes: [B] int64, passes that an image took part in.
        num_passes: of the model so far.
        stopped: whether `on_step` asked for the end.
        warm_up: seconds that compiling and capturing took.

    Raises:
        InputError: another number of seeds than of images.
    """

    unread = ("seeds", "guidance_scale", "given", "steps", "_on_step", "num_passes", "stopped")
    unread += ("_num_final", "warm_up", "_is_no_tree", "_is_placed")

    noise: Noise
    tokens: Tensor
    commit_pass: Tensor
    lengths: Tensor
    passes: Tensor

    def __init__(
        self,
        batch: int,
        num_tokens: int,
        seeds: Seeds,
        on_step: StepCallback | None = None,
        *,
        guidance_scale: Any = 1.0,
        steps: Any = None,
        given: Given | None = None,
    ) -> None:
        if len(seeds) != batch:
            raise InputError(f"{len(seeds)} seeds for {batch} conditions: expected one each")
        if given is not None and given.mask.shape != (batch, num_tokens):
            raise InputError(
                f"given tokens {tuple(given.mask.shape)}: expected [{batch}, {num_tokens}], those of "
                "all images"
            )
        self.batch, self.num_tokens, self.seeds = batch, num_tokens, seeds
        self.given = given
        self.guidance_scale, self._on_step, self.steps = guidance_scale, on_step, steps
        self.num_passes, self.stopped = 0, False
        self._num_final, self.warm_up = 0, 0.0

    def begin(
        self,
        device: torch.device | str,
        entry: Sequence[int] = (),
        dtype: torch.dtype = torch.int64,
    ) -> None:
        """Open the books on a device.

        Args:
            device: of all tensors.
            entry: shape of one token: () for a code, (d,) for bits, (D,) for a latent.
            dtype: of the tokens.
        """
        self.noise = Noise(self.seeds, device)
        shape = (self.batch, self.num_tokens + 1)
        self._commit_pass = torch.zeros(shape, dtype=torch.int64, device=device)
        self.commit_pass = self._commit_pass[:, :-1]
        self.lengths = torch.zeros(self.batch, dtype=torch.int64, device=device)
        self.passes = torch.zeros_like(self.lengths)
        self._tokens = torch.zeros(*shape, *entry, dtype=dtype, device=device)
        self.tokens = self._tokens[:, :-1]
        self._is_placed: Tensor | None = None
        self._is_broken = torch.zeros(1, dtype=torch.bool, device=device)
        self._is_no_tree: Tensor | None = None
        if self.given is not None:
            self._take_given(tuple(entry))

    def _take_given(self, entry: tuple[int, ...]) -> None:
        """Write the given tokens down.

        Raises:
            InputError: tokens of another shape.
        """
        assert self.given is not None
        self.given = given = self.given.to(self._tokens.device)
        if given.values.shape[2:] != entry:
            raise InputError(
                f"given tokens {tuple(given.values.shape)}: expected [B, N{''.join(f', {n}' for n in entry)}]"
            )
        self.tokens[given.mask] = given.values[given.mask].to(self._tokens.dtype)

    def skip(self, counts: Sequence[int]) -> None:
        """So many given tokens [B] are final before the first pass, in the order of drawing."""
        self.lengths += torch.tensor(counts, device=self.lengths.device)
        self._num_final += sum(counts)

    def reopen(self, places: Sequence[int], seeds: Seeds) -> None:
        """Begin other images in some places, whose images are finished.

        Args:
            places: of the new images.
            seeds: one for each.
        """
        index = torch.tensor(list(places), device=self.tokens.device)
        self.noise.replace(index, seeds)
        for book in (self._tokens, self._commit_pass, self.lengths, self.passes):
            book[index] = 0

    def next_pass(self, images: Tensor | None = None) -> None:
        """The model is called once more, for `images` [A]; None for all."""
        self.num_passes += 1
        if images is None:
            self.passes += 1
        else:
            self.passes[images] += 1

    def record(self, images: Tensor, positions: Tensor, tokens: Tensor) -> None:
        """Write down what the current pass made final.

        Args:
            images: which image each entry belongs to, broadcastable to `positions`.
            positions: its place in the image.
            tokens: like `positions`; with a last dimension D for latents.
        """
        if self.tokens.dtype != tokens.dtype:
            self._tokens = self._tokens.to(tokens.dtype)
            self.tokens = self._tokens[:, :-1]
        self.tokens[images, positions] = tokens
        if self._is_placed is None:
            self._is_placed = torch.zeros_like(self.commit_pass, dtype=torch.bool)
        self._is_placed[images, positions] = True
        self.commit_pass[images, positions] = self.num_passes

    def record_rows(
        self,
        images: Tensor,
        starts: Tensor,
        tokens: Tensor,
        counts: Tensor,
        number: Tensor | None = None,
    ) -> None:
        """Write down a row of tokens for each image, of which some are final; reads nothing back.

        Args:
            images: [A].
            starts: [A], place of the first token of each row.
            tokens: [A, K].
            counts: [A], how many from the left are final; the rest is dropped.
            number: of the pass, where only the device knows it.
        """
        offsets = torch.arange(tokens.shape[1], device=starts.device)
        # What is dropped lands in a column behind the last token.
        places = torch.where(offsets < counts[:, None], starts[:, None] + offsets, self.num_tokens)
        rows = images[:, None]
        self._tokens[rows, places] = tokens.to(self._tokens.dtype)
        self._commit_pass[rows, places] = self.num_passes if number is None else number

    def record_block(self, start: int, tokens: Tensor, count: int) -> None:
        """`record_rows` of all images at once: the first `count` of tokens [B, K], at `start`."""
        places = slice(start, start + count)
        self._tokens[:, places] = tokens[:, :count]
        self._commit_pass[:, places] = self.num_passes

    def count(self, images: Tensor, counts: Tensor) -> None:
        """Keep the books of a pass that gave `counts` [A] tokens of `images` [A]; reads nothing."""
        self.lengths.index_add_(0, images, counts)
        self.passes.index_add_(0, images, (counts > 0).long())

    def forget(self, images: Tensor, lengths: Tensor) -> None:
        """What stands behind the first `lengths` [A] tokens of images [A] was never drawn."""
        order = torch.arange(self._tokens.shape[1], device=lengths.device)
        is_past = order >= lengths[:, None]
        for book in (self._tokens, self._commit_pass):
            book[images] = book[images].masked_fill(is_past, 0)
        self.lengths[images] = lengths

    def buffers(self) -> list[Tensor]:
        """Everything that `record_rows`, `count` and `watch_laws` change."""
        return [self._tokens, self._commit_pass, self.lengths, self.passes, self._is_broken]

    def move_out(self) -> None:
        """Keep the books in memory of their own; where they stood is for other calls."""
        books = [part.clone() for part in self.buffers()]
        self._tokens, self._commit_pass, self.lengths, self.passes, self._is_broken = books
        self.tokens, self.commit_pass = self._tokens[:, :-1], self._commit_pass[:, :-1]

    def watch(self, values: Tensor) -> None:
        """Remember whether any of `values` is NaN or infinite; `check` reads it."""
        self._is_broken |= ~values.isfinite().all()

    def watch_laws(self, laws: Tensor | Laws) -> None:
        """Remember whether any of the laws [..., V] is none; `check` reads it.

        A law made of NaN, of +inf or of -inf alone is NaN everywhere, so one entry tells. Of laws
        that are not written the norm does, which a draw leaves: let it come first.
        """
        if isinstance(laws, Laws):
            self._is_broken |= laws.norms.isnan().any()
            return
        self._is_broken |= laws[..., 0].isnan().any()

    def watch_tree(self, is_wrong: Tensor) -> None:
        """Remember whether a drafter's parents are no tree, one bool; `read` tells."""
        self._is_no_tree = is_wrong if self._is_no_tree is None else self._is_no_tree | is_wrong

    def check(self, going: Tensor | None = None) -> int:
        """Stop at numbers that no model should give.

        Args:
            going: [A] bool, which images go on.

        Returns:
            How many images go on (0 without `going`).

        Raises:
            InputError: a law or a latent was NaN or infinite.
        """
        found = self.read() if going is None else self.read(going.sum())
        return sum(map(sum, found))

    def read(self, *wanted: Tensor) -> list[list[int]]:
        """What the host must know of a pass, in the one read from an accelerator that it costs.

        Args:
            *wanted: int64 tensors of any shape.

        Returns:
            The elements of each, in order.

        Raises:
            InputError: a law or a latent was NaN or infinite, or a drafter's tree none.
        """
        wrong = self._is_broken
        if self._is_no_tree is not None:
            wrong = wrong + 2 * self._is_no_tree
        parts = [wrong, *(part.flatten() for part in wanted)]
        found = torch.cat(parts).tolist()
        if found[0] >= 2:
            raise InputError(
                f"the drafter's parents in pass {self.num_passes} are no trees: expected -1 (the last "
                "known token) or an earlier candidate"
            )
        if found[0]:
            raise InputError(
                f"the model gave NaN or infinity in pass {self.num_passes}: expected finite "
                "numbers; look at its weights, its dtype and the prompt's features"
            )
        ends = list(accumulate((part.numel() for part in wanted), initial=1))
        return [found[begin:end] for begin, end in pairwise(ends)]

    def report(
        self,
        counts: Tensor,
        images: Tensor | None = None,
        given: list[int] | None = None,
        **more: Any,
    ) -> None:
        """A pass is over: tell `on_step`, whose true answer sets `stopped`.

        Args:
            counts: [A] int64, tokens that the pass made final.
            images: [A], whose; None for all.
            given: `counts` on the host, where a loop has read them.
            **more: what a loop tells besides the figures of `progress`.
        """
        if images is None:
            self.lengths = (self.lengths + counts).clamp(max=self.num_tokens)
        else:
            self.lengths[images] += counts
        self.tell(counts, given, **more)

    def tell(self, counts: Tensor, given: list[int] | None = None, **more: Any) -> None:
        """`report` of what is in the books already."""
        if given is not None:
            self._num_final += sum(given)
        if self._on_step is not None and self.num_passes:
            self.stopped = bool(self._on_step(self.num_passes, self.progress(counts, given) | more))

    def progress(self, counts: Tensor, given: list[int] | None = None) -> dict[str, Any]:
        """Figures for progress bars, see `arvision.contracts.StepCallback`."""
        return {
            "finished": int(self.lengths.sum()) if given is None else self._num_final,
            "total": self.batch * self.num_tokens,
            "accepted": counts.tolist() if given is None else given,
            "drawn": self.drawn,
        }

    def drawn(self) -> tuple[Tensor, Tensor]:
        """All tokens [B, N, ...], and which are final, [B, N] bool."""
        is_final = self._is_placed
        if is_final is None:
            order = torch.arange(self.num_tokens, device=self.lengths.device)
            is_final = order < self.lengths[:, None]
        return self.tokens, is_final if self.given is None else is_final | self.given.mask

    def stats(self, **more: Any) -> Stats:
        """Statistics that every run has, and what a loop adds.

        `tokens_per_pass` is N over the mean number of passes that an image took part in. With given
        tokens these do not count there, and `given` says how many an image has.
        """
        mean = float(self.passes.double().mean()) if self.batch else 0.0
        commit_pass, drawn = self.commit_pass, self.num_tokens
        if self.given is not None:
            commit_pass = commit_pass.masked_fill(self.given.mask, 0)
            drawn -= sum(self.given.nums) / self.batch
            more["given"] = self.given.nums
        return Stats(
            forward_passes=self.num_passes,
            tokens=self.num_tokens,
            tokens_per_pass=drawn / max(1e-9, mean),
            passes_per_image=self.passes.tolist(),
            commit_pass=commit_pass.tolist(),
            lengths=self.lengths.tolist(),
            interrupted=self.stopped,
            complete=[length >= self.num_tokens for length in self.lengths.tolist()],
            **more,
        )

    @property
    def told(self) -> dict[str, Any]:
        """What `stats` tells of parts of fixed shapes, where these are used."""
        if self.steps is None or not self.steps.drives(self.tokens.device):
            return {}
        return {"step": self.steps.mode, "warm_up": self.warm_up}

    def warn_of_loop(self, why: str) -> None:
        """Say why passes of fixed shapes do not run, where they were asked for."""
        if self.steps is not None and self.steps.drives(self.tokens.device):
            text = f"compiled for {self.steps.mode!r}, and the ordinary loop runs: {why}"
            warnings.warn(text, stacklevel=3)

    def leave_graphs(self) -> None:
        """Nothing of this run is captured or replayed any more."""
        if self.steps is not None:
            self.steps.graphs.leave(self)

    def samples(self, embeddings: Tensor | None = None, **more: Any) -> Samples:
        """What was drawn, with its statistics."""
        self.leave_graphs()
        return Samples(self.tokens.contiguous(), self.stats(**more), embeddings)
