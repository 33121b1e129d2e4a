"""From trained parts to a model folder: a half-precision pipeline with a measured model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..api import load, sample
from ..card import DEMONSTRATION, FASHION, megabytes, settings_in_words, write_card
from ..decoding.draft_model import MEASURED
from ..errors import InputError, check_count, unknown_name
from ..eval.classifier import class_consistency
from ..eval.pixels import to_uint8
from ..files import making_folder
from ..pipeline import ARPipeline
from .captions import caption_figures, every_caption
from .classifier import train_classifier
from .data import CLASS_NAMES, fashion_folder, load_fashion, to_pixels
from .llamagen_draft import DRAFT_RECIPES, DraftRecipe, DraftResult, train_draft
from .mar_draft import MAR_DRAFT_RECIPES
from .recipes import RECIPES
from .stages import Recipe, stage_seconds

MOST_CARD = 1_000_000
"""Samples that a card is measured on, at most."""


STUDENT_RECIPES = ("llamagen-fashion-t2i-dd",)
"""Students whose recipe is more than one command of `arvision distill`."""


def publish(parts: dict[str, Any], folder: Path, card: dict[str, Any], settings: dict) -> None:
    """Write a pipeline folder in half precision; an older one is replaced only when this is whole.

    Args:
        parts: components by their name in the pipeline.
        folder: to write.
        card: "kind", "conditions" and "summary", for `list_models`.
        settings: recommended settings, arguments of `ARPipeline`.

    Raises:
        InputError: `folder` holds something else than a published model.
    """
    pipe = ARPipeline(**parts, **settings)
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, torch.float16)
    with making_folder(folder, is_ours=_is_model_folder, durable=True) as place:
        pipe.save_pretrained(place)
        for weights in place.rglob("*.safetensors"):
            weights.chmod(0o644)
        (place / "card.json").write_text(json.dumps(card, indent=1) + "\n")


def _is_model_folder(path: Path) -> bool:
    return all((path / name).is_file() for name in ("model_index.json", "card.json"))


def run_recipe(
    name: str,
    out: Path,
    *,
    steps: int | None = None,
    num_images: int | None = None,
    card_samples: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train (or resume) a recipe under `out` and write the finished model into `out / name`.

    Args:
        name: of a recipe.
        out: folder of the stages.
        steps: at most this many steps per stage; None for the recipe's own number.
        num_images: at most this many training images (or samples of a draft's target).
        card_samples: samples that the card is measured on; None for 1000.
        progress: show bars.

    Returns:
        The figures of the model card.

    Raises:
        InputError: no such recipe, no data set for it, or `card_samples` of a classifier, whose
            card is measured on the test images.
    """
    known = [*RECIPES, *DRAFT_RECIPES, *MAR_DRAFT_RECIPES, *STUDENT_RECIPES, "fashion-classifier"]
    if name not in known:
        raise unknown_name("recipe", name, known)
    if name not in DRAFT_RECIPES:  # those learn from their target's own samples
        fashion_folder()
    if name == "fashion-classifier" and card_samples is not None:
        raise InputError(f"card_samples with recipe {name!r}: it would have no effect")
    card_samples = 1000 if card_samples is None else card_samples
    check_count("card_samples", card_samples, MOST_CARD)
    for option, value in (("steps", steps), ("num_images", num_images)):
        if value is not None:
            check_count(option, value)
    is_short = steps is not None or num_images is not None
    limits = (steps or 10**9, num_images or 10**9)
    if name == "fashion-classifier":
        epochs = {"epochs": 1} if is_short else {}
        return train_classifier(out / name, progress=progress, **epochs)
    if name in DRAFT_RECIPES:
        draft = DRAFT_RECIPES[name].shortened(*limits) if is_short else DRAFT_RECIPES[name]
        target = load(draft.target, device="cpu")
        result = train_draft(target.model, out / "draft", draft.training, progress=progress)
        return publish_draft(result, out / name, draft, draft.target, min(100, card_samples))
    if name in STUDENT_RECIPES:
        from .distill import run_student_recipe  # which publishes through this file

        return run_student_recipe(name, out, steps, num_images, card_samples, progress=progress)
    if name in MAR_DRAFT_RECIPES:
        small = MAR_DRAFT_RECIPES[name].shortened(*limits) if is_short else MAR_DRAFT_RECIPES[name]
        pipe = load(str(small.target), device="cpu")
        network = small.run(out, target=pipe.model, progress=progress)["transformer"]
        seconds = stage_seconds(out, small.stages)
        return publish_mar_draft(network, pipe, out / name, small, seconds, min(100, card_samples))
    recipe = RECIPES[name].shortened(*limits) if is_short else RECIPES[name]
    parts = recipe.run(out, progress=progress)
    publish(parts, out / name, recipe.card, recipe.settings)
    return card_model(out / name, name, stage_seconds(out, recipe.stages), card_samples)


