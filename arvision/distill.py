"""`arvision.distill`: from a teacher to a published student, resumable at every step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor

from .api import load, sample
from .errors import InputError, unknown_name
from .eval.classifier import FashionClassifier, class_consistency, load_classifier
from .files import replacing
from .models import FAMILIES
from .pipeline import ARPipeline
from .publish import publish, to_bytes
from .samplers import get_sampler
from .sheet import labelled_rows
from .training.data import CLASS_NAMES
from .training.distill import DistillObjective, PictureLoss, agreement
from .training.loop import FitConfig, fit
from .training.pairs import Pairs, PairSettings, generate_pairs, read_pairs

SHEET_IMAGES = 10


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
    sheet_every: int = 500
    num_card: int = 1000

    def __post_init__(self) -> None:
        for name in ("num_pairs", "num_held_out", "shard_size", "sheet_every", "num_card"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: expected at least 1")
        steps = self.timesteps
        if steps is not None and not (
            isinstance(steps, Sequence) and all(type(t) is int for t in steps)
        ):
            raise InputError(f"timesteps {steps!r}: expected integers such as 0,20")


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
    `out/dd1`, a sheet of teacher and student in `out/samples.png`, the finished student in
    `out/<teacher>-dd`. Run it again to resume. Under `accelerate launch` the processes share both
    the pairs and the training.

    Args:
        teacher: embedded name or folder of a class-conditional token or scale model.
        out: folder, see above.
        settings: see `DistillSettings`.
        method: "dd1", from pairs.
        progress: show bars.

    Returns:
        Figures on held-out pairs: "agreement" with the teacher's tokens by number of known tokens
        (scales), "agreement_by_position" from noise alone, "chance" (how often the teacher agrees
        with itself on other noise of the same class), and "class_consistency" of one-step samples
        where the classes are those of Fashion-MNIST.

    Raises:
        InputError: an unknown method, or a teacher of another kind.
        CheckpointError: pairs or checkpoints of another teacher or other settings.

    Paper: Liu et al., "Distilled Decoding 1: One-step Sampling of Image Auto-regressive Models with
    Flow Matching", 2024, section 3.
    """
    if method != "dd1":
        raise unknown_name("method", method, ["dd1"])
    settings = settings or DistillSettings()
    processes, out = PartialState(), Path(out)
    pipe = load(teacher, device="cpu").to(processes.device)
    family = student_family(pipe)
    config = pipe.config
    laws = {name: config[name] for name in ("guidance_scale", "temperature", "top_k", "top_p")}
    pair_settings = PairSettings(**laws)
    total = settings.num_pairs + settings.num_held_out
    generate_pairs(
        pipe.model,
        pipe.transformer.config["num_classes"],
        pair_settings,
        out / "pairs",
        total,
        shard_size=settings.shard_size,
        process=(processes.process_index, processes.num_processes),
        progress=progress and processes.is_main_process,
    )
    processes.wait_for_everyone()
    pairs = read_pairs(pipe.model, pair_settings, out / "pairs", total)
    torch.manual_seed(settings.fit.seed)
    name = str(teacher) if (Path(teacher).name == str(teacher)) else str(Path(teacher).resolve())
    student = family.from_teacher(pipe.model, settings.timesteps, teacher_name=name)
    student.tokenizer.requires_grad_(False)
    known = Pairs(pairs.labels[: settings.num_pairs], pairs.tokens[: settings.num_pairs])
    objective = DistillObjective(
        student, known, pair_settings.seed, settings.vector_weight, *_picture(student, settings)
    )
    held = torch.arange(settings.num_pairs, total)

    def on_log(line: dict[str, Any]) -> None:
        due = line["step"] % settings.sheet_every == 0 or line["step"] == settings.fit.steps
        if due and processes.is_main_process:
            was_training = student.transformer.training
            student.transformer.eval()
            draw_sheet(student, pairs, held[:SHEET_IMAGES], pair_settings.seed, out / "samples.png")
            student.transformer.train(was_training)

    log = fit(objective, settings.fit, out / "dd1", progress=progress, on_log=on_log)
    if not processes.is_main_process:
        return {}
    figures: dict[str, Any] = {
        "teacher": name,
        "pairs": settings.num_pairs,
        "seconds": log[-1]["seconds"],
        "agreement": {},
        "chance": _chance(pairs, held),
    }
    for step in student.timesteps:
        found = agreement(student, pairs, held, pair_settings.seed, step)
        begin = (0, *student.unit_ends)[step]
        figures["agreement"][str(step)] = float(found[begin:].mean())
        if step == 0:
            figures["agreement_by_position"] = [round(share, 4) for share in found.tolist()]
    folder = out / f"{Path(teacher).name}-dd"
    return publish_student(student, pipe, folder, figures, settings.num_card)


def student_family(pipe: ARPipeline) -> Any:
    """The class of students of a teacher.

    Raises:
        InputError: a model that has none.
    """
    name = type(pipe.transformer).__name__
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
    classifier: FashionClassifier = load_classifier().requires_grad_(False)

    def features(pixels: Tensor) -> Tensor:
        return classifier.trunk(pixels.mean(1, keepdim=True))

    with torch.no_grad():
        blank = student.decode_vectors(
            torch.zeros(1, student.num_tokens, student.codebook.shape[1])
        )
    known = features if blank.shape[2:] == (32, 32) else None
    return PictureLoss(student.decode_vectors, known), settings.picture_weight


