"""Scale schedules of Infinity: which (height, width) token maps an image is drawn in.

Source: Han et al., "Infinity: Scaling Bitwise AutoRegressive Modeling for High-Resolution Image
Synthesis", 2024, appendix, and the table of dynamic resolutions in the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

from ...errors import InputError

Scales: TypeAlias = "tuple[tuple[int, int], ...]"
"""Height and width of each scale in tokens, coarse to fine."""

NUM_SCALES = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}
"""Pixels of a picture, in millions, to the number of its scales; 256, 512, 768 and 1024 squared."""

_TABLE = {
    1.0: "1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64",
    1.25: "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    1.333: "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    1.5: "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    1.75: "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    2.0: "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    2.5: "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    3.0: "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
}
_WIDE = {0.8: 1.25, 0.75: 1.333, 0.666: 1.5, 0.571: 1.75, 0.5: 2.0, 0.4: 2.5, 0.333: 3.0}
"""Ratios of wide pictures to the tall ones whose maps they turn around."""

RATIOS = tuple(sorted([*_TABLE, *_WIDE]))
"""Height divided by width of every shape that the models were trained on."""

RATIO_TOLERANCE = 0.002
"""2/3 may be written 0.666 or 0.667."""


def check_scales(scales: Sequence[Sequence[int]]) -> Scales:
    """Heights and widths of the scales; neither side shrinks and every map has more tokens.

    Raises:
        InputError: no scales, entries that are no pairs, or maps that do not grow.
    """
    pairs: list[tuple[int, ...]] = [
        tuple(scale) if isinstance(scale, Sequence) else () for scale in scales
    ]
    if not pairs or any(len(pair) != 2 or min(pair) < 1 for pair in pairs):
        raise InputError(
            f"scale_schedule {list(scales)}: expected pairs (height, width) from 1 up, coarse to fine"
        )
    sizes = tuple((int(height), int(width)) for height, width in pairs)
    for (h0, w0), (h1, w1) in pairwise(sizes):
        if h1 < h0 or w1 < w0 or h1 * w1 == h0 * w0:
            raise InputError(f"scale_schedule: {h1}x{w1} after {h0}x{w0}, expected growing maps")
    return sizes


def _known_ratio(aspect_ratio: float) -> float:
    for ratio in RATIOS:
        if abs(ratio - aspect_ratio) <= RATIO_TOLERANCE:
            return ratio
    listed = ", ".join(f"{ratio:g}" for ratio in RATIOS)
    raise InputError(f"aspect_ratio {aspect_ratio!r} (height/width): expected one of {listed}")


def _all_scales(ratio: float) -> Scales:
    """The 13 scales of a ratio in `RATIOS`."""
    text = _TABLE[_WIDE.get(ratio, ratio)]
    sizes = [tuple(int(side) for side in pair.split("x")) for pair in text.split()]
    return tuple((w, h) if ratio in _WIDE else (h, w) for h, w in sizes)


def scale_schedule(pixels: str = "1M", aspect_ratio: float = 1.0) -> Scales:
    """The token maps of a picture.

    Args:
        pixels: "0.06M", "0.25M", "0.60M" or "1M".
        aspect_ratio: height divided by width, one of `RATIOS`.

    Raises:
        InputError: a size or a ratio that the models were not trained on.
    """
    if pixels not in NUM_SCALES:
        raise InputError(f"pixels {pixels!r}: expected one of {', '.join(NUM_SCALES)}")
    return _all_scales(_known_ratio(aspect_ratio))[: NUM_SCALES[pixels]]


def rotary_grid(scales: Scales) -> tuple[int, int]:
    """The last map of the 1M schedule that `scales` begins: positions are counted on it.

    Raises:
        InputError: scales that none of the official schedules begins with, or several do.
    """
    grids = {
        _all_scales(ratio)[-1] for ratio in RATIOS if _all_scales(ratio)[: len(scales)] == scales
    }
    if len(grids) == 1:
        return grids.pop()
    listed = "x".join(map(str, scales[-1]))
    raise InputError(
        f"scale_schedule of {len(scales)} scales up to {listed}: not one of the official schedules "
        "begins so; expected one of scale_schedule(pixels, aspect_ratio), or rope_grid beside it"
    )
