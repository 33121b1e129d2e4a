"""Which files a model is loaded from, among all that a folder or a repository holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from . import schema
from .errors import CheckpointError, InputError

INDEXES = ("model_index.json", "config.json")
"""Either file says what a folder holds: a pipeline of diffusers, or a network of transformers."""

TEXTS = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Suffixes of what stands beside weights: configurations and vocabularies, never code."""

WEIGHTS = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")
SHARDS = ".safetensors.index"


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        CheckpointError: it does not; `name` is what messages call it.
    """
    try:
        found = schema.read_json(path)
    except (OSError, InputError) as error:
        raise CheckpointError(f"{name} cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{name}: expected a JSON object, found {type(found).__name__}")
    return found


def index_of(name: str, files: Mapping[str, Any]) -> str:
    """Which of `INDEXES` is among the files.

    Raises:
        CheckpointError: none is.
    """
    for index in INDEXES:
        if index in files:
            return index
    shown = ", ".join(sorted(files)[:5]) or "nothing"
    raise CheckpointError(
        f"{name}: neither model_index.json nor config.json is there, but {shown}: no model that "
        "arvision loads (`arvision info` tells what it is)"
    )


def _is_part(name: str, value: Any) -> bool:
    """Whether an entry of an index names a part, [library, class], and not an option of two values."""
    is_pair = isinstance(value, list) and len(value) == 2
    return is_pair and all(isinstance(each, str) for each in value) and name != "class_names"


def needed_files(
    name: str,
    files: Mapping[str, Any],
    read: Callable[[str], dict[str, Any]],
    variant: str | None = None,
) -> list[str]:
    """Names of the files that a model is loaded from, the index first.

    Args:
        name: of the repository or folder, for messages.
        files: all its files, "part/name".
        read: gives a JSON file of it.
        variant: see `fetch`.

    Raises:
        InputError: weights of that variant are nowhere.
        CheckpointError: a part or its weights are missing.
    """
    index = index_of(name, files)
    content = read(index)
    parts = [""]
    if index == "model_index.json":
        parts = [f"{part}/" for part, value in content.items() if _is_part(part, value)]
    found = [index]
    has_variant = False
    for part in parts:
        inside = {f.removeprefix(part) for f in files if f.startswith(part)}
        inside = {f for f in inside if "/" not in f}
        if not inside:
            raise CheckpointError(f"{name}: part {part} is missing, which {index} names")
        texts = [f for f in inside if f.endswith(TEXTS) and SHARDS not in f]
        weights, is_variant = weight_files(name, part, inside, read, variant)
        has_variant |= is_variant
        found += sorted(part + f for f in (*texts, *weights) if part + f != index)
    if variant is not None and not has_variant:
        known = sorted({v for f in files if (v := _variant_of(f)) is not None})
        raise InputError(
            f"variant {variant!r}: {name} has no such weights, "
            + (f"expected one of {', '.join(known)}" if known else "it has no variants")
        )
    return found


def weight_files(
    name: str,
    part: str,
    inside: set[str],
    read: Callable[[str], dict[str, Any]],
    variant: str | None,
) -> tuple[list[str], bool]:
    """Weight files of a part, and whether they are of the variant."""
    for wanted in dict.fromkeys((variant, None)):
        tail = "" if wanted is None else f".{wanted}"
        for stem in ("model", "diffusion_pytorch_model"):
            single, shards = f"{stem}{tail}{WEIGHTS}", f"{stem}{SHARDS}{tail}.json"
            if single in inside:
                return [single], wanted is not None
            if shards in inside:
                places = read(part + shards).get("weight_map")
                if not isinstance(places, dict):
                    raise CheckpointError(f"{name}: file {part}{shards} has no weight_map")
                held = sorted({str(place) for place in places.values()})
                for file in held:
                    if file not in inside:
                        raise CheckpointError(
                            f"{name}: file {part}{file} is missing, which {part}{shards} names"
                        )
                return [shards, *held], wanted is not None
    if "config.json" in inside and not any(_variant_of(f) for f in inside):
        pickles = sorted(f for f in inside if f.endswith(PICKLES))
        other = f"; it has {pickles[0]}, which may hold code and is not read" if pickles else ""
        raise CheckpointError(
            f"{name}: {part or 'it'} has no weights, expected "
            f"{part}model{WEIGHTS} or {part}diffusion_pytorch_model{WEIGHTS}{other}"
        )
    return [], False


def _variant_of(file: str) -> str | None:
    """The variant in the name of a weight file."""
    base = PurePosixPath(file).name
    if SHARDS in base:
        tail = base.split(SHARDS)[1].removesuffix(".json")
        return tail.removeprefix(".") or None
    if not base.endswith(WEIGHTS):
        return None
    pieces = base.removesuffix(WEIGHTS).split("-")[0].split(".")
    return pieces[1] if len(pieces) == 2 else None
