"""Looking at a training as it goes: the loss on pictures that are held out, and sheets of samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..api import sample
from ..files import replacing, write_text
from ..sheet import labelled_rows
from .data import in_batches, to_pixels
from .saved import load_state, save_state

SHEET, ROW = 16, 4
"""Pictures of a sheet, and of a row of it."""

LEAST_JUDGED = 100
"""Samples of a measurement at least; what is held out goes through several times with other noise."""

MASKED_PASSES = 16
"""Passes of a MAR on the way; published pictures take as many as there are latents."""


class Watch:
    """What the loop calls with each line of its log.

    A tokenizer is judged by what it makes of held-out pictures; a transformer by its loss on them,
    always with the same noise, and its best weights are kept.

    Args:
        name: of the stage; "transformer", or else a tokenizer's.
        objective: that is trained; its data hold the held-out pictures behind those it trains on.
        run: with `pictures`, `out`, `work`, `processes` and `pipeline`.
        every: steps between two looks.
        last: the last step.
    """

    def __init__(self, name: str, objective: Any, run: Any, every: int, last: int) -> None:
        self.name, self.objective, self.run = name, objective, run
        self.every, self.last = every, last
        self.is_transformer = name == "transformer"
        self.first = float("nan")
        self._path: Path = run.out / "held_out.jsonl"
        self._best: Path = run.out / "work" / name / "best.pt"
        if run.processes.is_main_process:
            self._note(0)

    def __call__(self, line: dict[str, Any]) -> None:
        """Look, where it is time to."""
        step = line["step"]
        if (step % self.every and step != self.last) or not self.run.processes.is_main_process:
            return
        self._look(step)

    def _look(self, step: int) -> None:
        self.objective.eval()
        score = self._note(step)
        if self.is_transformer:
            best = self._read_best()
            if best is None or score < best["score"]:
                state = {"step": step, "score": score, "model": self.objective.state_dict()}
                save_state(self._best, state)
        sheet = self._samples() if self.is_transformer else self._rebuilt()
        name = f"{step:06d}.png" if self.is_transformer else f"tokenizer-{step:06d}.png"
        with replacing(self.run.out / "samples" / name) as path:
            sheet.save(path)
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
        """Measure, and write it down."""
        row = {"stage": self.name, "step": step, **self.score()}
        self.first = row["loss"] if step == 0 else self.first
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        others = [
            old
            for old in map(json.loads, lines)
            if (old["stage"], old["step"]) != (self.name, step)
        ]
        order = {"transformer": 1}
        rows = sorted([*others, row], key=lambda old: (order.get(old["stage"], 0), old["step"]))
        write_text(self._path, "".join(json.dumps(each) + "\n" for each in rows))
        return row["loss"]

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        """The loss on what is held out; of a tokenizer also the PSNR in dB."""
        held = self.run.pictures.held_out
        if not self.is_transformer:
            error, num = 0.0, 0
            for part in in_batches(self.run.pictures.images[held]):
                pixels = to_pixels(part)
                error += float((self._through(pixels) - pixels).square().sum())
                num += pixels.numel()
            psnr = 10 * torch.log10(torch.tensor(4.0 * num / max(error, 1e-9)))
            return {"loss": round(error / num, 6), "psnr": round(float(psnr), 3)}
        held = held.repeat(-(-LEAST_JUDGED // len(held)))
        generator, total = torch.Generator().manual_seed(0), 0.0
        for part in held.split(50):
            total += float(self.objective(part, generator)["loss"]) * len(part)
        return {"loss": round(total / len(held), 5)}

    def _tokenizer(self) -> Any:
        own = getattr(self.objective, "tokenizer", None)
        return self.objective.autoencoder if own is None else own

    def _through(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] encoded and decoded again, on the CPU."""
        tokenizer = self._tokenizer()
        return tokenizer.decode(tokenizer.encode(pixels)).float().clamp(-1, 1).cpu()

    @torch.no_grad()
    def _rebuilt(self) -> Any:
        """Held-out pictures above what the tokenizer makes of them."""
        pixels = to_pixels(self.run.pictures.images[self.run.pictures.held_out[:8]])
        rows = {"held out": pixels, "through the tokenizer": self._through(pixels)}
        return labelled_rows([(label, _pictures(part)) for label, part in rows.items()])

    def _samples(self) -> Any:
        """A sheet of samples of the transformer as it is."""
        run, objective = self.run, self.objective
        parts = {**run.work.parts, "transformer": objective.transformer}
        if run.pictures.captions is not None:
            parts |= {
                "text_encoder": objective.text_encoder,
                "text_tokenizer": objective.text_tokenizer,
            }
        home = next(parts["tokenizer"].parameters()).device
        parts["tokenizer"].to(objective.device)
        options: dict[str, Any] = {}
        if run.settings.recipe == "mar":
            passes = min(MASKED_PASSES, objective.transformer.num_tokens)
            options = {"sampler": "ar", "num_iter": passes}
        asked, labels = self._prompts()
        out = sample(run.pipeline(**parts), asked, seed=0, progress=False, **options)
        parts["tokenizer"].to(home)
        rows = [out.images[first : first + ROW] for first in range(0, len(asked), ROW)]
        return labelled_rows(list(zip(labels, rows, strict=True)))

    def _prompts(self) -> tuple[list[Any], list[str]]:
        """What a sheet shows: a prompt for each picture, and a label for each row."""
        pictures, rows = self.run.pictures, SHEET // ROW
        if pictures.captions is None:
            names = pictures.class_names
            chosen = [index % len(names) for index in range(max(rows, min(8, len(names))))]
            labels = [names[index] for index in chosen]
        else:
            held = [pictures.captions[index][0] for index in pictures.held_out.tolist()]
            chosen = labels = list(dict.fromkeys(held))[:rows]
        return [one for one in chosen for _ in range(ROW)], [label[:60] for label in labels]


def _pictures(pixels: Tensor) -> list[Any]:
    from ..models.pixels import written

    return written(pixels.clamp(-1, 1), "pil")
