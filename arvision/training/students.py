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
from .captions import caption_figures, vocabulary
from .data import CLASS_NAMES
from .publish import publish, write_demonstration_card


def draw_sheet(
    student: Any, own: Tensor, conditions: list[Any], seeds: list[tuple[int, int]], path: Path
) -> None:
    """Write a picture: the teacher's images, and the student's for the same noise, a row per steps.

    Args:
        student: to draw with.
        own: [B, N], the teacher's tokens.
        conditions: of the images.
        seeds: of the images.
        path: of the picture.
    """
    rows = [("teacher", student.decode(own.to(student.device)))]
    for steps in range(1, len(student.timesteps) + 1):
        drawn = get_sampler("dd", steps=steps)(student, conditions, seeds=seeds)
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
    captions = getattr(student, "captions", None)
    card = {
        "kind": "student",
        "conditions": "class" if captions is None else "text",
        "summary": f"{kind} student of {Path(figures['teacher']).name}: an image in one or two passes",
        "student_of": figures["teacher"],
    }
    parts = {
        "transformer": student.transformer.cpu(),
        "tokenizer": student.tokenizer.cpu(),
        "sampler": get_sampler("dd"),
    }
    if captions is not None:
        parts |= {
            "text_encoder": captions.text_encoder.cpu(),
            "text_tokenizer": captions.text_tokenizer,
        }
    publish(parts, folder, card, {name: config[name] for name in names})
    figures |= _fashion_figures(load(folder, device="cpu"), len(student.timesteps), num)
    figures["parameters"] = sum(p.numel() for p in student.transformer.parameters())
    _card(folder, figures, num)
    write_json(folder.parent / "figures.json", figures)
    return figures


def _fashion_figures(pipe: ARPipeline, num_steps: int, num: int) -> dict[str, Any]:
    """How many samples show what was asked for, by steps; nothing where that is not Fashion-MNIST."""
    every = range(1, num_steps + 1)
    if list(pipe.config["class_names"] or []) == list(CLASS_NAMES):
        labels = torch.arange(num) % len(CLASS_NAMES)
        drawn = {str(steps): _draw(pipe, labels.tolist(), steps) for steps in every}
        shares = {k: float(class_consistency(images, labels)) for k, images in drawn.items()}
        return {"class_consistency": shares}
    words = getattr(pipe, "text_tokenizer", None)
    of_fashion = words is not None and set(vocabulary()) <= set(words.get_vocab())
    if not of_fashion or _draw(pipe, ["a boot"], 1).shape[2:] != (32, 32):
        return {}
    shown = {
        str(steps): caption_figures(lambda prompts, k=steps: _draw(pipe, prompts, k), num)
        for steps in every
    }
    return {
        name: {steps: found[name] for steps, found in shown.items()}
        for name in ("garment", "brightness")
    }


def _draw(pipe: ARPipeline, prompts: list[Any], steps: int, batch_size: int = 125) -> Tensor:
    images = []
    for part in torch.arange(len(prompts)).split(batch_size):
        seeds = [(1, image) for image in part.tolist()]
        run: dict[str, Any] = {"seed": seeds, "steps": steps, "progress": False}
        asked = [prompts[image] for image in part.tolist()]
        out = sample(pipe, asked, "dd", output_type="pt", **run)
        images.append(to_uint8(out.images))
    return torch.cat(images)


def _card(folder: Path, figures: dict[str, Any], num: int) -> None:
    teacher = figures["teacher"]
    is_fashion = "class_consistency" in figures or "garment" in figures
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
            f"(other noise, same condition): {figures['chance']:.3f}."
        )
    if "log_likelihood" in figures:
        found = figures["log_likelihood"]
        data.append(f"the scores of the teacher `{teacher}` along its own samples{origin}")
        measured["Log-likelihood"] = (
            f"of a token under the teacher: {found['after']:.2f} (before score distillation "
            f"{found['before']:.2f}, of the teacher's own samples {found['teacher']:.2f})."
        )
    titles = {
        "class_consistency": ("Class consistency", "the project's classifier"),
        "garment": ("Garment of the caption", "the project's classifier"),
        "brightness": ("Brightness of the caption", "mean of garment pixels"),
    }
    for name, (title, judge) in titles.items():
        if name in figures:
            shares = ", ".join(f"{v:.3f} at steps={k}" for k, v in figures[name].items())
            measured[title] = f"of {num} samples ({judge}): {shares}."
    if "init" in figures:
        data.append(f"started from the weights of the student `{figures['init']}`")
    command = f"arvision distill --teacher {teacher} --out runs/{folder.name}"
    if "captions" in figures:
        command += " --prompts FILE"
        data.append(f"{figures['captions']:,} captions, which took turns")
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
