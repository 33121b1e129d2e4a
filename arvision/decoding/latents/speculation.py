"""Speculative decoding of continuous models: a draft proposes latents, one target pass verifies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...contracts import Conditions, ContinuousModel, Samples, device_of
from ...errors import InputError
from ..run import Run
from .chain import Trajectory
from .loop import LatentPlan, num_given_first, started_with
from .run import LatentRun, ragged
from .verify import Slots, Verifier, join

CONTEXTS = ("verified", "batched")
DRAFTINGS = ("sequential", "parallel")


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """How drafts are made and judged; see `arvision.samplers.cspd.CSpDSampler`."""

    max_draft: int
    criterion: str
    context: str
    drafting: str
    widening: float
    prefill: float
    max_tries: int


def check_pair(draft: ContinuousModel, target: ContinuousModel) -> None:
    """Refuse a draft whose latents are not the target's.

    Raises:
        InputError: another number of latents, grid, width, number of denoising steps, or another
            autoencoder.
    """
    facts = {
        "latents": lambda model: model.num_tokens,
        "grid": lambda model: model.grid and tuple(model.grid),
        "latent width": lambda model: model.head.latent_dim,
        "denoising steps": lambda model: model.head.num_steps,
    }
    for name, fact in facts.items():
        if fact(draft) != fact(target):
            raise InputError(
                f"draft with {name} {fact(draft)}: expected the target's {fact(target)}"
            )
    spaces = [getattr(model, "latent_space", None) for model in (draft, target)]
    if None not in spaces and spaces[0] != spaces[1]:
        raise InputError(
            f"draft with the autoencoder {spaces[0]}: expected the target's {spaces[1]}"
        )


@torch.no_grad()
def speculate_latents(
    model: ContinuousModel,
    draft: ContinuousModel | None,
    conditions: Conditions,
    run: Run,
    *,
    plan: LatentPlan,
    how: Speculation,
    draft_guidance_scale: float | None = None,
) -> Samples:
    """Draw one image per condition.

    A round drafts the next iterations of each image, asks the target for its conditions in one
    pass, and keeps what it accepts up to the first iteration with a rejection; the rejected latents
    of that iteration are redrawn, what was drafted after it is forgotten. If all stay, the target
    draws one more iteration. Images stand where they stand: batches are ragged.

    Args:
        model: the target.
        draft: with the target's latents, grid and denoising steps. None: the target drafts for
            itself, from the conditions that its last pass gave for the places to come.
        conditions: one per image.
        run: the ledger; latents that are not drawn because `on_step` stopped the run stay 0.
        plan: order, iterations, guidance and temperature.
        how: drafting and verification.
        draft_guidance_scale: of the draft; None for the target's.

    Returns:
        Latents [B, N, D]; the statistics of `decode_latents`; further `iterations`, `draft_passes`,
        `drafted` (latents), `accepted`, `rejected` (the others were drafted behind a rejection),
        `acceptance_rate` (of those judged), `proposals` (for rejected latents), `exhausted`,
        `nonfinite`, `context_rows` (rows of all target passes, without guidance).

    Raises:
        InputError: see `check_pair`, `LatentPlan.ends`; a draft length above the number of latents;
            a latent that is NaN or infinite.
    """
    if draft is not None:
        check_pair(draft, model)
    ends = plan.ends(model)
    if how.max_draft > model.num_tokens:
        raise InputError(
            f"max_draft {how.max_draft}: expected 1 to {model.num_tokens}, the latents"
        )
    run.begin(device_of(model), (model.head.latent_dim,), torch.float32)
    order, first = plan.orders(run, model), num_given_first(run, model)
    own_scale = run.guidance_scale if draft_guidance_scale is None else draft_guidance_scale
    verifier = Verifier(
        target=model.head,
        draft=(draft or model).head,
        criterion=how.criterion,
        temperature=plan.temperature,
        widening=how.widening,
        max_tries=how.max_tries,
        noise=run.noise,
    )
    scales = (
        plan.scales(ends, run.guidance_scale, run.batch),
        plan.scales(ends, own_scale, run.batch),
    )
    rounds = _Rounds(
        run,
        model.start(conditions, started_with(run.guidance_scale, scales[0]), order),
        None
        if draft is None
        else draft.start(conditions, started_with(own_scale, scales[1]), order),
        order,
        first,
        ends,
        scales,
        verifier,
        how,
    )
    return rounds.finish()


class _Rounds(LatentRun):
    """Where each image stands, and one round after another."""

    def __init__(
        self,
        ledger: Run,
        target: Any,
        draft: Any,
        order: Tensor,
        first: int,
        ends: Sequence[int],
        scales: tuple[Sequence[float], Sequence[float]],
        verifier: Verifier,
        how: Speculation,
    ) -> None:
        super().__init__(ledger, order, first, ends)
        self._target, self._draft, self._how, self._verifier = target, draft, how, verifier
        self._scales, self._draft_scales = map(self._table, scales)
        self._prefill = -int(-how.prefill * self._num_iter // 1)
        self._draft_passes = 0
        if draft is None:
            self._prefill = max(1, self._prefill)
            self._guessed = torch.empty(0)
            self._ahead: tuple[Slots, Trajectory] | None = None

    def round(self, images: Tensor) -> None:
        """Draft, verify, write down."""
        lengths = self._lengths(images)
        work = self.latents.clone()
        slots, paths = self._propose(images, lengths, work)
        z, context, has_extra = self._ask(images, lengths, work)
        extra_rows = has_extra.nonzero()[:, 0]
        rows, extra = self._slots(extra_rows, images[extra_rows], lengths[extra_rows], self._scales)
        extra.z = z[context[rows] + self._at(extra.places), extra.positions]
        if self._draft is None:
            self._keep(images, z, context)
        if slots is None or paths is None:
            self._done[images] += 1
            self._write(extra, self._draw(extra))
            return
        self._judge(images, lengths, slots, paths, (z, context), (rows, extra))

    def _lengths(self, images: Tensor) -> Tensor:
        """Iterations [A] that the next round drafts for `images` [A]."""
        done = self._done[images]
        lengths = (self._num_iter - done).clamp(max=self._how.max_draft)
        return torch.where(done < self._prefill, 0, lengths)

    def _at(self, places: Tensor) -> Tensor:
        """Row of a context among the contexts of its image."""
        return places if self._how.context == "batched" else torch.zeros_like(places)

    def _propose(
        self, images: Tensor, lengths: Tensor, work: Tensor
    ) -> tuple[Slots | None, Trajectory | None]:
        """Draft `lengths` [A] iterations of `images` [A] into `work` [B, N, D]."""
        if self._draft is None:
            slots, path = self._ahead or (None, None)
            if slots is not None and path is not None:
                work[slots.images, slots.positions] = path.latents.to(work)
            return slots, path
        most = int(lengths.max())
        if most == 0:
            return None, None
        is_parallel = self._how.drafting == "parallel"
        groups = [torch.arange(most)] if is_parallel else [torch.tensor([j]) for j in range(most)]
        parts: list[Slots] = []
        paths: list[Trajectory] = []
        for group in groups:
            group = group.to(images.device)
            rows, which = (lengths[:, None] > group).nonzero(as_tuple=True)
            places = group[which]
            entry, slots = self._slots(rows, images[rows], places, self._draft_scales)
            asked = rows.unique()
            first = torch.full_like(asked, int(group[0]))
            z = self._draft.contexts(
                work[images[asked]], self._known(images[asked], first), images[asked]
            )
            self._draft_passes += 1
            slots.z = z[torch.searchsorted(asked, entry), slots.positions]
            path = self._verifier.draw(self._verifier.draft, slots)
            work[slots.images, slots.positions] = path.latents.to(work)
            parts.append(slots)
            paths.append(path)
        rows = ("states", "means", "scales")
        return join(*parts), Trajectory(
            *(torch.cat([getattr(p, n) for p in paths], dim=1) for n in rows)
        )

    def _draw(self, extra: Slots) -> Tensor:
        """Latents [X, D] of `extra`. Without a draft the same chain guesses for the next round."""
        target = self._verifier.target
        if self._draft is not None:
            return self._verifier.draw(target, extra).latents
        images = (self._done < self._num_iter).nonzero()[:, 0]
        _, rows, places = ragged(self._lengths(images))
        _, slots = self._slots(rows, images[rows], places, self._draft_scales)
        slots.z = self._guessed[slots.images, slots.positions]
        both = join(extra, slots)
        if not len(both.images):
            return self.latents.new_empty(0, target.latent_dim)
        path = self._verifier.draw(target, both)
        every = torch.arange(len(both.images), device=images.device)
        self._ahead = slots, path.select(every[len(extra.images) :])
        return path.latents[: len(extra.images)]

    def _ask(self, images: Tensor, lengths: Tensor, work: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One target pass.

        Returns:
            Conditions [R, N, Dz]; [A], the first row of each image; [A] bool, which images have an
            iteration left after their drafts.
        """
        has_extra = self._done[images] + lengths < self._num_iter
        if self._how.context == "verified":
            counts = torch.ones_like(lengths)
        else:
            counts = lengths + has_extra.long()
        first, which, places = ragged(counts)
        rows = images[which]
        self._rows += len(rows)
        return self._target.contexts(work[rows], self._known(rows, places), rows), first, has_extra

    def _keep(self, images: Tensor, z: Tensor, first: Tensor) -> None:
        """Keep conditions of all places: each from the context that knows most of what is before it.

        They do not depend on the noise of their own places, so what is drawn from them is a draft
        like any other.
        """
        rows = torch.diff(first, append=first.new_tensor([len(z)]))
        place = torch.minimum(self._places(images).clamp(min=0), rows[:, None] - 1)
        if not len(self._guessed):
            self._guessed = z.new_zeros(*self._order.shape, z.shape[-1])
        every = torch.arange(z.shape[1], device=z.device)
        self._guessed[images] = z[first[:, None] + place, every]

    def _judge(
        self,
        images: Tensor,
        lengths: Tensor,
        slots: Slots,
        drafted: Trajectory,
        target: tuple[Tensor, Tensor],
        follow: tuple[Tensor, Slots],
    ) -> None:
        """Keep, redraw, forget."""
        verifier, counts = self._verifier, self._verifier.counts
        z, context = target
        number = torch.zeros(len(self._order), dtype=torch.int64, device=images.device)
        number[images] = torch.arange(len(images), device=images.device)
        row = number[slots.images]
        z_target = z[context[row] + self._at(slots.places), slots.positions]
        scales = self._scales[slots.images, self._done[slots.images] + slots.places]
        judged = Slots(slots.images, slots.positions, slots.places, z_target, scales)
        log_ratio, own, extra_latents = verifier.compare(judged, drafted, follow[1])
        uniforms = judged.uniform(verifier.noise, "accept", self._ledger.num_passes)
        accepted = uniforms.log() < log_ratio
        failed = torch.where(accepted, lengths[row], slots.places)
        stop = lengths.scatter_reduce(0, row, failed, "amin")
        kept = accepted & (slots.places <= stop[row])
        lost = ~accepted & (slots.places == stop[row])
        counts.drafted += len(row)
        counts.accepted += int(kept.sum())
        counts.rejected += int(lost.sum())
        self._write(judged.select(kept), drafted.latents[kept])
        if bool(lost.any()):
            where = lost.nonzero()[:, 0]
            again = judged.select(where)
            parts = (slots.z[where], drafted.select(where), own.select(where))
            self._write(again, verifier.replace(again, *parts))
        self._done[images] = (self._done[images] + stop + 1).clamp(max=self._num_iter)
        wanted = (stop == lengths)[follow[0]].nonzero()[:, 0]
        extra = follow[1].select(wanted)
        if extra_latents is not None:
            self._write(extra, extra_latents[wanted])
        elif len(wanted) or self._draft is None:
            self._write(extra, self._draw(extra))

    def figures(self) -> dict[str, Any]:
        """See `speculate_latents`."""
        counts = self._verifier.counts
        return {
            "head_steps": counts.head_calls,
            "draft_passes": self._draft_passes,
            "drafted": counts.drafted,
            "accepted": counts.accepted,
            "rejected": counts.rejected,
            "acceptance_rate": counts.accepted / max(1, counts.accepted + counts.rejected),
            "proposals": counts.proposals,
            "exhausted": counts.exhausted,
            "nonfinite": counts.nonfinite,
        }
