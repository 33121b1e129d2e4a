"""Draw the same seeds with several samplers and say how they differ."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .acceptance import company
from .api import load, sample
from .batches import image_memory
from .errors import InputError, check_count, optional
from .files import replacing, write_text
from .inputs import expand_prompts
from .memory import check_memory
from .pipeline import ARPipeline
from .samplers import BaseSampler, get_sampler
from .samplers.base import LAW, join_options, parse_sampler
from .sheet import labelled_rows

COLUMNS = ("sampler", "passes", "tokens/pass", "s/image", "speed-up", "same as ar", "lossless")


@dataclass
class Row:
    """What one sampler did.

    Attributes:
        sampler: the specification that the user wrote.
        is_lossless: whether this configuration draws from the model's own law.
        images: in the order of the seeds.
        tokens: [B, N].
        passes: model calls per image.
        seconds: per image, one measurement per batch.
        commit_pass: [B][N], the pass that made each token final; empty where a sampler has none.
    """

    sampler: str
    is_lossless: bool
    images: list[Image.Image] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    commit_pass: list[list[int]] = field(default_factory=list)


@dataclass
class Comparison:
    """Rows of a comparison; the first `ar` row, where there is one, is the baseline."""

    model: str
    prompts: list[str]
    num_tokens: int
    grid: tuple[int, int] | None
    rows: list[Row]

    def records(self) -> list[dict[str, Any]]:
        """One plain dict per sampler; None where there is no baseline to compare with."""
        base = next((row for row in self.rows if row.sampler.split(":")[0] == "ar"), None)
        records = []
        for row in self.rows:
            seconds = statistics.median(row.seconds)
            passes = statistics.mean(row.passes)
            same = None
            if base is not None:
                pairs = zip(row.tokens, base.tokens, strict=True)
                same = sum(bool(torch.equal(a, b)) for a, b in pairs)
            records.append(
                {
                    "sampler": row.sampler,
                    "passes": passes,
                    "tokens_per_pass": self.num_tokens / passes,
                    "seconds_per_image": seconds,
                    "speed_up": None if base is None else statistics.median(base.seconds) / seconds,
                    "same_as_ar": same,
                    "images": len(row.images),
                    "lossless": row.is_lossless,
                }
            )
        return records

    def _cells(self) -> list[list[str]]:
        return [
            [
                record["sampler"],
                f"{record['passes']:.1f}",
                f"{record['tokens_per_pass']:.2f}",
                f"{record['seconds_per_image']:.3f}",
                "-" if record["speed_up"] is None else f"{record['speed_up']:.2f}x",
                "-"
                if record["same_as_ar"] is None
                else f"{record['same_as_ar']} of {record['images']}",
                "yes" if record["lossless"] else "no",
            ]
            for record in self.records()
        ]

    def text(self) -> str:
        """The table as aligned plain text."""
        cells = [list(COLUMNS), *self._cells()]
        widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in cells
        )

    def markdown(self) -> str:
        """The table as Markdown."""
        lines = [COLUMNS, ["---"] * len(COLUMNS), *self._cells()]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def sheet(self) -> Image.Image:
        """Rows: samplers; columns: seeds."""
        labels = [f"{row.sampler}: {statistics.mean(row.passes):.1f} passes" for row in self.rows]
        pairs = list(zip(labels, [row.images for row in self.rows], strict=True))
        return labelled_rows(pairs, self.prompts)

    def json(self) -> str:
        """The table, and the pass that made each token final, as JSON."""
        return json.dumps(
            {
                "model": self.model,
                "prompts": self.prompts,
                "num_tokens": self.num_tokens,
                "samplers": self.records(),
                "commit_pass": {row.sampler: row.commit_pass for row in self.rows},
            },
            indent=1,
        )

    def write(self, folder: Path) -> list[Path]:
        """Write sheet.png, acceptance.png, table.txt, table.md and table.json into a folder."""
        written = []
        texts = {"table.txt": self.text(), "table.md": self.markdown(), "table.json": self.json()}
        for name, content in texts.items():
            write_text(folder / name, content + "\n")
            written.append(folder / name)
        with replacing(folder / "sheet.png") as path:
            self.sheet().save(path)
        written.append(folder / "sheet.png")
        if self.grid is not None and any(row.commit_pass for row in self.rows):
            with replacing(folder / "acceptance.png") as path:
                self.plot_acceptance(path)
            written.append(folder / "acceptance.png")
        return written

    def plot_acceptance(self, path: Path) -> None:
        """Map over the image grid of how many tokens became final together with each one.

        A large number marks a place where guesses stood: an easy pixel.
        """
        with optional("plot", "the map of easy tokens"):
            from matplotlib.figure import Figure

        rows = [row for row in self.rows if row.commit_pass]
        assert self.grid is not None
        maps = [company(torch.tensor(row.commit_pass)).double().mean(0) for row in rows]
        most = max(float(values.max()) for values in maps)
        columns = min(4, len(rows))
        lines = -(-len(rows) // columns)
        figure = Figure(figsize=(3.0 * columns + 1.0, 3.2 * lines), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        shown = None
        for axis, row, values in zip(axes.flat, rows, maps, strict=False):
            shown = axis.imshow(values.view(self.grid).numpy(), vmin=1, vmax=most, cmap="viridis")
            axis.set_title(row.sampler, fontsize=9)
        if shown is not None:
            figure.colorbar(shown, ax=axes, label="tokens accepted in the same pass", shrink=0.8)
        figure.suptitle(f"{self.model}: which tokens were easy", fontsize=10)
        figure.savefig(path, dpi=120)


def compare(
    pipe: ARPipeline,
    prompt: Any,
    samplers: Sequence[str],
    *,
    num_images: int = 4,
    seed: int = 0,
    batch_size: int = 1,
    model_name: str = "model",
    on_batch: Callable[[str], None] | None = None,
    **options: Any,
) -> Comparison:
    """Draw the same seeds with each sampler, alternating, after one unmeasured image of each.

    Args:
        pipe: the model.
        prompt: a prompt or a list of them.
        samplers: names with options, see `arvision.samplers.base.parse_sampler`; "dd:steps=2@llamagen-fashion-dd" draws with
            another model than `pipe`.
        num_images: images of each prompt.
        seed: image k has identity (seed, k) under every sampler.
        batch_size: images drawn together; 1 measures latency.
        model_name: for titles.
        on_batch: called with a sampler's name after each of its batches.
        **options: `guidance_scale`, `temperature`, `top_k`, `top_p` for all samplers.

    Raises:
        InputError: anything unknown or out of range, before any model call.
    """
    if not samplers:
        raise InputError("no samplers: expected at least one, such as 'ar'")
    check_count("batch_size", batch_size)
    parts = [spec.strip().partition("@") for spec in samplers]
    pipes = [load(name, device=str(pipe.model.device)) if name else pipe for _, _, name in parts]
    options = {name: value for name, value in options.items() if value is not None}
    law = {name: value for name, value in options.items() if name in LAW}
    made = []
    for (spec, _, _), own in zip(parts, pipes, strict=True):
        written = join_options(spec, parse_sampler(spec)[1], law)
        made.append(get_sampler(spec).with_law(own.config, written))
        own.check_sampler(made[-1])
    conditions = expand_prompts(prompt, num_images)
    memory = image_memory(pipe.model, pipe.tokenizer, False, "pil")
    num = len(conditions) * len(samplers)
    check_memory(f"{num:,} images of {len(samplers)} samplers", num * memory.kept, "num_images")
    rows = [Row(spec.strip(), one.is_exact) for spec, one in zip(samplers, made, strict=True)]

    def run(one: BaseSampler, own: ARPipeline, first: int) -> Any:
        batch = list(conditions[first : first + batch_size])
        idle = {*one.without_effect(own.model), *(name for name in LAW if name not in one.config)}
        given = {name: value for name, value in options.items() if name not in idle}
        seeds = [(seed, first + k) for k in range(len(batch))]
        return sample(own, batch, one, seed=seeds, progress=False, **given)

    for one, own in zip(made, pipes, strict=True):
        run(one, own, 0)
    for first in range(0, len(conditions), batch_size):
        for row, one, own in zip(rows, made, pipes, strict=True):
            out = run(one, own, first)
            row.images += out.images
            row.tokens += list(out.tokens)
            row.passes += out.stats["passes_per_image"]
            row.seconds.append(out.stats["seconds_per_image"])
            row.commit_pass += out.stats.get("commit_pass", [])
            if on_batch is not None:
                on_batch(row.sampler)
    return Comparison(
        model_name,
        [str(c) for c in conditions],
        pipe.model.num_tokens,
        getattr(pipe.model, "grid", None),
        rows,
    )
