"""`arvision train --data`: from a folder of pictures to a model, resumable at every step."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..card import megabytes, settings_in_words, write_card
from ..files import check_out, making_folder, user_path, working_in, write_json
from ..pipeline import ARPipeline
from .loop import fit
from .own_data import WORK, OwnPictures, check_run, open_pictures, pack_pictures
from .own_recipes import RECIPES, SHARES, OwnSettings, check_captions, timed
from .own_watch import Watch, held_out_loss, prompts_of, rebuilt_sheet, reconstruction, sample_sheet
from .processes import joined
from .stages import Stage, Work, run_stages, stage_seconds

DEFAULT_MINUTES = 10.0
MASKED_PASSES = 16
"""Passes of a MAR on the way; published pictures take as many as there are latents."""

FEWEST_STEPS, TIMED_STEPS = 20, 6


def train(
    data: str | Path,
    out: str | Path,
    settings: OwnSettings | None = None,
    *,
    captions: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a tokenizer and a transformer on a person's own pictures, or go on where a run stopped.

    `out` becomes the folder of a pipeline, which `arvision.load` opens when all is done. On the way
    `out/samples` gets sheets of samples, `out/held_out.jsonl` the loss on pictures that are not trained
    on, `out/work` checkpoints and the pictures as bytes. Of the transformer's weights those stay that
    did best there. Under `torchrun` processes share each batch.

    Args:
        data: folder of pictures of any sizes; each is cropped to the square in its middle. Subfolders
            are classes.
        out: a new or empty folder, or one of the same run.
        settings: see `OwnSettings`.
        captions: file with captions of the pictures (.csv, .tsv or .jsonl with `file` and `text`),
            for a model of texts in place of classes.
        progress: show bars.

    Returns:
        Figures: numbers of pictures, steps of each stage, "seconds" of each, "held_out_loss" of the
        transformer ("first", "best", "best_step", "last"), "reconstruction_psnr" of the tokenizer on
        held-out pictures, in dB. Under `torchrun` the first process alone has them.

    Raises:
        InputError: no pictures, one that cannot be read, captions of missing pictures, settings out
            of range, or a folder that holds another run or something else.
    """
    settings = settings or OwnSettings()
    check_captions(settings, captions)
    out = user_path(out)
    check_out(out, is_folder=True)
    asked = settings.to_json() | {"data": str(user_path(data).absolute())}
    if captions is not None:
        asked["captions"] = str(user_path(captions).absolute())
    processes = joined()
    is_new = check_run(out, asked)
    with working_in(out) if processes.is_main_process else contextlib.nullcontext():
        packed = out / WORK / "pictures"
        if processes.is_main_process and is_new:
            how = {"captions": captions, "is_unconditional": settings.is_unconditional}
            how |= {"seed": settings.seed, "progress": progress}
            pack_pictures(data, settings.size, packed, asked, **how)
        processes.wait_for_everyone()
        pictures = open_pictures(packed)
        return _Run(settings, pictures, out, progress).figures(asked)


