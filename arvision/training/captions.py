"""Captions for Fashion-MNIST, written from what the pixels show.

Brightness is the mean of the garment's pixels, cut at the training set's terciles. Sleeves are
measured on tops (ink in the outer columns beside the body), width on trousers, dresses and bags
(columns that hold ink); both are mentioned only where the measurement is clear.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..eval.classifier import classify
from .data import load_fashion

GARMENTS: dict[int, tuple[str, ...]] = {
    0: ("t-shirt", "tee"),
    1: ("trousers", "pants"),
    2: ("pullover", "sweater"),
    3: ("dress",),
    4: ("coat", "jacket"),
    5: ("sandal",),
    6: ("shirt",),
    7: ("sneaker", "trainer"),
    8: ("bag", "handbag"),
    9: ("ankle boot", "boot"),
}
BRIGHTNESS = ("dark", "grey", "light")
SLEEVES = ("short-sleeved", "long-sleeved")
WIDTHS = ("narrow", "wide")
TEMPLATES = ("a {}", "{}", "a photo of a {}", "a picture of a {}")
INK = 26
"""Grey level above which a pixel belongs to the garment."""


@dataclass(frozen=True)
class Attributes:
    """Measured attributes of M images; -1 where an attribute does not apply or is unclear.

    Attributes:
        garment: [M] class 0..9.
        brightness: [M] index into `BRIGHTNESS`.
        sleeves: [M] index into `SLEEVES`.
        width: [M] index into `WIDTHS`.
    """

    garment: Tensor
    brightness: Tensor
    sleeves: Tensor
    width: Tensor


def mean_ink(images: Tensor) -> Tensor:
    """Mean grey level of the garment's pixels, [M] float, of images [M, H, W] uint8."""
    ink = images > INK
    total = (images.float() * ink).sum((1, 2))
    return total / ink.sum((1, 2)).clamp(min=1)


BRIGHTNESS_CUTS = (144.0, 184.0)
"""Terciles of `mean_ink` over the 60,000 training images, rounded."""
BRIGHTNESS_MARGIN = 8.0
"""Grey levels around a cut within which captions keep silent about brightness."""


def measure_brightness(images: Tensor) -> Tensor:
    """Index into `BRIGHTNESS` of images [M, H, W] uint8."""
    return torch.bucketize(mean_ink(images), torch.tensor(BRIGHTNESS_CUTS))


def measure(images: Tensor, labels: Tensor) -> Attributes:
    """Attributes of images [M, 32, 32] uint8 with classes `labels` [M]."""
    ink = images > INK
    unclear = torch.full_like(labels, -1)
    outer = torch.cat([ink[:, 18:27, 2:9], ink[:, 18:27, 23:30]], dim=2).float().mean((1, 2))
    tops = torch.isin(labels, torch.tensor([0, 2, 4, 6]))
    sleeves = torch.where(outer > 0.36, 1, torch.where(outer < 0.08, 0, -1))
    sleeves = torch.where(tops, sleeves, unclear)
    columns = (ink.float().mean(1) > 0.12).sum(1)
    width = unclear.clone()
    for label, (narrow, wide) in {1: (12, 16), 3: (11, 16), 8: (20, 27)}.items():
        mine = labels == label
        width[mine & (columns <= narrow)] = 0
        width[mine & (columns >= wide)] = 1
    level = mean_ink(images)
    near_cut = torch.stack([(level - cut).abs() < BRIGHTNESS_MARGIN for cut in BRIGHTNESS_CUTS])
    brightness = measure_brightness(images).masked_fill(near_cut.any(0), -1)
    return Attributes(labels, brightness, sleeves, width)


class CaptionWriter:
    """Writes a caption of one image, choosing what to mention at random.

    Args:
        attributes: of the images that will be asked for.
    """

    def __init__(self, attributes: Attributes) -> None:
        self.attributes = attributes

    def __call__(self, index: int, generator: torch.Generator) -> str:
        """A caption of image `index`; the garment is always named."""

        def chance(probability: float) -> bool:
            return bool(torch.rand((), generator=generator) < probability)

        def pick(options: tuple[str, ...]) -> str:
            return options[int(torch.randint(len(options), (), generator=generator))]

        words = []
        found = self.attributes
        if (brightness := int(found.brightness[index])) >= 0 and chance(0.9):
            words.append(BRIGHTNESS[brightness])
        if (sleeves := int(found.sleeves[index])) >= 0 and chance(0.6):
            words.append(SLEEVES[sleeves])
        if (width := int(found.width[index])) >= 0 and chance(0.6):
            words.append(WIDTHS[width])
        words.append(pick(GARMENTS[int(found.garment[index])]))
        return pick(TEMPLATES).format(" ".join(words))


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    texts = [name for names in GARMENTS.values() for name in names]
    texts += [*BRIGHTNESS, *SLEEVES, *WIDTHS, *TEMPLATES]
    words = {word for text in texts for word in re.findall(r"[a-z-]+", text)}
    return sorted(words | {"an", "the", "of", "pair", "with", "sleeves", "short", "long"})


def every_caption() -> list[str]:
    """All captions with at most brightness and one other attribute, in a fixed order."""
    others = {
        label: ("", *(SLEEVES if label in (0, 2, 4, 6) else WIDTHS if label in (1, 3, 8) else ()))
        for label in GARMENTS
    }
    found = [
        template.format(" ".join(filter(None, (tone, other, name))))
        for template in TEMPLATES
        for tone in ("", *BRIGHTNESS)
        for label, names in GARMENTS.items()
        for other in others[label]
        for name in names
    ]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    return [found[k] for k in order.tolist()]


def training_captions(seed: int = 0) -> list[str]:
    """A caption of each of the 60,000 training images, in their order."""
    images, labels = load_fashion("train")
    write, generator = CaptionWriter(measure(images, labels)), torch.Generator().manual_seed(seed)
    return [write(index, generator) for index in range(len(labels))]


def caption_figures(draw: Callable[[list[str]], Tensor], num: int) -> dict[str, float]:
    """Share of samples that show the "garment" and the "brightness" of their caption.

    Args:
        draw: captions to pictures [B, 3, 32, 32] uint8.
        num: samples; garments take turns, and brightness after each round.
    """
    labels = torch.arange(num) % len(GARMENTS)
    tones = torch.arange(num) // len(GARMENTS) % len(BRIGHTNESS)
    images = draw(
        [
            f"a {BRIGHTNESS[tone]} {GARMENTS[label][0]}"
            for label, tone in zip(labels.tolist(), tones.tolist(), strict=True)
        ]
    )
    grey = images.float().mean(1).round().to(torch.uint8)
    return {
        "garment": float((classify(images).argmax(-1) == labels).double().mean()),
        "brightness": float((measure_brightness(grey) == tones).double().mean()),
    }
