"""What a safetensors file says about itself, read without its tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

from .errors import CheckpointError

LONGEST = 100_000_000
"""Bytes of a header; the format allows no more."""

BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
"""Bytes of a number, by the format's names; smaller types are not counted."""


@dataclass(frozen=True)
class Header:
    """Tensors of a file and where they lie.

    Attributes:
        shapes: of the tensors, by name.
        dtypes: the format's names of their types, by name.
        metadata: what the writer said beside them.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]

    @property
    def num_values(self) -> int:
        """Numbers in all tensors."""
        return sum(prod(shape) for shape in self.shapes.values())


def read_header(path: str | Path) -> Header:
    """The header of a safetensors file, checked against the file's size and the tensors' shapes.

    Raises:
        CheckpointError: no such file, one of another kind, or one that was cut off or is too long.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(LONGEST, size - 8):
            raise CheckpointError(f"{path}: no safetensors file, or one that was cut off")
        text = file.read(length)
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__", {})
        shapes = {name: tuple(map(int, e["shape"])) for name, e in entries.items()}
        dtypes = {name: str(e["dtype"]) for name, e in entries.items()}
        places = [tuple(map(int, e["data_offsets"])) for e in entries.values()]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: no safetensors file, its header cannot be read") from error
    expected = 8 + length + max((end for _, end in places), default=0)
    if size != expected:
        raise CheckpointError(
            f"{path}: {size} bytes, its header tells of {expected}: the file is not complete"
        )
    for (name, shape), (begin, end) in zip(shapes.items(), places, strict=True):
        each = BYTES.get(dtypes[name])
        if each is not None and end - begin != each * prod(shape):
            raise CheckpointError(
                f"{path}: key {name!r} has {end - begin} bytes, its shape {list(shape)} takes "
                f"{each * prod(shape)}"
            )
    return Header(shapes, dtypes, dict(metadata))