class _Run:
    """One run over packed pictures.

    Args:
        settings: see `OwnSettings`.
        pictures: read before.
        out: folder of the run.
        progress: show bars.
    """

    def __init__(
        self, settings: OwnSettings, pictures: OwnPictures, out: Path, progress: bool
    ) -> None:
        self.settings, self.pictures, self.out, self.progress = settings, pictures, out, progress
        self.names = pictures.class_names
        num_classes = len(self.names or [""])
        self.work = Work(pictures.images, pictures.labels, num_classes=num_classes)
        self.processes = joined()
        self.watches: dict[str, Watch] = {}

    def figures(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Train, publish and measure."""
        stages: list[Stage[Work]] = []
        folder = self.out / WORK
        run_stages(
            self._planned(stages), self.work, folder, progress=self.progress, watch=self._watch
        )
        if not self.processes.is_main_process:
            self.processes.wait_for_everyone()
            return {}
        figures: dict[str, Any] = {
            "recipe": self.settings.recipe,
            "pictures": self.pictures.num_train,
            "held_out": len(self.pictures.held_out),
            "classes": self.names,
            "steps": {stage.name: stage.fit.steps for stage in stages},
            "seconds": stage_seconds(folder, stages),
        }
        first, last = (self.watches[stage.name] for stage in stages)
        figures["reconstruction_psnr"] = first.score()["psnr"]
        figures["held_out_loss"] = last.keep_best()
        self._publish(figures, asked)
        tell_fall(figures["held_out_loss"])
        self.processes.wait_for_everyone()
        return figures

    def _planned(self, stages: list[Stage[Work]]) -> Iterator[Stage[Work]]:
        """Each stage with its steps; `stages` takes them. The second is planned when the first is done."""
        for stage, share in zip(
            RECIPES[self.settings.recipe](self.settings, self.pictures), SHARES, strict=True
        ):
            path = self.out / WORK / f"{stage.name}.json"
            if not path.exists():
                plan = self._plan(stage, share)
                self.processes.wait_for_everyone()
                if self.processes.is_main_process:
                    write_json(path, plan)
            self.processes.wait_for_everyone()
            stages.append(timed(stage, self.settings, **json.loads(path.read_text())))
            yield stages[-1]

    def _plan(self, stage: Stage[Work], share: float) -> dict[str, Any]:
        """Steps and precision of a stage."""
        settings, own = self.settings, self.settings.mixed_precision
        is_cpu = str(self.processes.device) == "cpu"
        if settings.steps is not None:
            return {"steps": settings.steps, "mixed_precision": own or ("no" if is_cpu else "bf16")}
        tried = [own] if own else (["no", "bf16"] if is_cpu else ["bf16"])
        costs = {precision: self._seconds(stage, precision) for precision in tried}
        best = min(costs, key=lambda precision: costs[precision])
        seconds = 60 * (settings.minutes or DEFAULT_MINUTES) * share
        return {"steps": max(FEWEST_STEPS, int(seconds / costs[best])), "mixed_precision": best}

    def _seconds(self, stage: Stage[Work], mixed_precision: str) -> float:
        """Wall time of a step."""
        short = timed(stage, self.settings, TIMED_STEPS, mixed_precision)
        short = replace(short, fit=replace(short.fit, log_every=1))
        torch.manual_seed(0)
        objective = short.objective(self.work)
        objective.num_items = self.pictures.num_train
        ends: list[float] = []
        with tempfile.TemporaryDirectory() as place:
            fit(
                objective,
                short.fit,
                Path(place),
                progress=False,
                on_log=lambda _: ends.append(time.perf_counter()),
            )
        return median(b - a for a, b in pairwise(ends))

    def _watch(self, stage: Stage[Work], objective: Any) -> Any:
        """What looks at a stage; only in the first process."""
        objective.num_items = self.pictures.num_train
        if not self.processes.is_main_process:
            return None
        pictures = self.pictures
        place = (
            stage.name,
            objective,
            self.out,
            self.settings.sample_every or max(1, stage.fit.steps // 10),
            stage.fit.steps,
        )
        if stage.name == "transformer":
            watch = Watch(
                *place,
                score=lambda: held_out_loss(objective, pictures.held_out),
                sheet=lambda: self._samples(objective),
                keeps_best=True,
            )
        else:
            own = getattr(objective, "tokenizer", None) or objective.autoencoder
            held = pictures.images[pictures.held_out]
            watch = Watch(
                *place,
                score=lambda: reconstruction(own, held),
                sheet=lambda: rebuilt_sheet(own, held[:8]),
                prefix="tokenizer-",
            )
        self.watches[stage.name] = watch
        return watch

    def _samples(self, objective: Any) -> Any:
        """A sheet of samples of the transformer as it is."""
        parts = {**self.work.parts, "transformer": objective.transformer}
        if self.pictures.captions is not None:
            parts |= {name: getattr(objective, name) for name in ("text_encoder", "text_tokenizer")}
        options: dict[str, Any] = {}
        if self.settings.recipe == "mar":
            passes = min(MASKED_PASSES, objective.transformer.num_tokens)
            options = {"sampler": "ar", "num_iter": passes}
        return sample_sheet(self.pipeline(**parts), prompts_of(self.pictures), **options)

    def pipeline(self, **parts: Any) -> ARPipeline:
        """A pipeline of networks, with plain settings."""
        is_guided = self.pictures.captions is not None or len(self.names or []) > 1
        laws: dict[str, Any] = {"guidance_scale": 2.0 if is_guided else 1.0}
        if self.settings.recipe == "mar":
            laws["temperature"] = 0.95
        return ARPipeline(**parts, class_names=self.names, **laws)

    def _publish(self, figures: dict[str, Any], asked: dict[str, Any]) -> None:
        """Put the parts of a pipeline into `out`, its index last."""
        for part in self.work.parts.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
        pipe = self.pipeline(**self.work.parts)
        card = partial(self._card, figures, asked, settings_in_words(pipe.config))
        put_pipeline(pipe, self.out, card)

    def _card(self, figures: dict[str, Any], asked: dict[str, Any], law: str) -> None:
        kind = {"llamagen": "LlamaGen", "var": "VAR", "mar": "MAR"}[self.settings.recipe]
        by = "captions" if self.names is None else f"{len(self.names)} classes"
        found, side = figures["held_out_loss"], self.settings.size
        options = {**asdict(self.settings), **asked}
        changed = " ".join(
            f"{name}={value}" for name, value in options.items() if value not in (None, False)
        )
        facts = {
            "Data": f"{figures['pictures']:,} pictures of one's own ({by}), cropped to {side}x{side}; "
            f"{figures['held_out']:,} more are held out.",
            "Recipe": f"`arvision train --data` with {changed}.",
            "Steps": ", ".join(
                f"{name} {steps:,} in {figures['seconds'][name] / 60:.1f} min"
                for name, steps in figures["steps"].items()
            ),
            "Size": f"{megabytes(self.out / 'transformer')} of transformer.",
            "Recommended settings": f"{law}.",
            "Measured on what is held out": [
                f"the tokenizer's reconstruction: {figures['reconstruction_psnr']:.1f} dB",
                f"the transformer's loss: {found['first']:.3f} untrained, {found['best']:.3f} at step "
                f"{found['best_step']:,}, whose weights these are.",
            ],
        }
        write_card(self.out, f"A {kind} trained on a person's own pictures.", facts)


def put_pipeline(pipe: ARPipeline, out: Path, card: Callable[[], None]) -> None:
    """Put the parts of a pipeline into the folder of a run, its index last.

    Args:
        pipe: to save.
        out: folder of the run.
        card: writes the README.md, when all parts are there.
    """
    index, finished = "model_index.json", out / WORK / "finished"
    with making_folder(finished, is_ours=lambda _: True) as place:
        pipe.save_pretrained(place)
    (out / index).unlink(missing_ok=True)
    for path in sorted(finished.iterdir()):
        goal = out / path.name
        if path.is_dir():
            shutil.rmtree(goal, ignore_errors=True)
        if path.name not in (index, "README.md"):
            path.rename(goal)
    card()
    (finished / index).rename(out / index)
    shutil.rmtree(finished)


def tell_fall(found: dict[str, Any]) -> None:
    """Warn of a training that taught nothing."""
    if not found["best"] < found["first"]:
        warnings.warn(
            f"the loss on held-out pictures did not fall ({found['first']:.3f} at first, "
            f"{found['last']:.3f} in the end): expected more steps or more pictures",
            stacklevel=2,
        )
