"""Sampling from students of Distilled Decoding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ..contracts import Conditions, Samples, ScaleModel, Seeds, Stats, StepCallback, StudentModel
from ..decoding.flow import DEFAULT_EVALUATIONS, FlowMap, check_evaluations, flow_noise
from ..decoding.logits import Shaping, check_guidance_scale
from ..decoding.noise import Noise
from ..decoding.student import nearest_code
from ..errors import InputError, check_count
from .base import BaseSampler, register


@register("dd", exact=False, drives="student")
class DDSampler(BaseSampler):
    """A whole image in one pass or two, by a student that learnt the teacher's map from noise.

    The Gaussian noise of an image is a function of (seed, image), the same that its teacher reads
    with `ar` and `noise="flow"`, and a student predicts what the teacher would make of it.

    - 1 step: noise in, all tokens out.
    - 2 steps: the first tokens (scales) of that are kept, and the rest is predicted anew from their
      codes and the same noise.
    - n steps: between the two, the teacher draws the last n - 2 of the kept tokens (scales) anew,
      itself as a function of the same noise; n = t + 1 for students that keep t: the teacher
      draws all of them, and the student the rest.

    Law: lossy; the student's approximation of the teacher's law. Cost: as many passes as steps,
    without guidance rows in the student's. Models: students.

    Args:
        steps: passes, see above.
        teacher: for more steps than the student has timesteps: name or folder of the teacher; None
            for the one that the student names.
        num_evaluations: of the flow-matching map in the teacher's steps.
        temperature: of the teacher's law.
        top_k: of the teacher's law, 0 for all.
        top_p: of the teacher's law, 1 for all.

    Raises:
        InputError: a value out of range; when called, a number of steps that the student was not
            trained for, or a teacher with another codebook or grid.

    Paper: Liu et al., "Distilled Decoding 1", 2024, section 3.3 and figure 5. There the teacher's
    steps draw fresh randomness, and a prefix is fed to VAR without its mask; here they do not.
    """

    @register_to_config
    def __init__(
        self,
        steps: int = 1,
        teacher: str | None = None,
        num_evaluations: int = DEFAULT_EVALUATIONS,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> None:
        check_count("steps", steps)
        check_evaluations(num_evaluations)
        self._shaping()
        self._teacher: Any = None

    def _shaping(self) -> Shaping:
        config = self.config
        return Shaping(
            temperature=config["temperature"], top_k=config["top_k"] or 0, top_p=config["top_p"]
        )

    def wants_teacher(self, model: StudentModel) -> bool:
        """Whether the configured steps need the student's teacher."""
        return self.config["steps"] > len(model.timesteps)

    def bind_teacher(self, model: Any) -> None:
        """Take `model`, a family object or a pipeline, as the teacher."""
        self._teacher = getattr(model, "model", model)

    def _plan(self, model: StudentModel) -> tuple[bool, int, int]:
        """Whether the student starts, and from and to where the teacher draws, in units."""
        steps, timesteps = self.config["steps"], model.timesteps
        if steps <= len(timesteps):
            return True, 0, 0
        end = timesteps[-1]
        most = end + 1
        if steps > most or end == 0:
            trained = ", ".join(map(str, range(1, len(timesteps) + 1)))
            mixed = f", and with its teacher up to {most}" if end else ""
            raise InputError(f"steps {steps}: this student was trained for {trained}{mixed}")
        if self._teacher is None:
            raise InputError(
                f"steps {steps}: more than {len(timesteps)} need the student's teacher: expected "
                "teacher=<name or folder>"
            )
        return steps < most, (end - (steps - 2) if steps < most else 0), end

    def __call__(
        self,
        model: Any,
        conditions: Conditions,
        *,
        seeds: Seeds,
        guidance_scale: float = 1.0,
        on_step: StepCallback | None = None,
    ) -> Samples:
        """Draw one image per condition.

        Args:
            model: a student.
            conditions: one per image.
            seeds: one per image, an integer or a pair (seed, image).
            guidance_scale: of the teacher's steps; the student has its teacher's guidance learnt.
            on_step: called after each pass; a true answer stops the run.

        Returns:
            Tokens [B, N]; `embeddings` [B, N, D] where the student decodes vectors of its own;
            stats as of `decode_tokens`, and `teacher_passes`.

        Raises:
            InputError: see the class.
        """
        check_guidance_scale(guidance_scale)
        if len(seeds) != len(conditions):
            raise InputError(
                f"{len(seeds)} seeds for {len(conditions)} conditions: expected one each"
            )
        starts, first, last = self._plan(model)
        run = _Run(model, conditions, seeds, on_step)
        if starts:
            run.predict(0)
        if last and not run.stopped:
            self.check_teacher(model)
            shaping = self._shaping()
            laws = _teacher_laws(self._teacher, conditions, run, first, last, guidance_scale)
            flow_map = FlowMap(model.codebook, self.config["num_evaluations"])
            for begin, logits in laws:
                end = begin + logits.shape[1]
                tokens = flow_map(shaping(logits), run.noise[:, begin:end])
                run.redraw(tokens, begin)
                if run.stopped:
                    break
        resumes = [last] if last else list(model.timesteps[1 : self.config["steps"]])
        for known in resumes:
            if not run.stopped:
                run.predict(known)
        samples = run.samples()
        samples.stats["lossless"] = self.is_exact
        return samples

    def check_teacher(self, student: StudentModel) -> None:
        """Refuse a bound teacher that cannot be the student's.

        Raises:
            InputError: no codebook, another one than the student's, or another number of tokens.
        """
        teacher = self._teacher
        codes = getattr(teacher, "codebook", None)
        if codes is None or codes.shape != student.codebook.shape:
            found = "none" if codes is None else f"{len(codes)} codes of width {codes.shape[1]}"
            raise InputError(f"the teacher's codebook has {found}: expected the student's")
        if not torch.allclose(codes.float(), student.codebook.float(), atol=0.02):
            raise InputError("the teacher has another codebook than the student")
        if teacher.num_tokens != student.num_tokens:
            raise InputError(
                f"the teacher has {teacher.num_tokens} tokens: expected {student.num_tokens}, the "
                "student's"
            )