def draw(pipe: ARPipeline, prompts: list[Any], batch_size: int = 125) -> Tensor:
    """Plain samples of the prompts, uint8 [B, 3, H, W]; image k has identity (0, k)."""
    images = []
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        seeds = [(0, first + k) for k in range(len(batch))]
        out = sample(pipe, batch, "ar", seed=seeds, progress=False, output_type="pt")
        images.append(to_uint8(out.images))
    return torch.cat(images)


def nearest_training_distance(images: Tensor, training: Tensor) -> Tensor:
    """Root-mean-square grey-level distance of each image to its nearest training image.

    Args:
        images: [B, 3, 32, 32] uint8.
        training: [M, 32, 32] uint8.
    """
    ours = images.float().mean(1).flatten(1)
    best = torch.full((len(ours),), float("inf"))
    for part in training.split(10_000):
        distance = torch.cdist(ours, part.float().flatten(1))
        best = torch.minimum(best, distance.min(1).values)
    return best / ours.shape[1] ** 0.5


def measure_model(folder: Path, num: int = 1000) -> dict[str, Any]:
    """Figures for the model card of a Fashion-MNIST model: `num` plain samples, settings as saved.

    Returns:
        "class_consistency"; for a text model "garment" and "brightness" (share of samples that show
        what the caption says); "reconstruction_psnr" in dB; nearest-neighbour distances of samples
        and, for comparison, of test images to the training set.
    """
    pipe = load(folder, device="cpu")
    training, _ = load_fashion("train")
    test, test_labels = load_fashion("test")
    figures: dict[str, Any] = {"samples": num}
    if pipe.config["class_names"]:
        labels = torch.arange(num) % len(CLASS_NAMES)
        images = draw(pipe, labels.tolist())
        figures["class_consistency"] = float(class_consistency(images, labels))
    else:
        drawn = []

        def kept(prompts: list[str]) -> Tensor:
            drawn.append(draw(pipe, prompts))
            return drawn[0]

        figures |= caption_figures(kept, num)
        images = drawn[0]
    real = test[:, None].expand(-1, 3, -1, -1)
    figures["real_test_images"] = float(class_consistency(real, test_labels))
    distances = nearest_training_distance(images, training)
    reference = nearest_training_distance(real[:num], training)
    figures["nearest_training_min"] = float(distances.min())
    figures["nearest_training_median"] = float(distances.median())
    figures["nearest_training_median_of_test_images"] = float(reference.median())
    figures["copies"] = int((distances < 4.0).sum())
    with torch.no_grad():
        pixels = to_pixels(test[:1000])
        rebuilt = pipe.tokenizer.decode(pipe.tokenizer.encode(pixels)).clamp(-1, 1)
    figures["reconstruction_psnr"] = float(10 * torch.log10(4 / (rebuilt - pixels).pow(2).mean()))
    return figures


def card_model(folder: Path, recipe: str, training_seconds: dict[str, float], num: int) -> dict:
    """Measure a published model and write its README.md; returns the figures.

    Args:
        folder: of the model.
        recipe: name, for the command that repeats it.
        training_seconds: wall time of each stage.
        num: samples to measure on.
    """
    figures = measure_model(folder, num)
    names = {
        "class_consistency": "samples that the project's classifier sorts into the class asked for",
        "garment": "samples that show the garment of the caption (same classifier)",
        "brightness": "samples as dark, grey or light as the caption says (mean of garment pixels)",
        "real_test_images": "real test images, for comparison",
    }
    measured = [
        f"on {figures['samples']} plain samples at the recommended settings "
        f"({settings_in_words(load(folder).config)}):",
        *(f"{text}: {figures[key]:.3f}" for key, text in names.items() if key in figures),
        f"reconstruction of test images by the tokenizer: {figures['reconstruction_psnr']:.1f} dB",
        f"distance to the nearest training image (RMS grey levels of 255): median "
        f"{figures['nearest_training_median']:.1f}, smallest {figures['nearest_training_min']:.1f}; "
        f"real test images have a median of {figures['nearest_training_median_of_test_images']:.1f}. "
        f"Copies (below 4.0): {figures['copies']}.",
    ]
    facts: dict[str, Any] = {
        "Data": f"the 60,000 training images of {FASHION}, padded to 32x32.",
        "Recipe": f"`arvision train --recipe {recipe} --out runs/{recipe}` (settings in "
        "`arvision/training`).",
        "Wall time": f"{_minutes(training_seconds, 0)} (shared two-core CPU, one or two threads).",
        "Size": f"{megabytes(folder)}, half precision.",
        "Measured": measured,
    }
    purpose = "samplers can be tried and tested in seconds on a CPU, not for its pictures."
    write_demonstration_card(
        folder, f"{DEMONSTRATION} {purpose}", facts, ("text-to-image", "autoregressive")
    )
    return figures


