"""From images to features and moments, on one process or many, with the same bits."""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError, check_count
from .distributed import gather, rank_and_size
from .features import Extractor
from .moments import GroupAssigner, GroupedMoments, Moments
from .shards import BLOCK_SIZE
from .sources import Source

SPATIAL_GROUPS = 20


@dataclass
class FeatureSet:
    """Features of a source, on disk, and their moments.

    Attributes:
        name: of the source.
        count: N.
        features: [N, D] float32 memory map, or None where only moments were kept.
        logits: [N, classes] float32 memory map, or None.
        parts: moments of the features in jackknife groups.
        spatial: moments of the spatial features in groups, or None.
        labels: [N] class ids, or None.
        facts: of the extractor, and seconds.
    """

    name: str
    count: int
    features: np.ndarray | None
    logits: np.ndarray | None
    parts: list[Moments]
    spatial: list[Moments] | None
    labels: list[int] | None
    facts: dict[str, Any] = field(default_factory=dict)
    _folder: Any = None

    @property
    def moments(self) -> Moments:
        """Moments of all rows."""
        from .moments import merge_all

        return merge_all(self.parts)


class _Store:
    """Rows of one output, appended to a file and mapped at the end: no memory grows with N."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path, self.shape = folder / f"{name}.f32", (0, 0)
        self._file = open(self.path, "wb")  # noqa: SIM115 (closed in `array`)

    def add(self, rows: Tensor) -> None:
        self._file.write(np.ascontiguousarray(rows.numpy(), dtype=np.float32).tobytes())
        self.shape = (self.shape[0] + len(rows), rows.shape[1])

    def array(self) -> np.ndarray:
        self._file.close()
        # Copy on write: torch wants writable memory, and nothing is ever written.
        return np.memmap(self.path, dtype=np.float32, mode="c", shape=self.shape)


def _outputs(extractor: Extractor, images: Tensor, batch_size: int) -> dict[str, Tensor]:
    """All outputs of a block, on the CPU."""
    found = [extractor.outputs(part) for part in images.split(batch_size)]
    return {name: torch.cat([part[name].cpu() for part in found]) for name in found[0]}


def extract(
    source: Source,
    extractor: Extractor,
    *,
    batch_size: int = 50,
    keep_rows: bool = True,
    progress: bool = True,
    num_groups: int = SPATIAL_GROUPS,
) -> FeatureSet | None:
    """Features and moments of all images of a source.

    Blocks of 500 images are dealt to the processes in turn; rank 0 gathers their features and
    folds them in index order, so moments have the same bits for any number of processes. (The
    batch size may change the last bits of float32 answers, so it is fixed and recorded.)

    Args:
        source: images.
        extractor: see `get_extractor`.
        batch_size: images per forward pass, within a block.
        keep_rows: keep features (for precision and recall, KID) in a temporary file.
        progress: bar on stderr, on rank 0.
        num_groups: jackknife groups.

    Returns:
        The features on rank 0, None on other ranks.

    Raises:
        InputError: fewer than 2 images, images of another size than the first.
    """
    batch_size = check_count("batch_size", batch_size)
    if len(source) < 2:
        raise InputError(f"{source.name} holds {len(source)} image(s): expected at least 2")
    rank, size = rank_and_size()
    num_blocks = -(-len(source) // BLOCK_SIZE)
    sink = _Sink(source, keep_rows, num_groups) if rank == 0 else None
    started = time.perf_counter()
    bar = tqdm(
        total=len(source),
        desc=f"{extractor.facts.name} {Path(source.name).name}",
        unit="image",
        file=sys.stderr,
        disable=not progress or rank != 0,
    )
    with bar:
        for first in range(0, num_blocks, size):
            block = first + rank
            start, stop = block * BLOCK_SIZE, min(len(source), (block + 1) * BLOCK_SIZE)
            found = None
            if block < num_blocks:
                found = start, _outputs(extractor, source.read(start, stop), batch_size)
            parts = gather(found)
            if sink is not None:
                for part in parts or []:
                    if part is not None:
                        sink.add(*part)
                        bar.update(len(part[1]["features"]))
    if sink is None:
        return None
    seconds = time.perf_counter() - started
    return sink.finish(extractor.facts.to_dict() | {"seconds": seconds, "batch_size": batch_size})


class _Sink:
    """Takes blocks in index order on rank 0."""

    def __init__(self, source: Source, keep_rows: bool, num_groups: int) -> None:
        self.source, self.keep_rows = source, keep_rows
        self.assign = GroupAssigner(num_groups)
        self.moments, self.spatial = GroupedMoments(num_groups), GroupedMoments(num_groups)
        self.folder = tempfile.TemporaryDirectory(prefix="arvision-features-")
        self.stores: dict[str, _Store] = {}
        self.has_spatial = False

    def add(self, start: int, found: dict[str, Tensor]) -> None:
        rows = found["features"]
        labels = self.source.labels
        indices = range(start, start + len(rows))
        own = None if labels is None else list(labels[start : start + len(rows)])
        groups = self.assign(indices, own)
        self.moments.update(rows, groups)
        if "spatial" in found:
            self.spatial.update(found["spatial"], groups)
            self.has_spatial = True
        for name in ("features", "logits"):
            if name in found and (self.keep_rows or name == "logits"):
                if name not in self.stores:
                    self.stores[name] = _Store(Path(self.folder.name), name)
                self.stores[name].add(found[name])

    def finish(self, facts: dict[str, Any]) -> FeatureSet:
        arrays = {name: store.array() for name, store in self.stores.items()}
        labels = self.source.labels
        return FeatureSet(
            self.source.name,
            len(self.source),
            arrays.get("features"),
            arrays.get("logits"),
            self.moments.parts(),
            self.spatial.parts() if self.has_spatial else None,
            None if labels is None else list(labels),
            facts,
            self.folder,
        )
