"""Making samples for evaluation: resumable, and the same whatever made them in parallel."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError, one_line, shown
from ..files import working_in
from .distributed import barrier, rank_and_size
from .pixels import check_images
from .protocols import interleaved_labels
from .shards import MOST_SAMPLES, ShardFolder


@dataclass
class Made:
    """What a maker returns for one batch.

    Attributes:
        images: uint8 [B, 3, H, W].
        tokens: [B, ...] or None.
        facts: numbers that add up over batches, such as {"forward_passes": 310}.
    """

    images: Tensor
    tokens: Tensor | None = None
    facts: dict[str, float] = field(default_factory=dict)


Maker = Callable[[Sequence[int], Sequence[Any], Sequence[tuple[int, int]]], Made]
"""Makes images of the given indices with the given labels (or captions) and seeds."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """What decides the bytes of a run; the batch size and the number of processes do not.

    Attributes:
        model: name, for the record.
        sampler: name or spec.
        options: sampler and sampling options.
        num: images.
        num_classes: labels are index mod num_classes; None where prompts are given.
        seed: of the run; image k has the identity (seed, k).
        protocol: id.
        pixels: preset name.
        prompts_sha256: of the prompts, where there are some.
        weights_sha256: of the model's weights, so that a run does not go on with others.
    """

    model: str
    sampler: str
    options: dict[str, Any] = field(default_factory=dict)
    num: int = 50_000
    num_classes: int | None = None
    seed: int = 0
    protocol: str = "custom"
    pixels: str = "plain"
    prompts_sha256: str | None = None
    weights_sha256: str | None = None

    def __post_init__(self) -> None:
        if self.num < 2:
            raise InputError(f"num is {self.num}: expected at least 2 images")
        if self.num > MOST_SAMPLES:
            raise InputError(f"num is {shown(self.num)}: expected at most {MOST_SAMPLES:,} images")
        if (self.num_classes is None) == (self.prompts_sha256 is None):
            raise InputError("expected either num_classes or prompts")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types, as run.json keeps them."""
        try:
            return json.loads(json.dumps(vars(self)))
        except TypeError as error:
            raise InputError(f"options {self.options}: expected plain JSON values") from error


def generate(
    make: Maker,
    config: GenerateConfig,
    out: str | Path,
    *,
    prompts: Sequence[str] | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> ShardFolder:
    """Make the samples of `config` that are not there yet.

    Under a launcher every process makes the blocks whose number is its rank modulo the number of
    processes; call it in all of them.

    Args:
        make: draws one batch; must give an image that depends on its label and seed alone.
        config: the run.
        out: folder; an unfinished run with the same settings goes on.
        prompts: one per image, instead of class labels.
        batch_size: images per call of `make`.
        progress: bar on stderr, on rank 0.

    Returns:
        The folder, complete once every process has returned.

    Raises:
        InputError: the folder holds another run, or a damaged one, or another run works in it.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: expected at least 1")
    if prompts is not None and len(prompts) != config.num:
        raise InputError(f"{len(prompts)} prompts for {config.num} images: expected as many")
    rank, _ = rank_and_size()
    shards = ShardFolder(out)
    settings = config.to_dict()
    with working_in(shards.folder) if rank == 0 else contextlib.nullcontext():
        if rank == 0:
            shards.open(settings)
        barrier()
        shards.open(settings)
        _make_blocks(make, config, shards, prompts, batch_size, progress)
        barrier()
    return shards


def _make_blocks(
    make: Maker,
    config: GenerateConfig,
    shards: ShardFolder,
    prompts: Sequence[str] | None,
    batch_size: int,
    progress: bool,
) -> None:
    """Draw the blocks of this process that are not there yet."""
    rank, size = rank_and_size()
    done = shards.finished()
    mine = [b for b in range(rank, shards.num_blocks, size) if b not in done]
    total = sum(stop - start for start, stop in map(shards.range_of, mine))
    with tqdm(
        total=total,
        desc=one_line(f"{config.model} {config.sampler}", 80),
        unit="image",
        file=sys.stderr,
        disable=not progress or rank != 0,
        smoothing=0.05,
    ) as bar:
        for block in mine:
            _make_block(make, config, shards, block, prompts, batch_size, rank, bar)


def _make_block(
    make: Maker,
    config: GenerateConfig,
    shards: ShardFolder,
    block: int,
    prompts: Sequence[str] | None,
    batch_size: int,
    rank: int,
    bar: Any,
) -> None:
    """Draw one block batch by batch and store it."""
    first, end = shards.range_of(block)
    images, tokens, facts = [], [], {}
    started = time.perf_counter()
    for start in range(first, end, batch_size):
        stop = min(end, start + batch_size)
        indices = list(range(start, stop))
        if prompts is not None:
            labels: Sequence[Any] = prompts[start:stop]
        else:
            labels = interleaved_labels(start, stop, config.num_classes or 1)
        made = make(indices, labels, [(config.seed, index) for index in indices])
        pixels = check_images(made.images, "the maker's images")
        if len(pixels) != len(indices):
            raise InputError(f"the maker gave {len(pixels)} images: expected {len(indices)}")
        images.append(pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy())
        if made.tokens is not None:
            tokens.append(made.tokens.cpu().numpy())
        for name, value in made.facts.items():
            facts[name] = facts.get(name, 0.0) + float(value)
        bar.update(len(indices))
    facts |= {"seconds": time.perf_counter() - started, "images": end - first}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    kept = np.concatenate(tokens) if tokens else None
    shards.write(block, np.concatenate(images), kept, rank, facts)


def run_facts(shards: ShardFolder) -> dict[str, Any]:
    """Images, seconds and what the maker counted, summed over a finished run."""
    total: dict[str, Any] = {}
    for entry in shards.check_complete().values():
        for name, value in entry.facts.items():
            if isinstance(value, (int, float)):
                total[name] = total.get(name, 0) + value
            else:
                total[name] = value
    if total.get("seconds"):
        total["images_per_second"] = total["images"] / total["seconds"]
    return total