def write_demonstration_card(
    folder: Path, description: str, facts: dict[str, Any], tags: Sequence[str]
) -> None:
    """The card of a small model on Fashion-MNIST; `card.json` says what it is.

    Args:
        folder: of the model.
        description: what follows its summary.
        facts: see `arvision.card.write_card`; the licence is put behind the data.
        tags: of the Hub.
    """
    summary = json.loads((folder / "card.json").read_text())["summary"]
    data = {"Data": facts["Data"], "Licence of the weights": "Apache-2.0."}
    write_card(
        folder,
        f"{summary}. {description}",
        data | facts,
        tags=[*tags, "fashion-mnist"],
        licence="apache-2.0",
    )


def _minutes(seconds: dict[str, float], digits: int) -> str:
    return ", ".join(f"{name} {value / 60:.{digits}f} min" for name, value in seconds.items())


def publish_draft(
    result: DraftResult, folder: Path, recipe: DraftRecipe, target: str | Path, num: int = 100
) -> dict[str, Any]:
    """Write a draft model as a pipeline folder with its card; returns the measured figures.

    Args:
        result: of `arvision.training.llamagen_draft.train_draft`.
        folder: to write; its name is that of the recipe.
        recipe: what was trained.
        target: name or folder of the target's pipeline, whose settings the draft takes over.
        num: images to measure the acceptance on.
    """
    pipe = load(target, device="cpu")
    settings = {
        name: pipe.config[name] for name in ("class_names", "guidance_scale", "num_threads")
    }
    settings["calibration"] = result.calibration
    parts = {"transformer": result.transformer}
    if pipe.text_encoder is not None:
        parts |= {"text_encoder": pipe.text_encoder, "text_tokenizer": pipe.text_tokenizer}
    publish(parts, folder, recipe.card, settings)
    draft = load(folder, device="cpu")
    figures = dict(result.figures)
    for coupling in MEASURED:
        figures[coupling] = _draft_figures(pipe, draft, coupling, num)
    _card_draft(folder, recipe, figures, num)
    return figures


def _draft_figures(pipe: ARPipeline, draft: ARPipeline, coupling: str, num: int) -> dict[str, Any]:
    """Acceptance over `num` images, each alone, so that no chain is longer for a neighbour's sake."""
    totals = {"drafted": 0, "accepted": 0, "forward_passes": 0, "tokens": 0}
    names = pipe.config["class_names"]
    prompts = range(len(names)) if names else every_caption()
    for k in range(num):
        prompt = prompts[k % len(prompts)]
        stats = sample(
            pipe,
            prompt,
            "draft",
            draft=draft,
            coupling=coupling,
            seed=[(0, k)],
            progress=False,
            output_type="latent",
        ).stats
        totals = {name: value + stats[name] for name, value in totals.items()}
    return {
        "drafted": totals["drafted"],
        "acceptance_rate": totals["accepted"] / totals["drafted"],
        "tokens_per_pass": totals["tokens"] / totals["forward_passes"],
    }


