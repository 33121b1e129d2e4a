"""Sampling from students of Distilled Decoding."""

from __future__ import annotations

from typing import Any

from diffusers.configuration_utils import register_to_config

from ..contracts import Conditions, HasCodebook, Samples, StudentModel
from ..decoding.flow import DEFAULT_EVALUATIONS, FlowMap, check_evaluations
from ..decoding.logits import Shaping
from ..decoding.run import Run
from ..decoding.student import Teacher, check_teacher, decode_student
from ..errors import InputError, check_count, warn_once
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

    needs = {"teacher": HasCodebook}

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
        self.take("teacher", teacher)

    def _shaping(self) -> Shaping:
        config = self.config
        return Shaping(
            temperature=config["temperature"], top_k=config["top_k"] or 0, top_p=config["top_p"]
        )

    def without_effect(self, model: Any) -> dict[str, Any]:
        """Without the teacher's steps there is no law to shape: a student has learnt its own."""
        if self.config["steps"] > len(model.timesteps):
            return {}
        return {"guidance_scale": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}

    @property
    def plan_in_words(self) -> str:
        """How many steps, which decides whether the teacher takes part."""
        return f"{self.config['steps']} steps, in which no teacher takes part,"

    def missing(self, model: Any) -> list[str]:
        """The teacher, where the configured steps need one that is not bound."""
        return super().missing(model) if self.config["steps"] > len(model.timesteps) else []

    def decode(self, model: Any, conditions: Conditions, run: Run) -> Samples:
        """Draw one image per condition.

        `run.guidance_scale` is that of the teacher's steps; the student has its teacher's guidance
        learnt.

        Returns:
            Tokens [B, N]; `embeddings` [B, N, D] where the student decodes vectors of its own;
            the statistics of `Run.stats`, and `teacher_passes`.

        Raises:
            InputError: see the class.
        """
        starts, first, last = self._plan(model)
        resumes = [last] if last else list(model.timesteps[1 : self.config["steps"]])
        if not last:
            self._warn_of_idle(model)
            return decode_student(model, conditions, run, starts=starts, resumes=resumes)
        shaping, num = self._shaping(), self.config["num_evaluations"]
        flow_map = FlowMap(model.codebook, num)
        teacher = self.bound("teacher")
        check_teacher(teacher, model)
        laws = Teacher(teacher, first, last, lambda logits, noise: flow_map(shaping(logits), noise))
        return decode_student(model, conditions, run, starts=starts, resumes=resumes, teacher=laws)

    def _warn_of_idle(self, model: Any) -> None:
        """Say once that options are set which need the teacher's steps."""
        idle = {n: v for n, v in self.without_effect(model).items() if n in self.config}
        idle |= {"num_evaluations": DEFAULT_EVALUATIONS}
        named = [f"{n}={self.config[n]!r}" for n, v in idle.items() if self.config[n] != v]
        if named:
            warn_once(f"sampler 'dd' with {self.plan_in_words} does not look at {', '.join(named)}")

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
        if self.missing(model):
            raise InputError(
                f"steps {steps}: more than {len(timesteps)} need the student's teacher: expected "
                "teacher=<name or folder>"
            )
        return steps < most, (end - (steps - 2) if steps < most else 0), end
