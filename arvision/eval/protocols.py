"""Protocols and pixel presets: what a published figure was made with, by name and version."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, unknown_name
from .pixels import to_uint8


@dataclass(frozen=True)
class PixelPreset:
    """How float pixels in [0, 1] become the bytes that are scored.

    Attributes:
        name: of the preset.
        side: images are brought to this side first; None leaves them.
        mode: interpolation of that step.
        antialias: whether it filters before it shrinks.
        rounding: see `to_uint8`.
        source: where this is written down.
    """

    name: str
    side: int | None
    mode: str
    antialias: bool
    rounding: str
    source: str

    def __call__(self, images: Tensor) -> Tensor:
        """Float [B, 3, H, W] in [0, 1] to uint8."""
        if self.side is not None and images.shape[-2:] != (self.side, self.side):
            size = (self.side, self.side)
            images = F.interpolate(images, size, mode=self.mode, antialias=self.antialias)
        return to_uint8(images, self.rounding)


PIXEL_PRESETS = {
    preset.name: preset
    for preset in (
        PixelPreset("plain", None, "bicubic", True, "round", "round(255 x)"),
        PixelPreset(
            "llamagen",
            256,
            "bicubic",
            False,
            "llamagen",
            "LlamaGen: 384 to 256 by bicubic without antialias, clamp(127.5 x + 128) truncated",
        ),
        PixelPreset(
            "to256", 256, "bicubic", True, "round", "antialiased bicubic to 256, round(255 x)"
        ),
        PixelPreset("var", None, "bicubic", True, "truncate", "VAR's demo: 255 x truncated, PNG"),
        PixelPreset("mar", None, "bicubic", True, "mar", "MAR: round(clip(255 x))"),
    )
}


@dataclass(frozen=True)
class Protocol:
    """A way to make and score samples that has a name and a version.

    Attributes:
        id: name and version; a change of any field is a new version.
        num: images of a comparable figure.
        side: pixels of a side, or None for any.
        num_classes: labels are index mod num_classes.
        extractor: default extractor.
        metrics: what is scored.
        comparable_to: figures that a result may stand beside.
    """

    id: str
    num: int
    side: int | None
    num_classes: int | None
    extractor: str
    metrics: tuple[str, ...]
    comparable_to: str

    def check_size(self, images: Tensor, pixels: str) -> Tensor:
        """`images` [B, 3, H, W], if they have the protocol's size.

        Raises:
            InputError: another size, which would not be comparable.
        """
        height, width = images.shape[-2:]
        if self.side is not None and (height, width) != (self.side, self.side):
            raise InputError(
                f"the model gives {height}x{width} with pixels {pixels}: {self.id} has "
                f"{self.side}x{self.side} (another pixel preset, or protocol free)"
            )
        return images

    def to_dict(self) -> dict[str, Any]:
        """The protocol as JSON types."""
        return {**asdict(self), "metrics": list(self.metrics)}


PROTOCOLS = {
    "adm-in256": Protocol(
        "adm-in256/v1",
        50_000,
        256,
        1000,
        "inception-adm",
        ("fid", "sfid", "is", "precision", "recall"),
        "figures of OpenAI's evaluator with VIRTUAL_imagenet256_labeled.npz, 50,000 samples",
    ),
    "coco-30k": Protocol(
        "coco-30k/v1",
        30_000,
        256,
        None,
        "inception-adm",
        ("fid", "clip"),
        "zero-shot COCO 2014 figures at 30,000 samples whose real images were centre-cropped and "
        "Lanczos-resized to 256; clean-fid's resize to 299 differs by up to about 0.5",
    ),
    "fashion": Protocol(
        "fashion/v1",
        2_000,
        32,
        10,
        "lite0",
        ("frechet", "precision", "recall", "class_consistency"),
        "other arvision runs of this protocol, extractor and number of samples only",
    ),
    "free": Protocol(
        "free/v1",
        1_000,
        None,
        None,
        "lite0",
        ("frechet", "precision", "recall"),
        "runs with the same settings, reference, extractor and number of samples only",
    ),
}


def get_protocol(name: str) -> Protocol:
    """A protocol by name, with or without its version.

    Raises:
        InputError: unknown.
    """
    for key, protocol in PROTOCOLS.items():
        if name in (key, protocol.id):
            return protocol
    raise unknown_name("protocol", name, PROTOCOLS)


def get_pixels(name: str) -> PixelPreset:
    """A pixel preset by name.

    Raises:
        InputError: unknown.
    """
    if name not in PIXEL_PRESETS:
        raise unknown_name("pixel preset", name, PIXEL_PRESETS)
    return PIXEL_PRESETS[name]


def interleaved_labels(start: int, stop: int, num_classes: int) -> list[int]:
    """Class of images start..stop-1: index mod num_classes, so that every prefix is balanced."""
    if num_classes < 1:
        raise InputError(f"num_classes is {num_classes}: expected at least 1")
    return [index % num_classes for index in range(start, stop)]
