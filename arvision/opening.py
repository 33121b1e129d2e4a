"""From a name to a pipeline: an embedded model, a folder, or a repository of the hub."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .errors import InputError
from .folders import find_model
from .hub import Source, fetch
from .pipeline import ARPipeline, open_pipeline


def open_model(
    name_or_path: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    variant: str | None = None,
    **reached: Any,
) -> ARPipeline:
    """Load a pipeline; see `arvision.load`.

    Args:
        name_or_path: see there.
        device: likewise.
        dtype: likewise.
        variant: likewise.
        **reached: how a repository is reached, see `arvision.hub.Source`.
    """
    return open_pipeline(find_folder(name_or_path, variant, **reached), device, dtype, variant)


def find_folder(name_or_path: str | Path, variant: str | None = None, **reached: Any) -> Path:
    """The folder that a name stands for; a repository of the hub is fetched if it must be.

    Raises:
        InputError: an unknown name, or options of the hub for a folder.
        CheckpointError: a folder or repository that holds no model.
    """
    place = find_model(name_or_path)
    if isinstance(place, Path):
        for name, value in reached.items():
            if name != "local_files_only" and value:
                raise InputError(f"{name}: {place} is a folder, expected it with a repository only")
        return place
    return fetch(Source(place, **reached), variant)


open_cached = lru_cache(maxsize=4)(open_model)
"""`open_model` that keeps the last few; call it with strings and a dtype."""