def _chance(pairs: Pairs, held: Tensor) -> float:
    """Share of tokens that two images of a class have in common."""
    num_classes = int(pairs.labels.max()) + 1
    first, second = held[:-num_classes], held[num_classes:]
    if len(first) == 0:
        return float("nan")
    return float((pairs.tokens[first] == pairs.tokens[second]).double().mean())


def draw_sheet(student: Any, pairs: Pairs, images: Tensor, seed: int, path: Path) -> None:
    """Write a picture: the teacher's images, and the student's for the same noise, a row per steps."""
    labels = pairs.labels[images].tolist()
    rows = [("teacher", student.decode(pairs.tokens[images]))]
    for steps in range(1, len(student.timesteps) + 1):
        drawn = get_sampler("dd", steps=steps)(
            student, labels, seeds=[(seed, image) for image in images.tolist()]
        )
        found = drawn.tokens if drawn.embeddings is None else drawn.embeddings
        rows.append((f"student, steps={steps}", student.decode(found)))
    sheet = labelled_rows([(label, _pictures(pixels)) for label, pixels in rows])
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


def _pictures(pixels: Tensor) -> list[Image.Image]:
    levels = to_bytes(pixels.cpu() / 2 + 0.5).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(image) for image in levels]


def publish_student(
    student: Any, teacher: ARPipeline, folder: Path, figures: dict[str, Any], num: int
) -> dict[str, Any]:
    """Write a student as a pipeline folder with its card; returns the figures.

    Args:
        student: trained.
        teacher: its pipeline.
        folder: to write.
        figures: see `distill`.
        num: one-step samples to measure on.
    """
    config = teacher.config
    names = ("class_names", "guidance_scale", "temperature", "top_k", "top_p", "num_threads")
    kind = type(teacher.transformer).__name__.removesuffix("Transformer")
    card = {
        "kind": "student",
        "conditions": "class",
        "summary": f"{kind} student of {Path(figures['teacher']).name}: an image in one or two passes",
        "student_of": figures["teacher"],
    }
    parts = {
        "transformer": student.transformer.cpu(),
        "tokenizer": student.tokenizer.cpu(),
        "sampler": get_sampler("dd"),
    }
    publish(parts, folder, card, {name: config[name] for name in names})
    if list(config["class_names"] or []) == list(CLASS_NAMES):
        pipe, labels = load(folder, device="cpu"), torch.arange(num) % len(CLASS_NAMES)
        figures["class_consistency"] = {
            str(steps): float(class_consistency(_draw(pipe, labels, steps), labels))
            for steps in range(1, len(student.timesteps) + 1)
        }
    figures["parameters"] = sum(p.numel() for p in student.transformer.parameters())
    with replacing(folder / "README.md") as path:
        path.write_text(_card(folder, card, figures, num))
    with replacing(folder.parent / "figures.json") as path:
        path.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def _draw(pipe: ARPipeline, labels: Tensor, steps: int, batch_size: int = 125) -> Tensor:
    images = []
    for part in torch.arange(len(labels)).split(batch_size):
        seeds = [(1, image) for image in part.tolist()]
        run: dict[str, Any] = {"seed": seeds, "steps": steps, "progress": False}
        out = sample(pipe, labels[part].tolist(), "dd", output_type="pt", **run)
        images.append(to_bytes(out.images))
    return torch.cat(images)


def _card(folder: Path, card: dict[str, str], figures: dict[str, Any], num: int) -> str:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    agreed = ", ".join(
        f"{share:.3f} {'from noise alone' if known == '0' else f'behind {known} known units'}"
        for known, share in figures["agreement"].items()
    )
    is_fashion = "class_consistency" in figures
    origin = (
        " (trained on Fashion-MNIST; Xiao, Rasul, Vollgraf 2017; MIT licence)" if is_fashion else ""
    )
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: arvision",
        "tags: [text-to-image, autoregressive, distillation, fashion-mnist]",
        "---",
        f"# {folder.name}",
        "",
        f"{card['summary']}. **A small demonstration model**, and a lossy one: it approximates its "
        "teacher's law.",
        "",
        f"- **Data**: {figures['pairs']:,} pairs of noise and tokens drawn by the teacher "
        f"`{figures['teacher']}` at its recommended settings through the flow-matching map"
        f"{origin}.",
        "- **Licence of the weights**: Apache-2.0.",
        f"- **Recipe**: `arvision distill --teacher {figures['teacher']} --out runs/{folder.name}`.",
        f"- **Wall time** of the training, without the pairs: {figures['seconds'] / 60:.0f} min (one "
        "thread of a shared two-core CPU).",
        f"- **Size**: {figures['parameters']:,} parameters; with the image tokenizer {size / 1e6:.1f} "
        "MB, half precision.",
        f"- **Agreement** with the teacher's tokens for the same noise, on held-out pairs: {agreed}; "
        f"chance (other noise, same class): {figures['chance']:.3f}.",
    ]
    if is_fashion:
        shares = ", ".join(f"{v:.3f} at steps={k}" for k, v in figures["class_consistency"].items())
        lines.append(
            f"- **Class consistency** of {num} samples (the project's classifier): {shares}."
        )
    return "\n".join([*lines, ""])