def _card_draft(folder: Path, recipe: DraftRecipe, figures: dict[str, Any], num: int) -> None:
    ratio = figures["target_parameters"] / figures["parameters"]
    samples = ", ".join(f"{n} at guidance {scale}" for scale, n in figures["samples"].items())
    first = f"at guidance {next(iter(figures['samples']))}"
    pilots = "; ".join(
        f"{name} {accepted[f'independent {first}']:.3f} independent, "
        f"{accepted[f'gumbel {first}']:.3f} Gumbel"
        for name, accepted in figures["pilots"].items()
    )
    facts: dict[str, Any] = {
        "Data": f"{recipe.target}'s own samples ({samples}), each with the target's guided law of "
        f"every token. The target was trained on {FASHION}.",
        "Recipe": f"`arvision train --recipe {folder.name} --out runs/{recipe.target}` (settings in "
        "`arvision/training/llamagen_draft.py`): the guided draft is fitted to the guided target "
        f"(DistillSpec) with the divergence `{figures['divergence']}`, whose drafts were accepted "
        f"most in short pilots ({first}: {pilots}); {figures['on_policy']:.0%} of the final run's batches "
        "are its own samples.",
        "Wall time": f"{_minutes(figures['seconds'], 1)}, besides the sampling (one thread of a "
        "shared two-core CPU).",
        "Size": f"{figures['parameters']:,} parameters, 1/{ratio:.1f} of the target's; "
        f"{megabytes(folder)}, half precision.",
        "Probability that one draft is accepted": "on samples held out: "
        + "; ".join(f"{name} {value:.3f}" for name, value in figures["acceptance"].items())
        + ".",
        "Measured": [
            f"on {num} images, one by one, at the recommended settings of model and sampler:",
            *(
                f'`coupling="{name}"`: {100 * figures[name]["acceptance_rate"]:.1f} % of '
                f"{figures[name]['drafted']:,} drafts accepted, "
                f"{figures[name]['tokens_per_pass']:.2f} tokens per pass of the target"
                for name in MEASURED
            ),
        ],
    }
    purpose = (
        f'`sampler="draft"` can be tried and tested in seconds on a CPU. It draws tokens for '
        f"`{recipe.target}` to verify; it has no image tokenizer and no merit of its own."
    )
    tags = ("speculative-decoding", "draft-model", "autoregressive")
    write_demonstration_card(folder, f"{DEMONSTRATION} {purpose}", facts, tags)


def publish_mar_draft(
    network: torch.nn.Module,
    pipe: ARPipeline,
    folder: Path,
    recipe: Recipe,
    seconds: dict[str, float],
    num: int = 100,
) -> dict[str, Any]:
    """Write a draft for `cspd` as a pipeline folder with its card; returns the measured figures.

    Args:
        network: the trained transformer.
        pipe: its target, whose settings the draft takes over.
        folder: to write; its name is that of the recipe.
        recipe: what was trained.
        seconds: wall time of each stage.
        num: images to measure the acceptance on, one by one.
    """
    names = ("class_names", "guidance_scale", "temperature", "num_threads")
    publish({"transformer": network}, folder, recipe.card, {n: pipe.config[n] for n in names})
    sizes = [sum(p.numel() for p in part.parameters()) for part in (network, pipe.transformer)]
    figures: dict[str, Any] = {"parameters": sizes[0]}
    draft = load(folder, device="cpu")
    for name, options in {
        "published, verified": {},
        "trajectory, batched": {"criterion": "trajectory", "context": "batched", "max_draft": 2},
    }.items():
        options["drafting"] = "sequential"
        totals = {"accepted": 0, "rejected": 0, "forward_passes": 0}
        for k in range(num):
            out = sample(
                pipe, k % 10, "cspd", draft=draft, seed=[(0, k)], progress=False, **options
            )
            totals = {key: value + out.stats[key] for key, value in totals.items()}
        judged = totals["accepted"] + totals["rejected"]
        figures[name] = (totals["accepted"] / judged, totals["forward_passes"] / num)
    facts: dict[str, Any] = {
        "Data": f"the training images of {FASHION} in {recipe.target}'s latents, with the outputs of "
        "its diffusion head as goals.",
        "Recipe": f"`arvision train --recipe {folder.name} --out runs/{folder.name}` (settings in "
        "`arvision/training/mar_draft.py`).",
        "Wall time": f"{_minutes(seconds, 1)} (one thread of a shared two-core CPU).",
        "Size": f"{sizes[0]:,} parameters, 1/{sizes[1] / sizes[0]:.1f} of the target's; "
        f"{megabytes(folder)}, half precision.",
        "Measured": [
            f'on {num} images, one by one, with drafting="sequential":',
            *(
                f"{name}: {100 * figures[name][0]:.1f} % of judged drafts accepted, "
                f"{figures[name][1]:.1f} passes of the target"
                for name in ("published, verified", "trajectory, batched")
            ),
        ],
    }
    purpose = (
        f'`sampler="cspd"` can be tried and tested in seconds on a CPU. It drafts for '
        f"`{recipe.target}`; it has no autoencoder and no merit of its own."
    )
    tags = ("speculative-decoding", "draft-model", "autoregressive")
    write_demonstration_card(folder, f"{DEMONSTRATION} {purpose}", facts, tags)
    return figures
