"""Looking at a training as it goes: the loss on pictures that are held out, and sheets of samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..api import sample
from ..files import replacing, write_text
from ..models.pixels import written
from ..pipeline import ARPipeline
from ..sheet import labelled_rows
from .data import in_batches, to_pixels
from .loop import Objective
from .own_data import OwnPictures
from .saved import load_state, save_state

ROWS, ROW = 4, 4
"""Rows of a sheet at least, and pictures of a row."""

LEAST_JUDGED = 100
"""Samples of a measurement at least; what is held out goes through several times with other noise."""

HELD_OUT = "held_out.jsonl"


class Watch:
    """What the loop calls with each line of its log.

    Args:
        stage: its name.
        objective: that is trained.
        out: folder of the run; gets `held_out.jsonl` and `samples`.
        every: steps between two looks.
        last: the last step.
        score: the "loss" on what is held out, and what else is worth noting.
        sheet: draws what is to be seen.
        prefix: of the names of sheets.
        keeps_best: keep the weights with the lowest loss, see `keep_best`.
    """

    def __init__(
        self,
        stage: str,
        objective: Objective,
        out: Path,
        every: int,
        last: int,
        *,
        score: Callable[[], dict[str, float]],
        sheet: Callable[[], Any],
        prefix: str = "",
        keeps_best: bool = False,
    ) -> None:
        self.stage, self.objective, self.out = stage, objective, out
        self.every, self.last = every, last
        self.score, self.sheet, self.prefix = score, sheet, prefix
        self.keeps_best = keeps_best
        self._best = out / "work" / stage / "best.pt"
        self.first = self._note(0)

    def __call__(self, line: dict[str, Any]) -> None:
        """Look, where it is time to."""
        step = line["step"]
        if step % self.every and step != self.last:
            return
        self.objective.eval()
        score = self._note(step)
        if self.keeps_best:
            best = self._read_best()
            if best is None or score < best["score"]:
                state = {"step": step, "score": score, "model": self.objective.state_dict()}
                save_state(self._best, state)
        with replacing(self.out / "samples" / f"{self.prefix}{step:06d}.png") as path:
            self.sheet().save(path)
        self.objective.train()

    def keep_best(self) -> dict[str, Any]:
        """Leave the objective with its best weights; what the loss was.

        The weights in the end may be an average, which is judged here for the first time.
        """
        self.objective.eval()
        best, final = self._read_best(), self.score()["loss"]
        found = {"first": self.first, "best": final, "best_step": self.last}
        if best is not None and best["score"] < final:
            self.objective.load_state_dict(best["model"])
            found |= {"best": best["score"], "best_step": best["step"]}
        return found | {"last": final}

    def _read_best(self) -> dict[str, Any] | None:
        return load_state(self._best, "delete it to go on") if self._best.exists() else None

    def _note(self, step: int) -> float:
        """Measure, and write it down in the place of what an interrupted run has written."""
        path = self.out / HELD_OUT
        row = {"stage": self.stage, "step": step, **self.score()}
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        place = (self.stage, step)
        rows = [*(old for old in rows if (old["stage"], old["step"]) != place), row]
        stages = list(dict.fromkeys(old["stage"] for old in rows))
        rows.sort(key=lambda old: (stages.index(old["stage"]), old["step"]))
        write_text(path, "".join(json.dumps(each) + "\n" for each in rows))
        return row["loss"]


@torch.no_grad()
def held_out_loss(objective: Objective, held: Tensor) -> dict[str, float]:
    """The mean loss of samples that an objective holds and is not trained on, with noise of its own."""
    held = held.repeat(-(-LEAST_JUDGED // len(held)))
    generator, total = torch.Generator().manual_seed(0), 0.0
    for part in held.split(50):
        total += float(objective(part, generator)["loss"]) * len(part)
    return {"loss": round(total / len(held), 5)}


@torch.no_grad()
def reconstruction(tokenizer: Any, images: Tensor) -> dict[str, float]:
    """Mean squared error of a tokenizer on images [M, ...] uint8, and the PSNR in dB."""
    error, num = 0.0, 0
    for part in in_batches(images):
        pixels = to_pixels(part)
        error += float((_through(tokenizer, pixels) - pixels).square().sum())
        num += pixels.numel()
    psnr = 10 * torch.log10(torch.tensor(4.0 * num / max(error, 1e-9)))
    return {"loss": round(error / num, 6), "psnr": round(float(psnr), 3)}


@torch.no_grad()
def rebuilt_sheet(tokenizer: Any, images: Tensor) -> Any:
    """Images above what a tokenizer makes of them."""
    pixels = to_pixels(images)
    rows = {"held out": pixels, "through the tokenizer": _through(tokenizer, pixels)}
    return labelled_rows([(label, written(part, "pil")) for label, part in rows.items()])


def _through(tokenizer: Any, pixels: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] encoded and decoded again, on the CPU."""
    return tokenizer.decode(tokenizer.encode(pixels)).float().clamp(-1, 1).cpu()


def prompts_of(pictures: OwnPictures) -> list[tuple[str, Any]]:
    """What a sheet shows: a label and a prompt for each row."""
    if pictures.captions is not None:
        held = [pictures.captions[index][0] for index in pictures.held_out.tolist()]
        return [(text[:60], text) for text in list(dict.fromkeys(held))[:ROWS]]
    names = pictures.class_names or []
    rows = max(ROWS, min(2 * ROWS, len(names)))
    return [(names[index % len(names)], index % len(names)) for index in range(rows)]


def sample_sheet(
    pipe: ARPipeline, rows: Sequence[tuple[str, Any]], columns: int = ROW, **options: Any
) -> Any:
    """Samples of a pipeline: a row of `columns` for each label and prompt, always of the same seed.

    The tokenizer goes to where the transformer is for that time.
    """
    asked = [prompt for _, prompt in rows for _ in range(columns)]
    home = next(pipe.tokenizer.parameters()).device
    pipe.tokenizer.to(next(pipe.transformer.parameters()).device)
    out = sample(pipe, asked, seed=0, progress=False, **options)
    pipe.tokenizer.to(home)
    parts = [out.images[first : first + columns] for first in range(0, len(asked), columns)]
    return labelled_rows([(label, part) for (label, _), part in zip(rows, parts, strict=True)])
