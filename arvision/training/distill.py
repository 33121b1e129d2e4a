"""`arvision.distill`: from a teacher to a published student, resumable at every step."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..api import load
from ..decoding.student import check_teacher
from ..errors import InputError, check_count, unknown_name
from ..eval.classifier import FashionClassifier, load_classifier
from ..files import user_path, working_in
from ..models import FAMILIES
from ..networks import bare
from ..pipeline import ARPipeline
from ..samplers import get_sampler
from .captions import training_captions
from .distill_objective import Described, DistillObjective, PictureLoss, agreement
from .loop import MOST_BATCH, FitConfig, Objective, fit
from .pairs import Pairs, PairSettings, generate_pairs, read_pairs, teacher_tokens
from .processes import joined
from .score_distill import (
    ScoreObjective,
    ScoreSettings,
    TeacherScores,
    TrainedFeatures,
    log_likelihood,
)
from .students import draw_sheet, publish_student

METHODS = ("dd1", "dd2")
SHEET_IMAGES = 10
HELD_OUT_SEED = 2
"""Of the noise on which score distillation is judged."""


MOST_PAIRS = 10_000_000
"""Pairs of a distillation."""


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """How a student is made.

    Attributes:
        num_pairs: of the teacher, to learn from.
        num_held_out: further pairs, which only the figures see.
        shard_size: pairs per file, which is also the teacher's batch.
        timesteps: numbers of known tokens (scales) to train for, 0 first; None for the student
            family's own choice.
        fit: of the training.
        vector_weight: of the squared error of the predicted vectors, see `DistillObjective`.
        prompts: captions of a text-conditional teacher, which take turns.
        intermediate_size: width of the student's feed-forward layers; None for its teacher's.
        init: a trained student to start from. "dd1": perhaps of another teacher, whose weights it takes
            wherever shapes allow; "dd2": of this teacher, None to make one by "dd1" first.
        score: method "dd2": see `ScoreSettings`.
        score_fit: method "dd2": of that training.
        picture_weight: of a loss on decoded pictures, pixels and, where the pictures are 32x32,
            features of the Fashion-MNIST classifier; 0 for none.
        sheet_every: steps between two sheets of samples.
        num_card: samples that the class consistency is measured on.
    """

    num_pairs: int = 60_000
    num_held_out: int = 1000
    shard_size: int = 256
    timesteps: Sequence[int] | None = None
    fit: FitConfig = FitConfig(
        steps=3000,
        batch_size=64,
        learning_rate=1e-3,
        weight_decay=0.02,
        mixed_precision="bf16",
        log_every=50,
        average_decay=0.995,
    )
    vector_weight: float = 0.1
    picture_weight: float = 0.0
    prompts: Sequence[str] | None = None
    intermediate_size: int | None = None
    init: str | Path | None = None
    score: ScoreSettings = ScoreSettings()
    score_fit: FitConfig = FitConfig(
        steps=3000,
        batch_size=64,
        learning_rate=5e-4,
        warmup=50,
        weight_decay=0.0,
        betas=(0.0, 0.95),
        mixed_precision="bf16",
        log_every=50,
        average_decay=0.99,
    )
    sheet_every: int = 500
    num_card: int = 1000

    def __post_init__(self) -> None:
        for name in ("num_pairs", "num_held_out", "shard_size", "sheet_every", "num_card"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: expected at least 1")
            check_count(name, getattr(self, name), MOST_PAIRS)
        check_count("shard_size", self.shard_size, MOST_BATCH)
        steps = self.timesteps
        if steps is not None and not (
            isinstance(steps, Sequence) and all(type(t) is int for t in steps)
        ):
            raise InputError(f"timesteps {steps!r}: expected integers such as 0,20")


FASHION_TEXT = DistillSettings(
    num_pairs=15_000,
    num_held_out=360,
    timesteps=(0, 20),
    intermediate_size=368,
    init="llamagen-fashion-dd",
)
"""Of `llamagen-fashion-t2i-dd`: narrow layers keep it below 6 MB, and the class-conditional teacher's
student knows most of what it must learn."""


def distill(
    teacher: str | Path,
    out: str | Path,
    settings: DistillSettings | None = None,
    *,
    method: str = "dd1",
    progress: bool = True,
) -> dict[str, Any]:
    """Distil a teacher into a student that draws an image in one or two passes (`sampler="dd"`).

    Pairs of noise and tokens lie in `out/pairs`, checkpoints and the log of the training in
    `out/dd1` (and `out/dd2`), a sheet of teacher and student in `out/samples.png`, the finished
    student in `out/<teacher>-dd`. Run it again to resume. Under `torchrun` the processes share
    the pairs and both trainings.

    Args:
        teacher: embedded name or folder of a token model (of classes or captions) or a scale model.
        out: folder, see above.
        settings: see `DistillSettings`.
        method: "dd1", from pairs; "dd2", from the teacher's scores, which turns a student of "dd1"
            into one that draws vectors of its own in one pass.
        progress: show bars.

    Returns:
        Figures. "dd1", on held-out pairs: "agreement" with the teacher's tokens by number of known
        tokens (scales), "agreement_by_position" from noise alone, "chance" (how often the teacher
        agrees with itself on other noise of the same class). "dd2": "log_likelihood" of a token
        under the teacher, "before" and "after", and of the teacher's own. Both: "class_consistency"
        of samples where the classes are those of Fashion-MNIST, "garment" and "brightness" (shares of
        samples that show what the caption says) where the captions are.

    Raises:
        InputError: an unknown method, a teacher of another kind, captions that are missing or have no
            effect, a student of another teacher, or another run that works in `out`.
        CheckpointError: pairs or checkpoints of another teacher or other settings.

    Papers: Liu et al., "Distilled Decoding 1: One-step Sampling of Image Auto-regressive Models with
    Flow Matching", 2024, section 3; Liu et al., "Distilled Decoding 2", 2025.
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    settings = settings or DistillSettings()
    processes, out = joined(), user_path(out)
    is_main = processes.is_main_process
    with working_in(out) if is_main else contextlib.nullcontext():
        return _distill(teacher, out, settings, method, progress)


