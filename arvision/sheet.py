"""Pictures side by side on one sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
"""Suffixes of the formats that sheets are written in."""
SMALLEST_SIDE = 96
"""Images below this many pixels are enlarged by a whole factor, without smoothing."""
GAP = 4
LABEL_HEIGHT = 18


def enlarge(image: Image.Image) -> Image.Image:
    """An image at least `SMALLEST_SIDE` pixels on its longer side, in whole pixel blocks."""
    factor = max(1, math.ceil(SMALLEST_SIDE / max(image.size)))
    size = (image.width * factor, image.height * factor)
    return image.resize(size, Image.Resampling.NEAREST)


def without_enlargement(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """An image that `enlarge` has made of one of `size` (width, height), as it was; others as they are."""
    factor = image.width // size[0]
    if factor < 2 or image.size != (size[0] * factor, size[1] * factor):
        return image
    small = image.resize(size, Image.Resampling.NEAREST)
    again = small.resize(image.size, Image.Resampling.NEAREST)
    return small if again.tobytes() == image.tobytes() else image


def contact_sheet(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Images in a grid, one alone as it is; `columns` None for at most eight in a row."""
    if len(images) == 1:
        return images[0]
    columns = columns or min(8, len(images))
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    return labelled_rows([("", row) for row in rows])


def labelled_rows(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], column_labels: Sequence[str] = ()
) -> Image.Image:
    """Rows of images of one size, each under its label, with labels above the columns."""
    enlarged = [(label, [enlarge(image) for image in row]) for label, row in rows]
    width, height = enlarged[0][1][0].size
    columns = max(len(row) for _, row in enlarged)
    font = ImageFont.load_default(12)
    headings = [_wrapped(label, width, font) for label in column_labels]
    heading = LABEL_HEIGHT * max((text.count("\n") + 1 for text in headings), default=0)
    heights = [height + GAP + (LABEL_HEIGHT if label else 0) for label, _ in enlarged]
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, heading + sum(heights) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for column, text in enumerate(headings):
        pen.multiline_text((GAP + column * (width + GAP), 2), text, "black", font)
    top = heading + GAP
    for (label, row), row_height in zip(enlarged, heights, strict=True):
        if label:
            pen.text((GAP, top), label, "black", font)
        for column, image in enumerate(row):
            sheet.paste(image, (GAP + column * (width + GAP), top + row_height - height - GAP))
        top += row_height
    return sheet


def _wrapped(text: str, width: int, font: Any) -> str:
    """A label broken into lines no wider than its column, where its words allow that."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)
