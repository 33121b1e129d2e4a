"""Recipes: lists of stages, each a training in a folder of its own, from which it resumes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from .data import CLASS_NAMES, load_fashion
from .loop import FitConfig, Objective, fit

Components = dict[str, Any]
"""Trained parts by their name in the pipeline."""


@dataclass
class Work:
    """What the stages of a recipe on pictures hand to each other.

    Attributes:
        images: [M, 32, 32] uint8, the training images, or [M, 3, H, W] of a person's own.
        labels: [M] int64, their classes.
        num_classes: of how many.
        target: model that a draft is made for; None for other recipes.
        parts: finished so far.
        codes: the images as the image tokenizer of `parts` has them: tokens, or moments of latents.
        last: the objective of the stage before.
    """

    images: Tensor
    labels: Tensor
    target: Any = None
    parts: Components = field(default_factory=dict)
    codes: Any = None
    last: Any = None
    num_classes: int = len(CLASS_NAMES)


Shared = TypeVar("Shared")


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[Shared]):
    """One training of a recipe.

    Attributes:
        name: of its folder; recipes that share a folder share the stages of one name.
        fit: settings of the loop.
    """

    name: str
    fit: FitConfig

    def objective(self, work: Shared) -> Objective:
        """What is trained, from the stages before; torch's generator has the seed of `fit`."""
        raise NotImplementedError(f"{type(self).__name__} has no objective")

    def finish(self, work: Shared, objective: Any) -> None:
        """Hand the outcome on; called when the objective is trained."""
        raise NotImplementedError(f"{type(self).__name__} hands nothing on")

    def shortened(self, steps: int, **changes: Any) -> Any:
        """The same stage with at most `steps` steps, and other settings of the loop changed."""
        return replace(self, fit=replace(self.fit, steps=min(steps, self.fit.steps), **changes))


Watch = Callable[[dict[str, Any]], None]
"""What is called with each line of a training's log."""


def run_stages(
    stages: Iterable[Stage[Shared]],
    work: Shared,
    folder: Path,
    *,
    progress: bool = True,
    watch: Callable[[Stage[Shared], Any], Watch] | None = None,
) -> None:
    """Train (or resume) stage after stage under `folder`.

    Args:
        stages: in their order.
        work: what they hand to each other.
        folder: takes a folder per stage.
        progress: show bars on stderr.
        watch: called with each stage and its objective before it is trained.
    """
    for stage in stages:
        torch.manual_seed(stage.fit.seed)
        objective = stage.objective(work)
        on_log = None if watch is None else watch(stage, objective)
        fit(objective, stage.fit, folder / stage.name, progress=progress, on_log=on_log)
        stage.finish(work, objective)


def stage_seconds(folder: Path, stages: Iterable[Stage[Any]]) -> dict[str, float]:
    """Wall time of each finished stage, from its log."""
    seconds = {}
    for stage in stages:
        lines = (folder / stage.name / "log.jsonl").read_text().splitlines()
        seconds[stage.name] = json.loads(lines[-1])["seconds"]
    return seconds


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model on Fashion-MNIST is made; `publish` turns the outcome into a model folder.

    Attributes:
        card: "kind", "conditions" and "summary" of the model; "draft_for" of a draft.
        stages: in their order.
        settings: recommended settings, arguments of the pipeline.
        target: of a draft: name of the embedded model that it drafts for.
        num_images: training images used.
    """

    card: dict[str, str]
    stages: Sequence[Stage[Work]]
    settings: dict[str, Any] = field(default_factory=dict)
    target: str | None = None
    num_images: int = 60_000

    def shortened(self, steps: int, num_images: int, **changes: Any) -> Recipe:
        """The same recipe with at most `steps` steps per stage on `num_images` images.

        Args:
            steps: of a stage.
            num_images: to train on.
            **changes: other settings of every stage's `FitConfig`.
        """
        stages = [stage.shortened(steps, **changes) for stage in self.stages]
        return replace(self, stages=stages, num_images=num_images)

    def run(self, folder: Path, *, target: Any = None, progress: bool = True) -> Components:
        """Train (or resume) every stage under `folder` and return the trained parts.

        Args:
            folder: takes a folder per stage.
            target: of a draft: the model itself.
            progress: show bars on stderr.
        """
        images, labels = (part[: self.num_images] for part in load_fashion("train"))
        work = Work(images, labels, target)
        run_stages(self.stages, work, folder, progress=progress)
        for part in work.parts.values():
            if isinstance(part, nn.Module):
                part.eval()
        return work.parts