def _distill(
    teacher: str | Path, out: Path, settings: DistillSettings, method: str, progress: bool
) -> dict[str, Any]:
    """`distill`, in a folder that no other run works in."""
    processes = joined()
    pipe = load(teacher, device="cpu").to(processes.device)
    family = student_family(pipe)
    config = pipe.config
    laws = {name: config[name] for name in ("guidance_scale", "temperature", "top_k", "top_p")}
    asked = conditions_of(pipe, settings.prompts)
    run = _Run(pipe, asked, PairSettings(**laws), settings, out, progress)
    name = str(teacher) if (Path(teacher).name == str(teacher)) else str(Path(teacher).resolve())
    figures: dict[str, Any] = {"teacher": name, "method": method}
    if settings.prompts is not None:
        figures["captions"] = len(asked)
    if method == "dd2" and settings.init is not None:
        student = _given_student(settings.init, family, pipe)
    else:
        torch.manual_seed(settings.fit.seed)  # layers that the teacher lacks start at random
        sizes = {"intermediate_size": settings.intermediate_size}
        sizes = {key: value for key, value in sizes.items() if value is not None}
        if sizes and "intermediate_size" not in bare(pipe.transformer).config:
            raise InputError(
                f"intermediate_size {settings.intermediate_size}: students of a "
                f"{type(bare(pipe.transformer)).__name__} have the widths of their teacher"
            )
        student = family.from_teacher(pipe.model, settings.timesteps, teacher_name=name, **sizes)
        if settings.init is not None:
            student.start_from(_any_student(settings.init, family))
            figures["init"] = str(settings.init)
        student = student.to(processes.device)
        figures |= run.from_pairs(student)
    if method == "dd2":
        student, found = run.from_scores(student)
        figures |= found
    if not processes.is_main_process:
        return {}
    folder = out / f"{Path(teacher).name}-dd"
    return publish_student(student, pipe, folder, figures, settings.num_card)


