"""Students on paper: sheets of their pictures, their folders and their cards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..api import load, sample
from ..card import FASHION, megabytes
from ..eval.classifier import class_consistency
from ..eval.pixels import to_uint8
from ..files import replacing, write_json
from ..pipeline import ARPipeline
from ..samplers import get_sampler
from ..sheet import labelled_rows
from .data import CLASS_NAMES
from .publish import publish, write_demonstration_card


def draw_sheet(
    student: Any, own: Tensor, labels: list[int], seeds: list[tuple[int, int]], path: Path
) -> None:
    """Write a picture: the teacher's images, and the student's for the same noise, a row per steps.

    Args:
        student: to draw with.
        own: [B, N], the teacher's tokens.
        labels: classes.
        seeds: of the images.
        path: of the picture.
    """
    rows = [("teacher", student.decode(own.to(student.device)))]
    for steps in range(1, len(student.timesteps) + 1):
        drawn = get_sampler("dd", steps=steps)(student, labels, seeds=seeds)
        found = drawn.tokens if drawn.embeddings is None else drawn.embeddings
        rows.append((f"student, steps={steps}", student.decode(found)))
    sheet = labelled_rows([(label, _pictures(pixels)) for label, pixels in rows])
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


def _pictures(pixels: Tensor) -> list[Image.Image]:
    levels = to_uint8(pixels.cpu(), value_range="signed").permute(0, 2, 3, 1).numpy()
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
    _card(folder, figures, num)
    write_json(folder.parent / "figures.json", figures)
    return figures


def _draw(pipe: ARPipeline, labels: Tensor, steps: int, batch_size: int = 125) -> Tensor:
    images = []
    for part in torch.arange(len(labels)).split(batch_size):
        seeds = [(1, image) for image in part.tolist()]
        run: dict[str, Any] = {"seed": seeds, "steps": steps, "progress": False}
        out = sample(pipe, labels[part].tolist(), "dd", output_type="pt", **run)
        images.append(to_uint8(out.images))
    return torch.cat(images)


def _card(folder: Path, figures: dict[str, Any], num: int) -> None:
    teacher, is_fashion = figures["teacher"], "class_consistency" in figures
    origin = f" (trained on {FASHION})" if is_fashion else ""
    data, measured = [], {}
    if "pairs" in figures:
        agreed = ", ".join(
            f"{share:.3f} {'from noise alone' if known == '0' else f'behind {known} known units'}"
            for known, share in figures["agreement"].items()
        )
        data.append(
            f"{figures['pairs']:,} pairs of noise and tokens drawn by the teacher `{teacher}` at its "
            f"recommended settings through the flow-matching map{origin}"
        )
        measured["Agreement"] = (
            f"with the teacher's tokens for the same noise, on held-out pairs: {agreed}; chance "
            f"(other noise, same class): {figures['chance']:.3f}."
        )
    if "log_likelihood" in figures:
        found = figures["log_likelihood"]
        data.append(f"the scores of the teacher `{teacher}` along its own samples{origin}")
        measured["Log-likelihood"] = (
            f"of a token under the teacher: {found['after']:.2f} (before score distillation "
            f"{found['before']:.2f}, of the teacher's own samples {found['teacher']:.2f})."
        )
    if is_fashion:
        shares = ", ".join(f"{v:.3f} at steps={k}" for k, v in figures["class_consistency"].items())
        measured["Class consistency"] = f"of {num} samples (the project's classifier): {shares}."
    command = f"arvision distill --teacher {teacher} --out runs/{folder.name}"
    if figures["method"] != "dd1":
        command += f" --method {figures['method']}"
    facts = {
        "Data": f"{'; '.join(data)}.",
        "Recipe": f"`{command}`.",
        "Wall time": f"{figures['seconds'] / 60:.0f} min of training, without the pairs (one thread "
        "of a shared two-core CPU).",
        "Size": f"{figures['parameters']:,} parameters; with the image tokenizer "
        f"{megabytes(folder)}, half precision.",
    }
    write_demonstration_card(
        folder,
        "**A small demonstration model**, and a lossy one: it approximates its teacher's law.",
        facts | measured,
        ("text-to-image", "autoregressive", "distillation"),
    )
