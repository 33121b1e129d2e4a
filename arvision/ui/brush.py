"""A painted picture to an image and a mask of a model's size, and back."""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageChops, ImageOps

from ..errors import InputError
from ..sheet import without_enlargement

CANVAS = 384
"""Pixels of the longer side up to which small pictures are enlarged for painting."""


def for_painting(picture: Image.Image) -> Image.Image:
    """A picture enlarged in whole pixel blocks, so that a brush can hit its parts."""
    factor = max(1, CANVAS // max(picture.size))
    size = (picture.width * factor, picture.height * factor)
    return picture.convert("RGB").resize(size, Image.Resampling.NEAREST)


def read_painting(value: Any, size: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """The picture and the mask (white is redrawn) of what an image editor holds.

    Pictures of another size are cut to the model's shape around their middle and resized, the mask
    with them; a pixel that the brush touched is white.

    Args:
        value: {"background": picture, "layers": [pictures with alpha]}, as Gradio's ImageEditor
            gives it; None for nothing.
        size: width and height that the model draws.

    Raises:
        InputError: no picture, or nothing painted.
    """
    background = (value or {}).get("background")
    if background is None:
        raise InputError('no picture to edit: expected one from "Take" or from a file')
    painted = Image.new("L", background.size, 0)
    for layer in value.get("layers") or ():
        alpha = layer.convert("RGBA").getchannel("A")
        if alpha.size != painted.size:
            alpha = alpha.resize(painted.size, Image.Resampling.NEAREST)
        painted = ImageChops.lighter(painted, alpha.point([0] * 128 + [255] * 128))
    if painted.getbbox() is None:
        raise InputError("nothing is painted: expected red where the picture is redrawn")
    picture = without_enlargement(background.convert("RGB"), size)
    if picture.size != size:
        picture = ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
    mask = ImageOps.fit(painted, size, Image.Resampling.BOX)
    return picture, mask.point([0] + [255] * 255)