def run_student_recipe(
    name: str,
    out: Path,
    steps: int | None,
    num_pairs: int | None,
    num_card: int,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Make `llamagen-fashion-t2i-dd`: distil the text-conditional teacher along captions of the data.

    Args:
        name: of the recipe, which is the teacher's with "-dd".
        out: see `distill`.
        steps: at most so many; None for the recipe's own number.
        num_pairs: likewise.
        num_card: samples that the card is measured on.
        progress: show bars.
    """
    settings = FASHION_TEXT
    fit = replace(settings.fit, steps=min(steps or settings.fit.steps, settings.fit.steps))
    pairs = min(num_pairs or settings.num_pairs, settings.num_pairs)
    held = min(settings.num_held_out, pairs)
    settings = replace(settings, fit=fit, num_pairs=pairs, num_held_out=held, num_card=num_card)
    settings = replace(settings, prompts=training_captions())
    return distill(name.removesuffix("-dd"), out, settings, progress=progress)


def conditions_of(pipe: ARPipeline, prompts: Sequence[str] | None) -> Sequence[Any]:
    """What a teacher is asked for in turn: its classes, or the given captions.

    Raises:
        InputError: captions for a teacher of classes, or none for one that takes captions.
    """
    num_classes = bare(pipe.transformer).config.get("num_classes")
    if num_classes is not None:
        if prompts is not None:
            raise InputError("prompts: the teacher is class-conditional, leave them out")
        return range(num_classes)
    if prompts is None or not len(prompts):
        raise InputError("the teacher takes captions: expected prompts, a list or one per line")
    if isinstance(prompts, str) or not all(isinstance(each, str) for each in prompts):
        raise InputError("prompts: expected a list of captions")
    return list(prompts)


def _any_student(path: str | Path, family: Any) -> Any:
    """A trained student of a family, in float32.

    Raises:
        InputError: another kind of model.
    """
    student = load(path, device="cpu").model
    if not isinstance(student, family):
        raise InputError(f"init {path}: a {type(student).__name__}, expected a {family.__name__}")
    student.transformer.float()
    return student


def _given_student(path: str | Path, family: Any, teacher: ARPipeline) -> Any:
    """A trained student of this teacher.

    Raises:
        InputError: another kind of model, or another codebook or grid.
    """
    student = _any_student(path, family).to(teacher.device)
    try:
        check_teacher(teacher.model, student)
    except InputError as error:
        raise InputError(f"init {path}: a student of another teacher: {error}") from error
    return student


class _Run:
    """What the stages of a run share."""

    def __init__(
        self,
        pipe: ARPipeline,
        conditions: Sequence[Any],
        laws: PairSettings,
        settings: DistillSettings,
        out: Path,
        progress: bool,
    ) -> None:
        self.pipe, self.laws, self.settings, self.out = pipe, laws, settings, out
        self.progress, self.processes = progress, joined()
        self.teacher: Any = pipe.model
        self.conditions = conditions

    def from_pairs(self, student: Any) -> dict[str, Any]:
        """Train a student on the teacher's pairs; its figures."""
        settings, processes = self.settings, self.processes
        total = settings.num_pairs + settings.num_held_out
        generate_pairs(
            self.teacher,
            self.conditions,
            self.laws,
            self.out / "pairs",
            total,
            shard_size=settings.shard_size,
            process=(processes.process_index, processes.num_processes),
            progress=self.progress and processes.is_main_process,
        )
        processes.wait_for_everyone()
        pairs = read_pairs(self.teacher, self.conditions, self.laws, self.out / "pairs", total)
        torch.manual_seed(settings.fit.seed)
        student.tokenizer.requires_grad_(False)
        known = Pairs(pairs.labels[: settings.num_pairs], pairs.tokens[: settings.num_pairs])
        seed, picture = self.laws.seed, _picture(student, settings)
        objective = DistillObjective(
            student, known, self.conditions, seed, settings.vector_weight, *picture
        )
        held = torch.arange(settings.num_pairs, total)
        log = self._fit(objective, settings.fit, "dd1", student, (seed, held, pairs.tokens[held]))
        figures = {
            "pairs": settings.num_pairs,
            "seconds": log[-1]["seconds"],
            "agreement": {},
            "chance": _chance(pairs, self.conditions, held),
        }
        for step in student.timesteps:
            found = agreement(student, pairs, self.conditions, held, seed, step)
            begin = (0, *student.unit_ends)[step]
            figures["agreement"][str(step)] = float(found[begin:].mean())
            if step == 0:
                figures["agreement_by_position"] = [round(share, 4) for share in found.tolist()]
        return figures

    def from_scores(self, student: Any) -> tuple[Any, dict[str, Any]]:
        """Train a student on the teacher's scores; the one-step student, and its figures."""
        settings = self.settings
        torch.manual_seed(settings.score_fit.seed)
        shaping, scale = self.laws.shaping(), self.laws.guidance_scale
        scores = TeacherScores(self.teacher, shaping, scale, self.conditions)
        # In a short run, too, the student shall move.
        warmup = min(settings.score.warmup, settings.score_fit.steps // 4)
        objective = ScoreObjective(
            student.transformer,
            scores,
            student.codebook.detach(),
            (student.num_tokens, len(self.conditions), scores.feature_dim),
            replace(settings.score, warmup=warmup),
            described=Described(student, self.conditions),
            trunk=TrainedFeatures(self.teacher) if settings.score.trains_features else None,
        )
        # From now on all positions are decoded from the vectors, in one pass.
        student.transformer.register_to_config(split=0, timesteps=[0])
        student.split = 0
        student.timesteps = (0,)
        images = torch.arange(settings.num_held_out)
        own = self._own_tokens(images)
        judged = {
            "before": self._likelihood(student, scores, images),
            "teacher": _mean_likelihood(scores, images % len(self.conditions), own),
        }
        log = self._fit(objective, settings.score_fit, "dd2", student, (HELD_OUT_SEED, images, own))
        judged["after"] = self._likelihood(student, scores, images)
        return student, {"log_likelihood": judged, "seconds": log[-1]["seconds"]}

    def _own_tokens(self, images: Tensor) -> Tensor:
        """The teacher's for the held-out noise of score distillation."""
        parts = [
            teacher_tokens(
                self.teacher,
                self._asked(part),
                [(HELD_OUT_SEED, image) for image in part.tolist()],
                self.laws,
            )
            for part in images.split(100)
        ]
        return torch.cat(parts)

    def _likelihood(self, student: Any, scores: TeacherScores, images: Tensor) -> float:
        seeds = [(HELD_OUT_SEED, image) for image in images.tolist()]
        drawn = get_sampler("dd", steps=1)(student, self._asked(images), seeds=seeds)
        return _mean_likelihood(scores, images % len(self.conditions), drawn.tokens)

    def _asked(self, images: Tensor) -> list[Any]:
        """The conditions of the images with these numbers."""
        return [self.conditions[k] for k in (images % len(self.conditions)).tolist()]

    def _fit(
        self,
        objective: Objective,
        config: FitConfig,
        name: str,
        student: Any,
        shown: tuple[int, Tensor, Tensor],
    ) -> list[dict[str, Any]]:
        """Run the loop, and draw a sheet now and then.

        Args:
            objective: to train.
            config: of the loop.
            name: of its folder.
            student: whose pictures are drawn.
            shown: seed, images [M] and the teacher's tokens [M, N] for their noise; the first ones
                are on the sheet.
        """
        seed, images, own = shown[0], shown[1][:SHEET_IMAGES], shown[2][:SHEET_IMAGES]
        asked = self._asked(images)
        seeds = [(seed, image) for image in images.tolist()]

        def on_log(line: dict[str, Any]) -> None:
            due = line["step"] % self.settings.sheet_every == 0 or line["step"] == config.steps
            if due and self.processes.is_main_process:
                was_training = student.transformer.training
                student.transformer.eval()
                draw_sheet(student, own, asked, seeds, self.out / "samples.png")
                student.transformer.train(was_training)

        return fit(objective, config, self.out / name, progress=self.progress, on_log=on_log)


def _mean_likelihood(scores: TeacherScores, labels: Tensor, tokens: Tensor) -> float:
    """Of a token under the teacher, behind the tokens before it; at least -20 each."""
    total = 0.0
    for some, part in zip(labels.split(100), tokens.split(100), strict=True):
        total += float(log_likelihood(scores(some, part)[0], part)) * part.numel()
    return round(total / tokens.numel(), 4)


def student_family(pipe: ARPipeline) -> Any:
    """The class of students of a teacher.

    Raises:
        InputError: a model that has none.
    """
    name = type(bare(pipe.transformer)).__name__
    by_teacher = {
        entry.facts["teacher"]: entry.value for entry in FAMILIES if "teacher" in entry.facts
    }
    if name not in by_teacher:
        raise InputError(
            f"{name} cannot be distilled: expected a teacher of {', '.join(by_teacher)}"
        )
    return by_teacher[name]


def _picture(student: Any, settings: DistillSettings) -> tuple[Any, ...]:
    if settings.picture_weight == 0:
        return ()
    classifier: FashionClassifier = load_classifier().requires_grad_(False).to(student.device)

    def features(pixels: Tensor) -> Tensor:
        return classifier.trunk(pixels.mean(1, keepdim=True))

    with torch.no_grad():
        codes = student.codebook
        blank = student.decode_vectors(codes.new_zeros(1, student.num_tokens, codes.shape[1]))
    known = features if blank.shape[2:] == (32, 32) else None
    return PictureLoss(student.decode_vectors, known), settings.picture_weight


def _chance(pairs: Pairs, conditions: Sequence[Any], held: Tensor) -> float:
    """Share of tokens that a held-out image has in common with another one of its condition."""
    alike: dict[Any, list[int]] = {}
    for image, label in enumerate(pairs.labels.tolist()):
        alike.setdefault(conditions[label], []).append(image)
    others = []
    for image in held.tolist():
        group = alike[conditions[int(pairs.labels[image])]]
        other = group[group.index(image) - 1]
        if other != image:
            others.append((image, other))
    if not others:
        return float("nan")
    first, second = torch.tensor(others).T
    return float((pairs.tokens[first] == pairs.tokens[second]).double().mean())
