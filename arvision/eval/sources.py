"""Where images come from: ADM `.npz` files, folders of pictures, shard folders, tensors.

A source gives uint8 [n, 3, H, W] for a range of indices, without holding the rest in memory.
"""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..errors import InputError
from ..files import user_path
from .pixels import check_images
from .shards import BLOCK_SIZE, ShardFolder

LOSSLESS = {".png", ".bmp", ".ppm", ".tif", ".tiff", ".webp"}
LOSSY = {".jpg", ".jpeg"}


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
    """Images as an array uint8 [N, H, W, 3], which may be a memory map."""

    def __init__(self, images: np.ndarray, labels: Sequence[int] | None, name: str) -> None:
        if images.ndim != 4 or images.shape[3] not in (1, 3):
            raise InputError(f"{name}: images of shape {list(images.shape)}, expected [N, H, W, 3]")
        if images.dtype != np.uint8:
            raise InputError(f"{name}: images of dtype {images.dtype}, expected uint8")
        if labels is not None and len(labels) != len(images):
            raise InputError(f"{name}: {len(labels)} labels for {len(images)} images")
        self.images, self.labels, self.name = images, labels, name

    def __len__(self) -> int:
        return len(self.images)

    def read(self, start: int, stop: int) -> Tensor:
        """A slice, channels first."""
        part = torch.from_numpy(np.array(self.images[start:stop]))
        return part.permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()


class FolderSource:
    """Pictures of one size in a folder, in the order of the numbers in their names.

    Args:
        folder: searched with its subfolders.
        allow_jpeg: take JPEG files, whose artefacts change a distance without being seen.
        crop: side of a centre crop of the short side with Lanczos resize (COCO); None takes
            pictures as they are, all of one size.

    Raises:
        InputError: no pictures, or JPEG without leave.
    """

    def __init__(self, folder: str | Path, allow_jpeg: bool = False, crop: int | None = None):
        self.name, self.crop, self.labels = str(folder), crop, None
        files = [p for p in user_path(folder).rglob("*") if p.suffix.lower() in LOSSLESS | LOSSY]
        self.files = sorted(files, key=lambda p: _natural(str(p.relative_to(folder))))
        jpeg = [p for p in self.files if p.suffix.lower() in LOSSY]
        if jpeg and not allow_jpeg:
            raise InputError(
                f"{jpeg[0]} is JPEG, which changes every distance: expected PNG (allow JPEG to "
                "score it anyway)"
            )
        if not self.files:
            raise InputError(f"{folder} holds no pictures: expected {', '.join(sorted(LOSSLESS))}")
        self._size: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def read(self, start: int, stop: int) -> Tensor:
        """Open, check the size, stack."""
        return torch.stack([self._open(path) for path in self.files[start:stop]])

    def _open(self, path: Path) -> Tensor:
        try:
            with Image.open(path) as file:
                picture = file.convert("RGB")
        except (OSError, UnidentifiedImageError, SyntaxError) as error:
            raise InputError(f"{path} cannot be read as a picture ({error})") from error
        if self.crop is not None:
            picture = centre_crop(picture, self.crop)
        if self._size is None:
            self._size = picture.size
        if picture.size != self._size:
            first = f"{self._size[0]}x{self._size[1]}"
            given = f"{picture.size[0]}x{picture.size[1]}"
            raise InputError(f"{path} is {given}, the first picture {first}: expected one size")
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def centre_crop(picture: Image.Image, side: int) -> Image.Image:
    """Centre crop to the short side, then Lanczos to `side`."""
    short = min(picture.size)
    left, top = (picture.width - short) // 2, (picture.height - short) // 2
    square = picture.crop((left, top, left + short, top + short))
    return square.resize((side, side), Image.Resampling.LANCZOS)


def _natural(name: str) -> list[Any]:
    """Sort key in which 2.png stands before 10.png."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", name)]


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


def open_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Members of an `.npz`; uncompressed ones are memory maps and cost no memory.

    Raises:
        InputError: truncated, not an npz, or holding pickled objects.
    """
    path = user_path(path)
    members = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.filename.endswith(".npy"):
                    continue
                with archive.open(info) as file:
                    array = _mapped(path, info, file)
                members[info.filename.removesuffix(".npy")] = array
    except (OSError, zipfile.BadZipFile, ValueError, EOFError, struct.error) as error:
        raise InputError(f"{path}: expected a whole .npz file of plain arrays ({error})") from error
    return members


def _mapped(path: Path, info: zipfile.ZipInfo, file: Any) -> np.ndarray:
    """One member: mapped where it is stored, read where it is compressed."""
    if info.compress_type != zipfile.ZIP_STORED:
        return np.lib.format.read_array(file, allow_pickle=False)
    version = np.lib.format.read_magic(file)
    read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
    shape, fortran, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError(f"{info.filename} holds pickled objects")
    with open(path, "rb") as raw:
        raw.seek(info.header_offset)
        header = raw.read(30)
        name_length, extra_length = struct.unpack("<HH", header[26:30])
    start = info.header_offset + 30 + name_length + extra_length + file.tell()
    order = "F" if fortran else "C"
    if path.stat().st_size < start + int(np.prod(shape)) * dtype.itemsize:
        raise ValueError(f"{info.filename} is cut off")
    if int(np.prod(shape)) == 0 or not shape:
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)
    return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=shape, order=order)


def open_source(
    where: Any, *, allow_jpeg: bool = False, crop: int | None = None, name: str | None = None
) -> Source:
    """Images from a path or a tensor.

    Args:
        where: an `.npz` with `arr_0` uint8 [N, H, W, 3] (and labels `arr_1`), a folder of
            pictures, a folder of `arvision eval generate`, or a uint8 tensor [N, 3, H, W].
        allow_jpeg: take JPEG files in a folder.
        crop: centre crop and Lanczos resize of a folder's pictures to this side.
        name: for messages and reports.

    Raises:
        InputError: nothing there, or not images.
    """
    if isinstance(where, Tensor):
        return TensorSource(where, name=name or "tensor")
    path = user_path(where)
    if path.is_dir():
        if (path / "run.json").exists():
            return ShardSource(path)
        return FolderSource(path, allow_jpeg, crop)
    if not path.exists():
        raise InputError(f"{path} does not exist: expected an .npz file or a folder of images")
    members = open_npz(path)
    if "arr_0" not in members:
        found = ", ".join(members) or "nothing"
        raise InputError(f"{path} holds {found}: expected images under arr_0")
    labels = members.get("arr_1")
    return ArraySource(
        members["arr_0"], None if labels is None else labels.reshape(-1).tolist(), str(path)
    )


def iterate(source: Source, size: int = BLOCK_SIZE) -> Iterator[tuple[int, Tensor]]:
    """Start index and images of consecutive pieces."""
    for start in range(0, len(source), size):
        yield start, source.read(start, min(len(source), start + size))
