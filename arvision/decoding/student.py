"""Students of Distilled Decoding: their loop, recognising a codebook, and the nearest code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..contracts import (
    Conditions,
    Samples,
    ScaleModel,
    StudentModel,
    codebook_of,
)
from ..errors import InputError
from .flow import flow_noise
from .parts import fixed_part
from .run import Run


def codebook_mark(codebook: Tensor) -> list[float]:
    """A few numbers that tell a codebook [V, D] from another one, but not from its rounding."""
    codes = codebook.detach().cpu().double()
    weights = torch.arange(len(codes), dtype=torch.float64).cos()
    return [round(value, 4) for value in (weights @ codes).tolist()]


def check_codebook(codebook: Tensor, mark: Sequence[float] | None) -> None:
    """Refuse a codebook that is not the one with this mark.

    Raises:
        InputError: see above.
    """
    if mark is None:
        return
    ours, theirs = torch.tensor(codebook_mark(codebook)), torch.tensor(list(mark))
    if len(ours) != len(theirs) or float((ours - theirs).norm()) > 0.05 * float(theirs.norm()):
        raise InputError(
            "the tokenizer has another codebook than the one that the student was trained for: "
            "expected the tokenizer of its teacher"
        )


def nearest_code(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index [...] of the nearest code of each vector [..., D], by one matrix product."""
    codes = codebook.to(vectors)
    return (vectors @ codes.T - codes.square().sum(-1) / 2).argmax(-1)


@dataclass(frozen=True)
class Teacher:
    """Who draws some of the kept units anew, between two passes of the student.

    Attributes:
        model: a token or scale model with the student's codebook.
        first: unit that it draws first.
        last: unit before which it ends.
        pick: guided logits [B, n, V] and Gaussian noise [B, n, D] to tokens [B, n].
    """

    model: Any
    first: int
    last: int
    pick: Callable[[Tensor, Tensor], Tensor]


def check_teacher(teacher: Any, student: StudentModel) -> None:
    """Refuse a teacher that cannot be the student's.

    Raises:
        InputError: no codebook, another one than the student's, or another number of tokens.
    """
    codes = codebook_of(teacher)
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


def decode_student(
    model: StudentModel,
    conditions: Conditions,
    run: Run,
    *,
    starts: bool,
    resumes: Sequence[int],
    teacher: Teacher | None = None,
) -> Samples:
    """Draw one image per condition in a few passes.

    Args:
        model: a student.
        conditions: one per image.
        run: the ledger; its guidance scale is that of the teacher's passes.
        starts: whether the student draws the whole image first.
        resumes: numbers of known units from which it then predicts the rest anew, in turn.
        teacher: draws units in between.

    Returns:
        Tokens [B, N]; `embeddings` [B, N, D] where the student decodes vectors of its own; the
        statistics of `Run.stats`, and `teacher_passes`.

    Raises:
        InputError: a prediction that is NaN or infinite.
    """
    run.begin(model.codebook.device)
    canvas = _Canvas(model, conditions, run)
    if starts:
        canvas.predict(0)
    teacher_passes = 0
    if teacher is not None and not run.stopped:
        for begin, logits in _teacher_laws(teacher, conditions, canvas):
            canvas.redraw(
                teacher.pick(logits, canvas.noise[:, begin : begin + logits.shape[1]]), begin
            )
            teacher_passes += 1
            if run.stopped:
                break
    for known in resumes:
        if not run.stopped:
            canvas.predict(known)
    has_vectors = model.split < len(model.unit_ends)
    told = {"teacher_passes": teacher_passes, **run.told}
    return run.samples(canvas.vectors if has_vectors else None, **told)


