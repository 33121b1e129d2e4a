"""Sides of a draw as HTML: pictures, figures, and which tokens were accepted together."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from ..acceptance import by_pass, colour, overlay
from .desk import Side

STYLE = """
.arv-pictures {display: flex; flex-wrap: wrap; gap: 6px; margin: 6px 0}
.arv-pictures img {width: 112px; image-rendering: pixelated; border: 1px solid #8884}
.arv-pictures img.large {width: 240px; image-rendering: auto}
.arv-empty {width: 112px; height: 112px; background: #8882}
.arv-figures, .arv-figures tr, .arv-figures td {border: none !important}
.arv-figures td {padding: 1px 14px 1px 0}
.arv-bars {width: 100%; height: 72px}
.arv-error {color: #c0392b; font-weight: 600}
"""
"""Of the page; small pictures are enlarged without smoothing."""

LARGE = 128
"""Pixels from which a picture is shown as it is."""


def _image(picture: Image.Image, title: str) -> str:
    held = io.BytesIO()
    picture.save(held, format="PNG")
    data = base64.b64encode(held.getvalue()).decode()
    size = ' class="large"' if max(picture.size) >= LARGE else ""
    text = html.escape(title, quote=True)
    return f'<img{size} alt="{text}" title="{text}" src="data:image/png;base64,{data}">'


def pictures_of(side: Side) -> str:
    """What is drawn so far, one picture for each identity."""
    shown = [
        _image(picture, f"{side.sampler}, picture {number}, seed {seed}:{image}")
        for number, (picture, (seed, image)) in enumerate(
            zip(side.runner.pictures, side.identities, strict=False), 1
        )
    ]
    shown += ['<div class="arv-empty"></div>'] * (len(side.identities) - len(shown))
    return f'<div class="arv-pictures">{"".join(shown)}</div>'


def figures_of(side: Side) -> list[tuple[str, str]]:
    """Names and figures of a side, as far as it is drawn."""
    runner, num = side.runner, len(side.identities)
    total = num * side.num_tokens
    figures = [
        ("tokens", f"{runner.finished} of {total}"),
        ("passes", str(runner.passes)),
        ("seconds", f"{runner.seconds:.2f}"),
    ]
    if runner.output is not None:
        stats = runner.output.stats
        figures[0] = ("tokens", f"{sum(stats['lengths'])} of {total}")
        if "given" in stats:
            figures.append(("given tokens", " ".join(map(str, stats["given"]))))
        figures[1] = ("passes", str(stats["forward_passes"]))
        figures.append(("tokens per pass", f"{stats['tokens_per_pass']:.2f}"))
        passes = max(1, stats["forward_passes"])
        figures.append(("milliseconds per pass", f"{1000 * runner.seconds / passes:.1f}"))
    figures.append(("the model's own law", "yes" if side.is_lossless else "no (lossy)"))
    return figures


def passes_of(side: Side) -> list[list[int]]:
    """The pass that made each token final, [B][N]; none before the end."""
    stats: Any = {} if side.runner.output is None else side.runner.output.stats
    return stats.get("commit_pass", [])


def most_accepted(sides: Sequence[Side]) -> int:
    """The most tokens of a picture that a pass of any side made final, at least 2."""
    counts = [max(by_pass(row), default=1) for side in sides for row in passes_of(side)]
    return max([2, *counts])


def maps_of(side: Side, most: int) -> str:
    """Maps over the pictures, and how many tokens each pass accepted; nothing before the end."""
    commit_pass = passes_of(side)
    if not commit_pass:
        return ""
    parts = []
    if side.grid is not None and len(commit_pass[0]) == side.grid[0] * side.grid[1]:
        shown = [
            _image(overlay(_enlarged(picture), row, side.grid, most), f"map of picture {number}")
            for number, (picture, row) in enumerate(
                zip(side.runner.pictures, commit_pass, strict=False), 1
            )
        ]
        parts.append(f'<div class="arv-pictures">{"".join(shown)}</div>')
    rows = [by_pass(row) for row in commit_pass]
    num = max(map(len, rows))
    means = [sum(row[k] for row in rows if k < len(row)) / len(rows) for k in range(num)]
    parts.append(bars(means, most))
    return "".join(parts)


def _enlarged(picture: Image.Image) -> Image.Image:
    """Small pictures in blocks, so that colours of tokens have sharp edges."""
    factor = max(1, LARGE // max(picture.size) - 1)
    return picture.resize(
        (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
    )


def bars(counts: Sequence[float], most: int) -> str:
    """A bar for each pass, as high as the tokens that it accepted."""
    if not counts:
        return ""
    drawn = []
    for number, count in enumerate(counts):
        shade = "rgb({},{},{})".format(*colour(count, most))
        drawn.append(
            f'<rect x="{number + 0.1:.1f}" y="{most - count:.2f}" width="0.8" height="{count:.2f}" '
            f'fill="{shade}"><title>pass {number + 1}: {count:.4g} tokens</title></rect>'
        )
    return (
        f'<svg class="arv-bars" viewBox="0 0 {len(counts)} {most}" preserveAspectRatio="none" '
        f'role="img" aria-label="tokens accepted by pass">{"".join(drawn)}</svg>'
        f"<small>tokens of a picture accepted by passes 1 to {len(counts)}, "
        f"at most {max(counts):.4g}; the scale ends at {most}</small>"
    )


def side_of(side: Side, most: int) -> str:
    """A whole side."""
    if side.runner.error is not None:
        return ""
    cells = "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in figures_of(side))
    return (
        f"<h3>{html.escape(side.sampler)}</h3>{pictures_of(side)}"
        f'<table class="arv-figures">{cells}</table>{maps_of(side, most)}'
    )


def same_pictures(sides: Sequence[Side]) -> str:
    """How many pictures of two sides are the same, token for token; "" where that says nothing."""
    outputs = [side.runner.output for side in sides]
    if len(outputs) != 2 or any(output is None for output in outputs):
        return ""
    first, second = (output.tokens for output in outputs)
    if first.shape != second.shape:
        return ""
    same = sum(bool(torch.equal(a, b)) for a, b in zip(first, second, strict=True))
    return f"{same} of {len(first)} pictures are the same, token for token."


def status_of(sides: Sequence[Side], timeout: float) -> str:
    """One line about a draw, as text."""
    if any(side.runner.output is None for side in sides):
        return "Drawing, a pass at a time ..."
    if any(side.runner.output.stats["interrupted"] for side in sides):
        return f"Stopped before the end (limit: {timeout:g} s); what was not drawn is missing."
    return f"Done. {same_pictures(sides)}".strip()


def told(text: str, is_error: bool = False) -> str:
    """A line of the page."""
    kind = ' class="arv-error"' if is_error else ""
    return f'<p id="arv-status"{kind}>{html.escape(text)}</p>'