def _teacher_laws(
    teacher: Any, conditions: Conditions, run: _Run, first: int, last: int, scale: float
) -> Iterator[tuple[int, Tensor]]:
    """First place and guided logits [B, n, V] of each unit `first`..`last` - 1 in turn.

    Whoever takes them writes the tokens of a unit into `run.tokens` before asking for the next.
    """
    ends = (0, *run.model.unit_ends)
    if isinstance(teacher, ScaleModel):
        scales: Any = teacher.start(conditions, scale)
        if first:
            scales.catch_up(run.tokens[:, : ends[first]])
        for unit in range(first, last):
            yield ends[unit], scales.next()
            scales.feed(run.tokens[:, ends[unit] : ends[unit + 1]])
        return
    state, logits = teacher.start(conditions, scale)
    fed = 0
    for unit in range(first, last):
        if unit > 0:
            part = run.tokens[:, fed:unit]
            logits = state.extend(part)[:, -1]
            every = torch.arange(part.shape[1], device=part.device).expand_as(part)
            state.commit(every, torch.full_like(part[:, 0], part.shape[1]))
            fed = unit
        yield unit, logits[:, None]


class _Run:
    """One batch: its noise, what is known, and the bookkeeping of passes."""

    def __init__(
        self, model: StudentModel, conditions: Conditions, seeds: Seeds, on_step: Any
    ) -> None:
        self.model, self.conditions, self.on_step = model, conditions, on_step
        codes = model.codebook
        self.codes = codes.double() if codes.dtype == torch.float64 else codes.float()
        batch, num = len(conditions), model.num_tokens
        places = torch.arange(num, device=codes.device).expand(batch, num)
        noise = Noise(seeds, codes.device)
        self.noise = flow_noise(noise, places, codes.shape[1]).to(self.codes)
        self.tokens = torch.zeros_like(places).contiguous()
        self.vectors = self.codes.new_zeros(batch, num, codes.shape[1])
        self.commit_pass = torch.zeros_like(self.tokens)
        self.passes, self.teacher_passes, self.stopped = 0, 0, False

    def predict(self, known: int) -> None:
        """All tokens behind the first `known` units, from their codes and the noise."""
        begin = (0, *self.model.unit_ends)[known]
        given = torch.cat([self.codes[self.tokens[:, :begin]], self.noise[:, begin:]], dim=1)
        logits, vectors = self.model.predict(self.conditions, given, known)
        split = (0, *self.model.unit_ends)[self.model.split]
        tokens = logits.argmax(-1)
        # A vector is decoded as it is; as a token it counts as the code next to it.
        tokens[:, split:] = nearest_code(vectors[:, split:].to(self.codes), self.codes)
        mixed = torch.cat([self.codes[tokens[:, :split]], vectors[:, split:].to(self.codes)], dim=1)
        self.tokens[:, begin:] = tokens[:, begin:]
        self.vectors[:, begin:] = mixed[:, begin:]
        self._count(begin, self.model.num_tokens)

    def redraw(self, tokens: Tensor, begin: int) -> None:
        """Tokens [B, n] of the teacher at places `begin`..."""
        end = begin + tokens.shape[1]
        self.tokens[:, begin:end] = tokens
        self.vectors[:, begin:end] = self.codes[tokens]
        self.teacher_passes += 1
        self._count(begin, end)

    def _count(self, begin: int, end: int) -> None:
        self.passes += 1
        self.commit_pass[:, begin:end] = self.passes
        if self.on_step is not None:
            batch, total = self.tokens.shape
            figures = {
                "finished": batch * int((self.commit_pass[0] > 0).sum()),
                "total": batch * total,
                "accepted": [end - begin] * batch,
            }
            self.stopped = bool(self.on_step(self.passes, figures))

    def samples(self) -> Samples:
        """What was drawn."""
        num = self.model.num_tokens
        stats = Stats(
            forward_passes=self.passes,
            tokens=num,
            tokens_per_pass=num / self.passes,
            passes_per_image=[self.passes] * len(self.tokens),
            commit_pass=self.commit_pass.tolist(),
            teacher_passes=self.teacher_passes,
        )
        has_vectors = self.model.split < len(self.model.unit_ends)
        return Samples(self.tokens, stats, self.vectors if has_vectors else None)