def _teacher_laws(
    teacher: Teacher, conditions: Conditions, canvas: _Canvas
) -> Iterator[tuple[int, Tensor]]:
    """First place and guided logits [B, n, V] of each of the teacher's units in turn.

    Whoever takes them writes the tokens of a unit into the canvas before asking for the next.
    """
    run, ends = canvas.run, (0, *canvas.model.unit_ends)
    first, last = teacher.first, teacher.last
    if isinstance(teacher.model, ScaleModel):
        scales: Any = teacher.model.start(conditions, run.guidance_scale)
        if first:
            scales.catch_up(run.tokens[:, : ends[first]])
        for unit in range(first, last):
            yield ends[unit], scales.next()
            scales.feed(run.tokens[:, ends[unit] : ends[unit + 1]])
        return
    state, logits = teacher.model.start(conditions, run.guidance_scale)
    fed = 0
    for unit in range(first, last):
        if unit > 0:
            part = run.tokens[:, fed:unit]
            logits = state.extend(part)[:, -1]
            every = torch.arange(part.shape[1], device=part.device).expand_as(part)
            state.commit(every, torch.full_like(part[:, 0], part.shape[1]))
            fed = unit
        yield unit, logits[:, None]


@runtime_checkable
class TakesVectors(Protocol):
    """A student whose pass can be made a function of vectors alone, of fixed shapes."""

    def about(
        self, conditions: Conditions, known: int
    ) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """`StudentModel.predict` with these conditions and this number of known units."""
        ...


@dataclass
class StudentDraw:
    """All tokens of a student's pass: a function of fixed shapes.

    Attributes:
        ask: vectors [B, N, D] to logits [B, N, V] and vectors [B, N, D].
        codes: [V, D].
        split: tokens whose code is decoded; behind them it is their vector.
        run: the ledger, which watches the numbers.
    """

    ask: Callable[[Tensor], tuple[Tensor, Tensor]]
    codes: Tensor
    split: int
    run: Run

    def __call__(self, given: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, N] and what is decoded for them [B, N, D]."""
        logits, vectors = self.ask(given)
        self.run.watch(logits)
        self.run.watch(vectors)
        vectors = vectors.to(self.codes)
        tokens = logits.argmax(-1)
        # A vector is decoded as it is; as a token it counts as the code next to it.
        tokens[:, self.split :] = nearest_code(vectors[:, self.split :], self.codes)
        mixed = torch.cat([self.codes[tokens[:, : self.split]], vectors[:, self.split :]], dim=1)
        return tokens, mixed


class _Canvas:
    """One batch of a student: its noise, and the vectors that are known."""

    def __init__(self, model: StudentModel, conditions: Conditions, run: Run) -> None:
        self.model, self.conditions, self.run = model, conditions, run
        codes = model.codebook
        self.codes = codes.double() if codes.dtype == torch.float64 else codes.float()
        self._places = torch.arange(run.num_tokens, device=codes.device)
        self._images = torch.arange(run.batch, device=codes.device)[:, None]
        every = self._places.expand(run.batch, -1)
        self.noise = flow_noise(run.noise, every, codes.shape[1]).to(self.codes)
        self.vectors = self.codes.new_zeros(*every.shape, codes.shape[1])

    def predict(self, known: int) -> None:
        """All tokens behind the first `known` units, from their codes and the noise."""
        ends, split = (0, *self.model.unit_ends), self.model.split
        begin, split = ends[known], ends[split]
        given = torch.cat([self.codes[self.run.tokens[:, :begin]], self.noise[:, begin:]], dim=1)
        ask = self._about(known)
        draw = StudentDraw(ask, self.codes, split, self.run)
        tokens, mixed = fixed_part(self.run, draw, given)
        self._write(tokens[:, begin:], mixed[:, begin:], begin)

    def _about(self, known: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """What the student says of vectors; a graph does not read the conditions again."""
        if self.run.told and isinstance(self.model, TakesVectors):
            return self.model.about(self.conditions, known)
        return lambda vectors: self.model.predict(self.conditions, vectors, known)

    def redraw(self, tokens: Tensor, begin: int) -> None:
        """Tokens [B, n] of the teacher at places `begin`..."""
        self._write(tokens, self.codes[tokens], begin)

    def _write(self, tokens: Tensor, vectors: Tensor, begin: int) -> None:
        end = begin + tokens.shape[1]
        self.vectors[:, begin:end] = vectors
        self.run.next_pass()
        self.run.record(self._images, self._places[begin:end].expand_as(tokens), tokens)
        self.run.check()
        self.run.report(torch.full_like(self.run.lengths, end - begin))
