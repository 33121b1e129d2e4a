"""Where images come from: files of arrays, folders and archives of pictures, runs, memory.

A source gives uint8 [n, 3, H, W] for a range of indices, without holding the rest in memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..files import regular_file, user_path
from .arrays import NpzFile, open_npy
from .picture_sources import FolderSource, archive_source, list_source, shown
from .pictures import is_called_picture
from .pixels import check_images
from .shards import BLOCK_SIZE, ShardFolder


class Source(Protocol):
    """Images in a fixed order."""

    @property
    def name(self) -> str:
        """For messages and reports."""
        ...

    @property
    def labels(self) -> Sequence[int] | None:
        """Class of every image, or None."""
        ...

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Tensor:
        """Images start..stop-1 as uint8 [n, 3, H, W]."""
        ...


class TensorSource:
    """Images in memory, uint8 [N, 3, H, W]."""

    def __init__(self, images: Any, labels: Sequence[int] | None = None, name: str = "tensor"):
        self.images, self.labels, self.name = check_images(images), labels, name

    def __len__(self) -> int:
        return len(self.images)

    def read(self, start: int, stop: int) -> Tensor:
        """A slice, grey made RGB."""
        return self.images[start:stop].expand(-1, 3, -1, -1)


class ArraySource:
    """Images as an array uint8 [N, H, W, 3], which may be a memory map.

    Args:
        images: see above.
        labels: [N] class ids; whole floats count, and texts are numbered in alphabetical order.
        name: for messages and reports.

    Raises:
        InputError: another shape or dtype, labels that are no classes, or of another number.
    """

    def __init__(self, images: np.ndarray, labels: Any, name: str) -> None:
        if images.ndim != 4 or images.shape[3] not in (1, 3):
            is_first = images.ndim == 4 and images.shape[1] in (1, 3)
            hint = " (transpose(0, 2, 3, 1) gives it)" if is_first else ""
            shape = list(images.shape)
            raise InputError(f"{name}: images of shape {shape}, expected [N, H, W, 3]{hint}")
        if images.dtype != np.uint8:
            raise InputError(f"{name}: images of dtype {images.dtype}, expected uint8")
        if min(images.shape[1:3], default=0) == 0:
            raise InputError(f"{name}: images of shape {list(images.shape)}, expected pixels")
        self.images, self.name, self.notes = images, name, {}
        self.labels = None if labels is None else self._class_ids(np.asarray(labels))

    def _class_ids(self, labels: np.ndarray) -> list[int]:
        if labels.size != len(self.images):
            given = f"{labels.size} labels for {len(self.images)} images"
            raise InputError(f"{self.name}: {given}, expected as many (arr_1)")
        labels = labels.reshape(-1)
        if labels.dtype.kind in "US":
            names, ids = np.unique(labels, return_inverse=True)
            first = [str(name) for name in names[:3]]
            note = {"labels are texts, numbered": {"count": len(names), "first": first}}
            self.notes = {"read_with": note}
            return ids.tolist()
        is_whole = labels.dtype.kind in "iub" or (
            labels.dtype.kind == "f" and bool((labels == np.floor(labels)).all())
        )
        if not is_whole or (len(labels) and not float(np.abs(labels.astype(float)).max()) < 2**53):
            raise InputError(
                f"{self.name}: labels of dtype {labels.dtype}, expected class ids, whole numbers"
            )
        return [int(label) for label in labels.tolist()]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, start: int, stop: int) -> Tensor:
        """A slice, channels first."""
        part = torch.from_numpy(np.array(self.images[start:stop]))
        return part.permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()


class ShardSource:
    """A finished run of `arvision eval generate`."""

    def __init__(self, folder: str | Path) -> None:
        self.shards = ShardFolder(folder)
        self.shards.check_complete()
        self.name = str(folder)
        classes = self.shards.config.get("num_classes")
        self.labels = None if classes is None else [i % classes for i in range(len(self))]

    def __len__(self) -> int:
        return self.shards.num

    def read(self, start: int, stop: int) -> Tensor:
        """Read from the blocks."""
        part = torch.from_numpy(self.shards.read(start, stop))
        return part.permute(0, 3, 1, 2).contiguous()


def open_source(
    where: Any, *, allow_jpeg: bool = False, crop: int | None = None, name: str | None = None
) -> Source:
    """Images from a path, an array, a tensor or a list of pictures.

    Args:
        where: a path to an `.npz` with `arr_0` uint8 [N, H, W, 3] (and labels `arr_1`), a `.npy`, a
            `.zip` or `.tar` of pictures, a folder of pictures, or a folder of `arvision eval
            generate`; a uint8 tensor [N, 3, H, W] or array [N, H, W, 3]; a list of PIL pictures,
            paths, or arrays [H, W, 3] or tensors [3, H, W] of one size; or a source, as it is.
        allow_jpeg: take pictures of lossy formats.
        crop: centre crop and Lanczos resize of pictures to this side.
        name: for messages and reports.

    Raises:
        InputError: nothing there, or not images.
    """
    if hasattr(where, "read") and hasattr(where, "labels"):
        return where
    if isinstance(where, Tensor):
        return TensorSource(where, name=name or "tensor")
    if isinstance(where, np.ndarray):
        return ArraySource(where, None, name or "array")
    if isinstance(where, (list, tuple)):
        return _open_list(where, name or "list", allow_jpeg, crop)
    if not isinstance(where, (str, os.PathLike)):
        kind = type(where).__name__
        raise InputError(f"images are a {kind}: expected a path, an array, a tensor or a list")
    path = user_path(Path(where))
    if os.path.isdir(path):
        if (path / "run.json").exists():
            return ShardSource(path)
        return FolderSource(path, allow_jpeg, crop)
    return _open_file(path, allow_jpeg, crop)


def _open_list(items: Any, name: str, allow_jpeg: bool, crop: int | None) -> Source:
    """Arrays or tensors of one shape, stacked; else pictures and paths."""
    if not items:
        raise InputError(f"{name} is empty: expected at least one picture")
    if all(isinstance(item, (Tensor, np.ndarray)) for item in items):
        shapes = sorted({tuple(item.shape) for item in items})
        if len(shapes) > 1:
            raise InputError(f"{name} holds arrays of shapes {shapes[:3]}: expected one")
        if all(isinstance(item, np.ndarray) for item in items):
            return ArraySource(np.stack(items), None, name)
        if all(isinstance(item, Tensor) for item in items):
            return TensorSource(torch.stack(list(items)), None, name)
    return list_source(items, name, allow_jpeg, crop)


PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def _open_file(path: Path, allow_jpeg: bool, crop: int | None) -> Source:
    """Images of one file, by its first bytes."""
    wanted = "an .npz, .npy, .zip or .tar file or a folder of images"
    if not os.path.exists(path):
        raise InputError(f"{shown(path)} does not exist: expected {wanted}")
    try:
        with regular_file(path) as file:
            start = file.read(512)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    if start.startswith(b"\x93NUMPY"):
        return ArraySource(open_npy(path), None, str(path))
    if start.startswith(b"PK") or path.suffix == ".npz":
        members = NpzFile(path)
        if members or path.suffix == ".npz":
            return _open_npz(path, members)
        return archive_source(path, allow_jpeg, crop)
    for mark, kind in PACKED.items():
        if start.startswith(mark):
            raise InputError(
                f"{path} is packed with {kind}, which has no places to read at: expected {wanted} "
                "(unpack it)"
            )
    if start[257:262] == b"ustar" or path.suffix == ".tar":
        return archive_source(path, allow_jpeg, crop, is_tar=True)
    if is_called_picture(path):
        raise InputError(f"{path} is one picture: expected {wanted}")
    raise InputError(f"{path} is no file of images: expected {wanted}")


def _open_npz(path: Path, members: NpzFile) -> ArraySource:
    if "arr_0" not in members:
        found = ", ".join(members) or "nothing"
        raise InputError(f"{path} holds {found}: expected images under arr_0")
    return ArraySource(members["arr_0"], members.get("arr_1"), str(path))


def iterate(source: Source, size: int = BLOCK_SIZE) -> Iterator[tuple[int, Tensor]]:
    """Start index and images of consecutive pieces."""
    for start in range(0, len(source), size):
        yield start, source.read(start, min(len(source), start + size))
