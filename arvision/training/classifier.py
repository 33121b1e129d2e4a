"""Trains the Fashion-MNIST classifier of evaluation (recipe `fashion-classifier`)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from ..card import FASHION, write_card
from ..errors import InputError
from ..eval.classifier import FashionClassifier, class_consistency
from ..files import user_path, write_bytes, write_json
from .data import load_fashion

BATCH_SIZE = 128
PEAK_LEARNING_RATE = 4e-3
SMOOTHING = 0.05
MAX_SHIFT = 2


def augment(grey: Tensor, generator: torch.Generator) -> Tensor:
    """Flip half of the images [B, 1, 32, 32], shift all by up to `MAX_SHIFT` pixels."""
    count = len(grey)
    flipped = torch.rand(count, generator=generator) < 0.5
    grey = torch.where(flipped.view(-1, 1, 1, 1), grey.flip(-1), grey)
    shifts = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (count, 2), generator=generator)
    side, last = torch.arange(grey.shape[-1]), grey.shape[-1] - 1
    rows = (side[None] + shifts[:, :1]).clamp(0, last)  # the border is black padding
    columns = (side[None] + shifts[:, 1:]).clamp(0, last)
    batch = torch.arange(count).view(-1, 1, 1)
    return grey[:, 0][batch, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def _fit(model: FashionClassifier, epochs: int, seed: int, progress: bool) -> None:
    """Train `model` in place on the training images."""
    images, labels = load_fashion("train")
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    num_steps = epochs * (len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, total_steps=num_steps, pct_start=0.2
    )
    loss_of = nn.CrossEntropyLoss(label_smoothing=SMOOTHING)
    model.train()
    with tqdm(total=num_steps, desc="classifier", unit="step", disable=not progress) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator)
            for rows in order[: num_steps // epochs * BATCH_SIZE].split(BATCH_SIZE):
                grey = augment(images[rows].unsqueeze(1).float() / 127.5 - 1.0, generator)
                loss = loss_of(model.head(model.trunk(grey)), labels[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def _measure(model: FashionClassifier) -> dict[str, Any]:
    """Test accuracy of the weights as they are stored, in half precision."""
    half = FashionClassifier(**model.config)
    half.load_state_dict(model.half().state_dict())
    images, labels = load_fashion("test")
    score = class_consistency(images.unsqueeze(1), labels, model=half.float().eval())
    assert score.interval is not None
    return {
        "accuracy": score.value,
        "accuracy_interval": list(score.interval),
        "per_class": score.details["per_class"],
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def train_classifier(
    out: Path, *, epochs: int = 14, seed: int = 0, progress: bool = True
) -> dict[str, Any]:
    """Train the classifier and write it with its card.

    Args:
        out: folder for `model.safetensors`, `config.json` and `README.md`.
        epochs: passes over the 60,000 training images.
        seed: of weights, order and augmentation; the same seed and thread count repeat the run.
        progress: whether to show a progress bar on stderr.

    Returns:
        `accuracy` on the 10,000 test images with `accuracy_interval` and `per_class`,
        `parameters`, `seconds`.

    Raises:
        InputError: `epochs` below 1.
    """
    if epochs < 1:
        raise InputError(f"epochs is {epochs}: expected at least 1")
    out = user_path(out)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FashionClassifier()
    _fit(model, epochs, seed, progress)
    seconds = time.perf_counter() - started
    measured = {**_measure(model), "seconds": seconds, "epochs": epochs, "seed": seed}
    weights = {name: value.contiguous() for name, value in model.half().state_dict().items()}
    write_bytes(out / "model.safetensors", save(weights))
    config = {"kind": "fashion-classifier", "architecture": model.config, "measured": measured}
    write_json(out / "config.json", config, indent=2)
    _card(out, measured)
    return measured


def _card(folder: Path, measured: dict[str, Any]) -> None:
    """Write the model card with the measured numbers filled in."""
    low, high = measured["accuracy_interval"]
    classes = ", ".join(f"{c}: {share:.3f}" for c, share in measured["per_class"].items())
    description = (
        f"A small convolutional network ({measured['parameters']:,} parameters) that sorts grey "
        "32x32 garments into the ten classes of Fashion-MNIST. `arvision.eval` uses it to ask "
        "whether a generated picture shows the class it was asked for, and takes its penultimate "
        "layer (128 numbers) as a feature space. It is a measuring tool for small demonstration "
        "models, not a product: its features are **not** FID features, and its opinion of pictures "
        "far from Fashion-MNIST means nothing."
    )
    facts = {
        "Data": f"the 60,000 training images of {FASHION}, padded to 32x32.",
        "Recipe": f"`arvision train --recipe fashion-classifier`: {measured['epochs']} epochs, batch "
        f"{BATCH_SIZE}, AdamW with one cycle (peak {PEAK_LEARNING_RATE}), label smoothing "
        f"{SMOOTHING}, random flips and shifts of up to {MAX_SHIFT} pixels, seed "
        f"{measured['seed']}.",
        "Wall time": f"{measured['seconds'] / 60:.1f} minutes, {torch.get_num_threads()} CPU "
        "thread(s).",
        "Measured": f"on 10,000 test images, weights as stored in half precision: accuracy "
        f"**{measured['accuracy']:.4f}** (95 % interval {low:.4f} to {high:.4f}). Per class: "
        f"{classes}.",
        "Files": "`model.safetensors` (half precision), `config.json`.",
    }
    tags = ("image-classification", "fashion-mnist")
    write_card(folder, description, facts, tags=tags, licence="apache-2.0")
