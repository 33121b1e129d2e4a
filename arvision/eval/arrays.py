"""Arrays in `.npz` and `.npy` files: opened one by one, and never larger than their header may say."""

from __future__ import annotations

import contextlib
import io
import math
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import InputError
from ..files import regular_file, user_path

MAX_INFLATED = 2**31
"""Bytes that a compressed array may fill in memory: 2 GiB, about 10,900 images of 256x256."""

MAX_HEADER = 2**16


@contextlib.contextmanager
def _reading(path: Path, wanted: str) -> Iterator[None]:
    """Any error of a reader as one line: strangers' bytes raise almost everything."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
        raise InputError(f"{path}: expected {wanted} ({reason})") from error


class NpzFile(Mapping[str, np.ndarray]):
    """The arrays of an `.npz`, each read when it is asked for.

    Stored ones are memory maps and cost no memory; compressed ones are read, up to `MAX_INFLATED`.

    Args:
        path: of the file.

    Raises:
        InputError: no regular file, truncated, not an npz; of an array: cut off, too large by its
            header, or holding pickled objects.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = user_path(path)
        with self._open() as archive:
            names = [i.filename for i in archive.infolist() if i.filename.endswith(".npy")]
        self._members = {name.removesuffix(".npy"): name for name in names}

    @contextlib.contextmanager
    def _open(self) -> Iterator[zipfile.ZipFile]:
        with (
            _reading(self.path, "a whole .npz file of plain arrays"),
            regular_file(self.path) as file,
            zipfile.ZipFile(file) as archive,
        ):
            yield archive

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __getitem__(self, name: str) -> np.ndarray:
        member = self._members[name]
        with self._open() as archive:
            info = archive.getinfo(member)
            with archive.open(info) as file:
                header = read_header(file, info.filename)
                if info.compress_type == zipfile.ZIP_STORED:
                    return _mapped(self.path, _start_of(archive, info) + file.tell(), *header)
                size = math.prod(header[0]) * header[2].itemsize
                if size > MAX_INFLATED:
                    raise InputError(
                        f"{self.path}: {name} is {size:,} bytes when inflated, expected at most "
                        f"{MAX_INFLATED:,} (or saved without compression, np.savez)"
                    )
                if file.tell() + size > info.file_size:
                    raise ValueError(f"{info.filename} is cut off")
                return _inflated(file, size, *header)


def _inflated(
    file: Any, size: int, shape: tuple[int, ...], is_fortran: bool, dtype: np.dtype
) -> np.ndarray:
    """The array of `size` bytes that follows in a compressed member."""
    if size == 0:
        return np.empty(shape, dtype)
    data, place = bytearray(size), 0
    while place < size and (piece := file.read(min(size - place, 1 << 24))):
        data[place : place + len(piece)] = piece
        place += len(piece)
    if place < size:
        raise ValueError("the array is cut off")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C")


def read_header(file: Any, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and dtype at the start of a `.npy`; leaves the file where the numbers begin.

    Raises:
        ValueError: no such header, one that is longer than any real one, or pickled objects.
    """
    start = file.read(8)
    if start[:6] != b"\x93NUMPY" or len(start) < 8:
        raise ValueError(f"{name} has no .npy header")
    wide = start[6] > 1
    length = file.read(4 if wide else 2)
    (num,) = struct.unpack("<I" if wide else "<H", length)
    if num > MAX_HEADER:
        raise ValueError(f"{name} has a header of {num:,} bytes")
    whole = io.BytesIO(start + length + file.read(num))
    version = np.lib.format.read_magic(whole)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"{name} has the .npy version {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else _read_2_0
    shape, is_fortran, dtype = read(whole)
    if dtype.hasobject:
        raise ValueError(f"{name} holds pickled objects")
    if any(side < 0 for side in shape):
        raise ValueError(f"{name} has the shape {shape}")
    return tuple(int(side) for side in shape), is_fortran, dtype


def _read_2_0(file: BinaryIO) -> Any:
    """Versions 2 and 3, whose names of fields, in another encoding, no picture has."""
    return np.lib.format.read_array_header_2_0(file)


def _start_of(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin in the file."""
    raw: Any = archive.fp
    here = raw.tell()
    raw.seek(info.header_offset)
    name_length, extra_length = struct.unpack("<HH", raw.read(30)[26:30])
    raw.seek(here)
    return info.header_offset + 30 + name_length + extra_length


def _mapped(
    path: Path, start: int, shape: tuple[int, ...], is_fortran: bool, dtype: np.dtype
) -> np.ndarray:
    """The array at `start` of a file, as a map of it."""
    size = math.prod(shape) * dtype.itemsize
    if path.stat().st_size < start + size:
        raise ValueError(f"the array of {size:,} bytes is cut off")
    order = "F" if is_fortran else "C"
    if size == 0:
        return np.empty(shape, dtype, order)
    return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=shape, order=order)


def open_npy(path: str | Path) -> np.ndarray:
    """A `.npy` file as a memory map.

    Raises:
        InputError: no regular file, truncated, or holding pickled objects.
    """
    path = user_path(path)
    with _reading(path, "a whole .npy file of a plain array"), regular_file(path) as file:
        header = read_header(file, path.name)
        return _mapped(path, file.tell(), *header)
