"""Which tokens became final together: the map of easy and hard places of a picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""From few to many, after matplotlib's viridis."""

STRENGTH = 0.6
"""Share of the colour over a grey picture."""


def company(commit_pass: Tensor) -> Tensor:
    """For each token of [B, N], how many tokens of its image became final in the same pass."""
    same = commit_pass[:, :, None] == commit_pass[:, None, :]
    return same.sum(-1)


def by_pass(commit_pass: Sequence[int]) -> list[int]:
    """Tokens of an image that became final in each pass, from pass 1 on.

    What was there before it (pass 0: given tokens, or a first one that comes with the prompt) is not
    counted; a pass in which the image took no part has 0.
    """
    counts = [0] * max(commit_pass, default=0)
    for number in commit_pass:
        if number > 0:
            counts[number - 1] += 1
    return counts


def colour(count: float, most: float) -> tuple[int, int, int]:
    """Colour of a count from 1 to `most`."""
    place = 0.0 if most <= 1 else (count - 1) / (most - 1) * (len(COLOURS) - 1)
    place = min(max(place, 0.0), len(COLOURS) - 1.0)
    low = min(int(place), len(COLOURS) - 2)
    share = place - low
    red, green, blue = (
        round(a + (b - a) * share) for a, b in zip(COLOURS[low], COLOURS[low + 1], strict=True)
    )
    return red, green, blue


def overlay(
    picture: Image.Image, commit_pass: Sequence[int], grid: tuple[int, int], most: int
) -> Image.Image:
    """The map over its picture: a token has the colour of how many became final in its pass.

    Tokens of pass 0 keep the picture's own colours.

    Args:
        picture: RGB, of any size.
        commit_pass: [N], row by row.
        grid: rows and columns of the N tokens.
        most: the count that has the last colour.
    """
    rows, columns = grid
    counts = company(torch.tensor([list(commit_pass)]))[0].tolist()
    colours = Image.new("RGB", (columns, rows))
    colours.putdata([colour(count, most) for count in counts])
    drawn = Image.new("L", (columns, rows))
    drawn.putdata([255 if number > 0 else 0 for number in commit_pass])
    colours, drawn = (
        part.resize(picture.size, Image.Resampling.NEAREST) for part in (colours, drawn)
    )
    grey = picture.convert("L").convert("RGB")
    return Image.composite(Image.blend(grey, colours, STRENGTH), picture.convert("RGB"), drawn)
