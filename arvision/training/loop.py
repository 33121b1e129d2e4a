"""The one training loop: optimiser, schedule, checkpoints, progress bar, JSON log.

Data order and all randomness are functions of the seed and
the step, so a resumed run takes the very steps that an uninterrupted one takes. Data and random
numbers are made on the CPU and moved in one place to where the module is (`Objective.forward`).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import CheckpointError, InputError, check_count
from ..files import working_in, write_text
from .processes import joined
from .saved import load_state, save_state

MOST_STEPS = 1_000_000_000
MOST_BATCH = 65_536
"""Bounds of the loop's numbers, beyond which nothing is learned but time and memory go."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Settings of one run of the loop.

    Attributes:
        steps: optimiser steps in all.
        batch_size: samples per step over all processes, each of which has an equal share.
        learning_rate: peak of the cosine schedule.
        warmup: steps of linear warm-up.
        weight_decay: for matrices; vectors are never decayed.
        betas: of AdamW.
        clip_norm: largest gradient norm.
        seed: of data order and noise.
        mixed_precision: "no" or "bf16".
        save_every: steps between checkpoints.
        log_every: steps between lines of the log.
        average_decay: of a running average of the weights, which replaces them when the run is
            finished; None for no average.
    """

    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    seed: int = 0
    mixed_precision: str = "no"
    save_every: int = 250
    log_every: int = 25
    average_decay: float | None = None

    def __post_init__(self) -> None:
        check_count("steps", self.steps, MOST_STEPS)
        check_count("batch_size", self.batch_size, MOST_BATCH)
        if self.average_decay is not None and not 0 < self.average_decay < 1:
            raise InputError(f"average_decay {self.average_decay}: expected a number in (0, 1)")

    def to_json(self) -> str:
        """The settings as checkpoints record them; what is not used is left out."""
        return json.dumps({k: v for k, v in asdict(self).items() if v is not None})


class WeightAverage:
    """Running average of the trained weights; young averages follow faster.

    diffusers' `EMAModel` rounds otherwise and forgets the first weights altogether.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.trained = {k: p for k, p in module.named_parameters() if p.requires_grad}
        self.weights = {k: p.detach().clone() for k, p in self.trained.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.trained.items():
            self.weights[name].lerp_(parameter, share)

    @torch.no_grad()
    def install(self) -> None:
        """Replace the trained weights by their average."""
        for name, parameter in self.trained.items():
            parameter.copy_(self.weights[name])


Staged = TypeVar("Staged")


def shortened(recipe: Staged, steps: int, **changes: Any) -> Staged:
    """A recipe with at most `steps` steps in each of its stages.

    Args:
        recipe: a dataclass; its fields that hold a `FitConfig` are stages.
        steps: of a stage.
        **changes: further fields to replace.
    """
    old = cast(Any, recipe)
    for name in (entry.name for entry in fields(old)):
        config = getattr(old, name)
        if isinstance(config, FitConfig):
            changes[name] = replace(config, steps=min(steps, config.steps))
    return replace(old, **changes)


class Chance:
    """Random numbers of a step, drawn on the CPU, so that they are the same on every device.

    Args:
        generator: on the CPU.
        device: where the numbers are wanted.
    """

    def __init__(self, generator: torch.Generator, device: torch.device) -> None:
        self._generator, self._device = generator, device

    def rand(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1)."""
        return torch.rand(shape, generator=self._generator).to(self._device)

    def randn(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self._generator).to(self._device)

    def randint(self, end: int, *shape: int) -> Tensor:
        """Integers in [0, end)."""
        return torch.randint(end, shape, generator=self._generator).to(self._device)

    def pick(self, probs: Tensor) -> Tensor:
        """One index per row of probabilities [..., V], int64 [...]; `torch.multinomial`'s, anywhere."""
        race = torch.empty(probs.shape, dtype=probs.dtype).exponential_(generator=self._generator)
        return (probs / race.to(self._device)).argmax(-1)


class Objective(nn.Module):
    """What the loop trains: a loss over numbered samples.

    Its data stay on the CPU; what is trained is wherever `to` has put it.

    Attributes:
        beside: frozen modules that the loss uses; they move along, but are neither trained nor saved.
        uses_all: whether every step uses every trained parameter, which several processes must know.
    """

    num_items: int
    beside: Sequence[nn.Module] = ()
    uses_all: bool = True

    def inputs(self, indices: Tensor, generator: torch.Generator) -> dict[str, Any]:
        """Data and random numbers of the samples `indices` [B], all on the CPU."""
        raise NotImplementedError(f"{type(self).__name__} has no inputs")

    def loss(self, inputs: dict[str, Any], chance: Chance) -> dict[str, Tensor]:
        """Scalar "loss" (and figures worth logging) of inputs that are where the module is."""
        raise NotImplementedError(f"{type(self).__name__} has no loss")

    def forward(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Scalar "loss" (and figures worth logging) of the samples `indices` [B]."""
        device = self.device
        with full_precision(torch.device("cpu")):
            inputs = self.inputs(
                indices.cpu(), generator
            )  # data parallel wrappers move the indices
        return self.loss(send_to_device(inputs, device), Chance(generator, device))

    @property
    def device(self) -> torch.device:
        """Where the trained parameters are."""
        return next(self.parameters()).device

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module; what stands beside it moves along."""
        for part in self.beside:
            part.to(*args, **kwargs)
        return super().to(*args, **kwargs)

    def rate_share(self, name: str) -> float:
        """Learning rate of the parameter `name`, as a share of the run's; 1 by default."""
        return 1.0

    def after_step(self, step: int) -> None:
        """Called after each optimiser step; does nothing by default."""


def full_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """No autocast inside."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def batch_indices(step: int, batch_size: int, num_items: int, seed: int) -> Tensor:
    """Sample numbers [batch_size] of a step: consecutive slices of one shuffle per epoch."""
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // num_items
    out = torch.empty_like(positions)
    for epoch in epochs.unique().tolist():
        shuffle = torch.randperm(num_items, generator=_generator(seed, epoch, "order"))
        chosen = epochs == epoch
        out[chosen] = shuffle[positions[chosen] % num_items]
    return out


def _generator(seed: int, number: int, purpose: str, process: int = 0) -> torch.Generator:
    """Numbers of an epoch or a step; other processes have other samples, and the noise of other seeds."""
    offset = {"order": 0, "noise": 1}[purpose]
    seed += 7919 * process
    return torch.Generator().manual_seed((seed * 2 + offset) * 1_000_003 + number)


def learning_rate(step: int, config: FitConfig) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    return (
        config.learning_rate
        * warm
        * 0.5
        * (1 + float(torch.cos(torch.tensor(step / config.steps * torch.pi))))
    )


def fit(
    objective: Objective,
    config: FitConfig,
    folder: Path,
    *,
    device: torch.device | None = None,
    progress: bool = True,
    stop_after: int | None = None,
    on_log: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Train `objective` in place, resuming from `folder` where a checkpoint lies there.

    When all is done, the objective is back on the device that it came from.

    Args:
        objective: what to train.
        config: settings; a checkpoint made with others is refused.
        folder: takes `checkpoint.pt` and `log.jsonl`.
        device: where to train; None for `accelerate`'s choice.
        progress: show a bar on stderr.
        stop_after: stop (with a checkpoint) after this many steps of this call.
        on_log: called with each line of the log.

    Returns:
        The log: a dict per `log_every` steps with the step, loss, rate and seconds.

    Raises:
        CheckpointError: the checkpoint belongs to another configuration, or is damaged.
        InputError: another run works in the folder, or the processes cannot share a batch evenly.
    """
    accelerator = _accelerator(config.mixed_precision, objective.uses_all)
    if config.batch_size % accelerator.num_processes:
        raise InputError(
            f"batch_size {config.batch_size} of {accelerator.num_processes} processes: expected a multiple"
        )
    home = objective.device
    with working_in(folder) if accelerator.is_main_process else contextlib.nullcontext():
        # Before the optimiser is made: a move may replace the parameters.
        objective.to(device or accelerator.device)
        try:
            return _fit(objective, config, folder, accelerator, progress, stop_after, on_log)
        finally:
            objective.to(home)


def _fit(
    objective: Objective,
    config: FitConfig,
    folder: Path,
    accelerator: Accelerator,
    progress: bool,
    stop_after: int | None,
    on_log: Callable[[dict[str, Any]], None] | None,
) -> list[dict[str, Any]]:
    """`fit`, in a folder that no other process works in."""
    optimizer = torch.optim.AdamW(
        _parameter_groups(objective, config.weight_decay), lr=0.0, betas=config.betas
    )
    decay = config.average_decay
    average = None if decay is None else WeightAverage(objective, decay)
    first, log = _resume(objective, optimizer, config, folder, average)
    objective.train()
    model, optimizer = accelerator.prepare(objective, optimizer, device_placement=[False, False])
    process = accelerator.process_index
    last = config.steps if stop_after is None else min(config.steps, first + stop_after)
    show = progress and accelerator.is_main_process
    bar = tqdm(total=config.steps, initial=first, disable=not show, desc=folder.name)
    started, seconds = time.perf_counter(), log[-1]["seconds"] if log else 0.0
    for step in range(first, last):
        indices = batch_indices(step, config.batch_size, objective.num_items, config.seed)
        mine = indices[process :: accelerator.num_processes]
        rate = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("share", 1.0)
        with accelerator.autocast():
            figures = model(mine, _generator(config.seed, step, "noise", process))
        optimizer.zero_grad()
        accelerator.backward(figures["loss"])
        accelerator.clip_grad_norm_(objective.parameters(), config.clip_norm)
        optimizer.step()
        objective.after_step(step)
        if average is not None:
            average.update(step)
        bar.update(1)
        if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
            line = {name: round(float(value.detach()), 5) for name, value in figures.items()}
            line |= {
                "step": step + 1,
                "rate": rate,
                "seconds": round(seconds + time.perf_counter() - started, 1),
            }
            log.append(line)
            bar.set_postfix({name: line[name] for name in figures})
            if on_log is not None:
                on_log(line)
        if ((step + 1) % config.save_every == 0 or step + 1 == last) and (
            accelerator.is_main_process
        ):
            _save(objective, optimizer, config, step + 1, log, folder, average)
    bar.close()
    accelerator.wait_for_everyone()
    if average is not None and last == config.steps:
        average.install()
    objective.eval()
    return log


def _accelerator(mixed_precision: str, uses_all: bool = True) -> Accelerator:
    """One of this precision, though an earlier fit of the process may have had another."""
    joined()
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed_precision:
        AcceleratorState._reset_state()
    parallel = DistributedDataParallelKwargs(find_unused_parameters=not uses_all)
    return Accelerator(mixed_precision=mixed_precision, kwargs_handlers=[parallel])


def _parameter_groups(objective: Objective, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices, which decay, and vectors, which do not; for each share of the learning rate."""
    trained = [(n, p) for n, p in objective.named_parameters() if p.requires_grad]
    groups = []
    for share in sorted({objective.rate_share(name) for name, _ in trained}):
        mine = [p for name, p in trained if objective.rate_share(name) == share]
        for decay, is_matrix in ((weight_decay, True), (0.0, False)):
            chosen = [p for p in mine if (p.dim() >= 2) == is_matrix]
            groups.append({"params": chosen, "weight_decay": decay, "share": share})
    return groups


def _save(
    objective: nn.Module,
    optimizer: Any,
    config: FitConfig,
    step: int,
    log: list,
    folder: Path,
    average: WeightAverage | None,
) -> None:
    """Write the checkpoint and the log."""
    state = {
        "model": objective.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "config": config.to_json(),
        "log": json.dumps(log),
    }
    if average is not None:
        state["average"] = average.weights
    save_state(folder / "checkpoint.pt", state)
    write_text(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log))


def _resume(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: FitConfig,
    folder: Path,
    average: WeightAverage | None,
) -> tuple[int, list[dict[str, Any]]]:
    path = folder / "checkpoint.pt"
    if not path.exists():
        return 0, []
    state = load_state(path, "delete it to train this stage from its start")
    if state["config"] != config.to_json():
        raise CheckpointError(
            f"{path} was made with other settings ({state['config']}): expected "
            f"{config.to_json()}; train into another folder or delete it"
        )
    objective.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if average is not None:
        for name, value in state["average"].items():
            average.weights[name].copy_(value)
    return state["step"], json.loads(state["log"])
