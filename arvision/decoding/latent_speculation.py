"""Speculative decoding of continuous models: a draft proposes latents, one target pass verifies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contracts import Conditions, ContinuousModel, Samples, Seeds, Stats, StepCallback
from ..errors import InputError
from .latent_chain import Trajectory
from .latent_loop import LatentPlan, check_seeds
from .latent_verify import Slots, Verifier
from .noise import Noise

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
    draft: ContinuousModel,
    conditions: Conditions,
    *,
    plan: LatentPlan,
    how: Speculation,
    seeds: Seeds,
    guidance_scale: float = 1.0,
    draft_guidance_scale: float | None = None,
    on_step: StepCallback | None = None,
) -> Samples:
    """Draw one image per condition.

    A round drafts the next iterations of each image, asks the target for its conditions in one
    pass, and keeps what it accepts up to the first iteration with a rejection; the rejected latents
    of that iteration are redrawn, what was drafted after it is forgotten. If all stay, the target
    draws one more iteration. Images stand where they stand: batches are ragged.

    Args:
        model: the target.
        draft: with the target's latents, grid and denoising steps.
        conditions: one per image.
        plan: order, iterations, guidance and temperature.
        how: drafting and verification.
        seeds: one per image.
        guidance_scale: of the target.
        draft_guidance_scale: of the draft; None for the target's.
        on_step: called after each pass of the target; a true answer stops the run, latents not drawn
            stay 0.

    Returns:
        Latents [B, N, D]; the statistics of `decode_latents`; further `iterations`, `draft_passes`,
        `drafted` (latents), `accepted`, `rejected` (the others were drafted behind a rejection),
        `acceptance_rate` (of those judged), `proposals` (for rejected latents), `exhausted`,
        `nonfinite`, `context_rows` (rows of all target passes, without guidance).

    Raises:
        InputError: see `check_pair`, `LatentPlan.ends`; a draft length above the number of latents;
            another number of seeds than of conditions.
    """
    check_seeds(seeds, conditions)
    check_pair(draft, model)
    ends = plan.ends(model.num_tokens)
    if how.max_draft > model.num_tokens:
        raise InputError(
            f"max_draft {how.max_draft}: expected 1 to {model.num_tokens}, the latents"
        )
    noise = Noise(seeds, getattr(model, "device", "cpu"))
    order = plan.orders(noise, model.num_tokens)
    own_scale = guidance_scale if draft_guidance_scale is None else draft_guidance_scale
    verifier = Verifier(
        target=model.head,
        draft=draft.head,
        criterion=how.criterion,
        temperature=plan.temperature,
        widening=how.widening,
        max_tries=how.max_tries,
        noise=noise,
    )
    run = _Run(
        model.start(conditions, guidance_scale, order),
        draft.start(conditions, own_scale, order),
        order,
        ends,
        (plan.scales(ends, guidance_scale), plan.scales(ends, own_scale)),
        verifier,
        how,
    )
    while run.is_going:
        run.round()
        if on_step is not None and on_step(run.passes, run.progress()):
            break
    return Samples(run.latents, run.stats())


class _Run:
    """Where each image stands, and one round after another."""

    def __init__(
        self,
        target: Any,
        draft: Any,
        order: Tensor,
        ends: Sequence[int],
        scales: tuple[Sequence[float], Sequence[float]],
        verifier: Verifier,
        how: Speculation,
    ) -> None:
        self._target, self._draft, self._order, self._how = target, draft, order, how
        self._verifier, device = verifier, order.device
        self._bounds = torch.tensor([0, *ends], device=device)
        self._scales, self._draft_scales = (torch.tensor(s, device=device) for s in scales)
        self._rank = order.argsort(1)
        self._num_iter = len(ends)
        self._prefill = -int(-how.prefill * len(ends) // 1)
        self.latents = torch.zeros(*order.shape, verifier.target.latent_dim, device=device)
        self._done = torch.zeros(len(order), dtype=torch.int64, device=device)
        self._commit_pass = torch.zeros_like(order)
        self._passes = torch.zeros_like(self._done)
        self.passes = self._draft_passes = self._rows = 0

    @property
    def is_going(self) -> bool:
        """Whether an image still lacks latents."""
        return bool((self._done < self._num_iter).any())

    def _slots(self, rows: Tensor, images: Tensor, places: Tensor, scales: Tensor) -> tuple:
        """One entry per latent of the iterations `places` after the known ones of `images`.

        Returns:
            Numbers [M] of the entries of `rows` that the latents belong to, and their slots without
            conditions.
        """
        iterations = self._done[images] + places
        starts = self._bounds[iterations]
        counts = self._bounds[iterations + 1] - starts
        each = torch.arange(len(rows), device=rows.device).repeat_interleave(counts)
        offsets = torch.arange(len(each), device=rows.device) - (counts.cumsum(0) - counts)[each]
        positions = self._order[images[each], starts[each] + offsets]
        slots = Slots(images[each], positions, places[each], positions, scales[iterations][each])
        return rows[each], slots

    def _known(self, images: Tensor, places: Tensor) -> Tensor:
        """[R, N]: what is known to an image after some more iterations."""
        return self._rank[images] < self._bounds[self._done[images] + places][:, None]

    def round(self) -> None:
        """Draft, verify, write down."""
        images = (self._done < self._num_iter).nonzero()[:, 0]
        done = self._done[images]
        lengths = (self._num_iter - done).clamp(max=self._how.max_draft)
        lengths = torch.where(done < self._prefill, 0, lengths)
        work = self.latents.clone()
        slots, paths = self._propose(images, lengths, work)
        z, context, has_extra = self._ask(images, lengths, work)
        extra_rows = has_extra.nonzero()[:, 0]
        rows, extra = self._slots(extra_rows, images[extra_rows], lengths[extra_rows], self._scales)
        extra.z = z[context[rows] + self._at(extra.places), extra.positions]
        self.passes += 1
        self._passes[images] += 1
        if paths is None:
            self._write(extra, self._verifier.draw(self._verifier.target, extra).latents)
            self._done[images] += 1
            return
        self._judge(images, lengths, slots, paths, (z, context), (rows, extra))

    def _at(self, places: Tensor) -> Tensor:
        """Row of a context among the contexts of its image."""
        return places if self._how.context == "batched" else torch.zeros_like(places)

    def _propose(
        self, images: Tensor, lengths: Tensor, work: Tensor
    ) -> tuple[Slots | None, Trajectory | None]:
        """Draft `lengths` [A] iterations of `images` [A] into `work` [B, N, D]."""
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
            asked, inverse = rows.unique(return_inverse=True)
            first = torch.full_like(asked, int(group[0]))
            z = self._draft.contexts(
                work[images[asked]], self._known(images[asked], first), images[asked]
            )
            self._draft_passes += 1
            places = group[which]
            entry, slots = self._slots(inverse, images[rows], places, self._draft_scales)
            slots.z = z[entry, slots.positions]
            path = self._verifier.draw(self._verifier.draft, slots)
            work[slots.images, slots.positions] = path.latents.to(work)
            parts.append(slots)
            paths.append(path)
        names = ("images", "positions", "places", "z", "scales")
        slots = Slots(*(torch.cat([getattr(part, n) for part in parts]) for n in names))
        rows = ("states", "means", "scales")
        return slots, Trajectory(*(torch.cat([getattr(p, n) for p in paths], dim=1) for n in rows))

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
        first = counts.cumsum(0) - counts
        which = torch.arange(len(images), device=images.device).repeat_interleave(counts)
        places = torch.arange(len(which), device=images.device) - first[which]
        rows = images[which]
        self._rows += len(rows)
        return self._target.contexts(work[rows], self._known(rows, places), rows), first, has_extra

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
        scales = self._scales[self._done[slots.images] + slots.places]
        judged = Slots(slots.images, slots.positions, slots.places, z_target, scales)
        log_ratio, own, extra_latents = verifier.compare(judged, drafted, follow[1])
        uniforms = judged.uniform(verifier.noise, "accept", self.passes)
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
        wanted = (stop == lengths)[follow[0]].nonzero()[:, 0]
        if len(wanted):
            extra = follow[1].select(wanted)
            if extra_latents is None:
                self._write(extra, verifier.draw(verifier.target, extra).latents)
            else:
                self._write(extra, extra_latents[wanted])
        self._done[images] = (self._done[images] + stop + 1).clamp(max=self._num_iter)

    def _write(self, slots: Slots, latents: Tensor) -> None:
        self.latents = self.latents.to(latents.dtype)
        self.latents[slots.images, slots.positions] = latents
        self._commit_pass[slots.images, slots.positions] = self.passes

    def progress(self) -> dict[str, Any]:
        """Figures for progress bars."""
        drawn = self._bounds[self._done]
        return {
            "finished": int(drawn.sum()),
            "total": self._order.numel(),
            "accepted": drawn.tolist(),
        }

    def stats(self) -> Stats:
        """See `speculate_latents`."""
        counts, num = self._verifier.counts, self._order.shape[1]
        judged = counts.accepted + counts.rejected
        return Stats(
            forward_passes=self.passes,
            tokens=num,
            tokens_per_pass=num / max(1e-9, float(self._passes.double().mean())),
            passes_per_image=self._passes.tolist(),
            commit_pass=self._commit_pass.tolist(),
            head_steps=counts.head_calls,
            iterations=self._num_iter,
            draft_passes=self._draft_passes,
            drafted=counts.drafted,
            accepted=counts.accepted,
            rejected=counts.rejected,
            acceptance_rate=counts.accepted / max(1, judged),
            proposals=counts.proposals,
            exhausted=counts.exhausted,
            nonfinite=counts.nonfinite,
            context_rows=self._rows,
        )
