"""Pictures as a source: of folders, of zip and tar files, of lists; and what they leave out."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import tarfile
import warnings
import weakref
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import InputError, check_count
from ..files import regular_file, user_path
from .distributed import rank_and_size
from .pictures import is_called_picture, open_picture, picture_facts, to_rgb

MAX_MEMBER = 2**29
"""Bytes that a picture inside an archive may have when inflated: 512 MiB, known from the header."""

HIDDEN = {
    *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "@eadir"),
    *("lost+found", "system volume information", "#recycle", "icon\r"),
}
NUM_NAMED = 3


class Entry(NamedTuple):
    """One thing that may be a picture; `inside` is its name within its folder, parts joined by "/"."""

    name: str
    open: Callable[[], BinaryIO | Image.Image]
    inside: str = ""


class Notes:
    """What reading a source left out or changed, by reason, with counts and first names."""

    def __init__(self) -> None:
        self.left_out: dict[str, dict[str, Any]] = {}
        self.read_with: dict[str, dict[str, Any]] = {}

    def add(self, kind: str, reason: str, name: str) -> None:
        """Count `name` under a reason of `kind`, "left_out" or "read_with"."""
        found = getattr(self, kind).setdefault(reason, {"count": 0, "first": []})
        found["count"] += 1
        if len(found["first"]) < NUM_NAMED:
            found["first"].append(Path(name).name)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, without what is empty."""
        return {key: value for key, value in vars(self).items() if value}

    def warn(self, where: str) -> None:
        """One warning for what is more than a hidden file."""
        kinds = (("left out", self.left_out), ("read", self.read_with))
        said = [
            f"{found['count']} {kind}: {reason} ({', '.join(found['first'])}"
            f"{', ...' if found['count'] > len(found['first']) else ''})"
            for kind, group in kinds
            for reason, found in group.items()
            if reason != "hidden"
        ]
        if said and rank_and_size()[0] == 0:
            warnings.warn(f"{where}: {'; '.join(said)}", stacklevel=2)


class PictureSource:
    """Pictures of one size; their headers are read at once, their pixels when asked for.

    Args:
        name: for messages and reports.
        entries: in order; what is no picture and is not called like one is left out.
        notes: what was left out before; goes on here.
        allow_jpeg: take pictures of lossy formats, whose artefacts change a distance unseen.
        crop: side of a centre crop of the short side with Lanczos resize (COCO); None takes
            pictures as they are, all of one size.

    Raises:
        InputError: no pictures, one that cannot be opened, a lossy one without leave, sizes that
            differ.
    """

    rgb = staticmethod(to_rgb)

    def __init__(
        self,
        name: str,
        entries: Iterable[Entry],
        notes: Notes,
        allow_jpeg: bool = False,
        crop: int | None = None,
    ) -> None:
        self.name, self.labels = name, None
        self.crop = None if crop is None else check_count("crop", crop)
        self._notes, self._first = notes, (0, 0)
        self.entries = [entry for entry in entries if self._is_picture(entry, allow_jpeg)]
        if not self.entries:
            raise InputError(
                f"{name} holds no pictures: expected PNG, TIFF, BMP or what else Pillow opens"
            )
        notes.warn(name)

    @property
    def notes(self) -> dict[str, Any]:
        """What was left out or changed, see `Notes`."""
        return self._notes.to_dict()

    def _is_picture(self, entry: Entry, allow_jpeg: bool) -> bool:
        """Look at the header; count what it says."""
        where = entry.name
        with _opened(entry) as file:
            try:
                picture = open_picture(file, where)
            except InputError:
                if is_called_picture(where) or isinstance(file, Image.Image):
                    raise
                self._notes.add("left_out", "no picture", where)
                return False
            self._look(picture, None if file is picture else file, where, allow_jpeg)
        return True

    def _look(self, picture: Image.Image, file: Any, where: str, allow_jpeg: bool) -> None:
        """Refuse what would not be scored as it is seen, and note what reading changes."""
        facts = picture_facts(picture, file)
        if facts.lossy is not None and not allow_jpeg:
            raise InputError(
                f"{where} is {facts.lossy}, which changes every distance: expected a lossless "
                "format such as PNG (allow JPEG to score it anyway)"
            )
        if self._first == (0, 0):
            self._first = facts.size
        if self.crop is None and facts.size != self._first:
            first, given = ("x".join(map(str, size)) for size in (self._first, facts.size))
            raise InputError(f"{where} is {given}, the first picture {first}: expected one size")
        notes = facts.notes if facts.lossy is None else (f"lossy ({facts.lossy})", *facts.notes)
        for note in notes:
            self._notes.add("read_with", note, where)

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, start: int, stop: int) -> Tensor:
        """Decode and stack, uint8 [n, 3, H, W]."""
        return torch.stack([self._pixels(entry) for entry in self.entries[start:stop]])

    def _pixels(self, entry: Entry) -> Tensor:
        with _opened(entry) as file:
            picture = self.rgb(open_picture(file, entry.name), entry.name)
        if self.crop is not None:
            picture = centre_crop(picture, self.crop)
        elif picture.size != self._first:
            raise InputError(f"{entry.name} is {picture.size}, its header says {self._first}")
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@contextlib.contextmanager
def _opened(entry: Entry) -> Iterator[BinaryIO | Image.Image]:
    """What an entry holds, closed behind the block; a picture of the caller's stays open."""
    try:
        file = entry.open()
    except InputError:
        raise
    except (tarfile.TarError, zipfile.BadZipFile, OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{entry.name} cannot be read ({reason})") from error
    try:
        yield file
    finally:
        if not isinstance(file, Image.Image):
            file.close()


def centre_crop(picture: Image.Image, side: int) -> Image.Image:
    """Centre crop to the short side, then Lanczos to `side`."""
    short = min(picture.size)
    left, top = (picture.width - short) // 2, (picture.height - short) // 2
    square = picture.crop((left, top, left + short, top + short))
    return square.resize((side, side), Image.Resampling.LANCZOS)


def natural_key(name: str) -> list[Any]:
    """Sort key in which 2.png stands before 10.png."""
    key: list[Any] = []
    for index, part in enumerate(re.split(r"([0-9]+)", name)):
        digits = part.lstrip("0")
        key.append((0, len(digits), digits) if index % 2 else (1, 0, part))
    return key


def shown(name: object) -> str:
    """A name of a file on one line, whatever its bytes."""
    text = str(name)
    text = text if len(text) <= 300 else f"{text[:300]}..."
    return text if text.isprintable() else ascii(text)[1:-1]


def is_hidden(name: str) -> bool:
    """Whether a file or folder is the system's or an editor's, not the user's."""
    return name.startswith(".") or name.casefold() in HIDDEN


class FolderSource(PictureSource):
    """Pictures in a folder and its subfolders, in the order of the numbers in their names.

    Hidden entries are skipped; linked folders are followed, each folder once.

    Args:
        folder: searched with its subfolders.
        allow_jpeg: see `PictureSource`.
        crop: likewise.

    Raises:
        InputError: see `PictureSource`; also a FIFO, socket or device that is called like a picture.
    """

    def __init__(self, folder: str | Path, allow_jpeg: bool = False, crop: int | None = None):
        notes = Notes()
        paths = sorted(_walk(user_path(folder), notes), key=lambda pair: natural_key(pair[0]))
        entries = [Entry(shown(p), lambda p=p: regular_file(p), inside) for inside, p in paths]
        super().__init__(str(folder), entries, notes, allow_jpeg, crop)


def _walk(top: Path, notes: Notes) -> Iterator[tuple[str, Path]]:
    """Relative name and path of the regular files below a folder; links to folders come last."""
    waiting, seen = deque([(top, "", False)]), set()
    while waiting:
        folder, name, _ = waiting.popleft()
        try:
            facts = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda e: e.name)
        except OSError as error:
            raise InputError(f"{folder} cannot be read ({error.strerror})") from error
        if (facts.st_dev, facts.st_ino) in seen:
            notes.add("left_out", "a link to a folder that is read already", shown(name))
            continue
        seen.add((facts.st_dev, facts.st_ino))
        for entry in entries:
            inside = f"{name}/{entry.name}" if name else entry.name
            path = folder / entry.name
            if is_hidden(entry.name):
                notes.add("left_out", "hidden", shown(inside))
            elif entry.is_dir(follow_symlinks=False):
                first = next((i for i, w in enumerate(waiting) if w[2]), len(waiting))
                waiting.insert(first, (path, inside, False))
            elif entry.is_dir():
                waiting.append((path, inside, True))
            elif _is_file(path):
                yield inside, path
            else:
                notes.add("left_out", "no regular file", shown(inside))


def _is_file(path: Path) -> bool:
    """Whether a path is a regular file.

    Raises:
        InputError: it is not, and is called like a picture.
    """
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return True
        if is_called_picture(path):
            regular_file(path).close()  # says what it is
    except OSError as error:
        if is_called_picture(path):
            raise InputError(f"{path} cannot be read ({error.strerror})") from error
    return False


def archive_source(
    path: Path, allow_jpeg: bool = False, crop: int | None = None, is_tar: bool = False
) -> PictureSource:
    """Pictures inside a `.zip` or an uncompressed `.tar`, in the order of the numbers in their names.

    Members are read from the archive, never unpacked; each may have `MAX_MEMBER` bytes.

    Raises:
        InputError: see `PictureSource`; a damaged archive, a member that is too large.
    """
    file = regular_file(path)
    try:
        return _of_archive(path, file, allow_jpeg, crop, is_tar)
    except BaseException:
        file.close()
        raise


def _of_archive(
    path: Path, file: BinaryIO, allow_jpeg: bool, crop: int | None, is_tar: bool
) -> PictureSource:
    notes = Notes()
    try:
        found = list(_tar_members(file, notes) if is_tar else _zip_members(file))
    except (tarfile.TarError, zipfile.BadZipFile, OSError, ValueError, RuntimeError) as error:
        kind = "tar" if is_tar else "zip"
        raise InputError(f"{path}: expected a whole .{kind} file ({error})") from error
    entries = []
    for name, size, opener in sorted(found, key=lambda member: natural_key(member[0])):
        if any(is_hidden(part) for part in PurePosixPath(name).parts if part != ".."):
            notes.add("left_out", "hidden", shown(name))
        elif size > MAX_MEMBER:
            raise InputError(
                f"{path}: {name} has {size:,} bytes, expected at most {MAX_MEMBER:,} in an archive"
            )
        else:
            entries.append(Entry(shown(f"{path}/{name}"), opener))
    source = PictureSource(str(path), entries, notes, allow_jpeg, crop)
    weakref.finalize(source, file.close)
    return source


Member = tuple[str, int, Callable[[], Any]]


def _zip_members(file: BinaryIO) -> Iterator[Member]:
    archive = zipfile.ZipFile(file)
    for info in archive.infolist():
        if not info.is_dir():
            yield info.filename, info.file_size, lambda i=info: archive.open(i)


def _tar_members(file: BinaryIO, notes: Notes) -> Iterator[Member]:
    archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (open as long as the source)
    members = archive.getmembers()
    file.seek(archive.offset)
    if file.read(512) != bytes(512):  # tarfile takes a file that is cut between members for whole
        raise ValueError("its end mark is missing")
    for info in members:
        if info.isreg():
            yield info.name, info.size, lambda i=info: _extracted(archive, i)
        elif not info.isdir():
            notes.add("left_out", "no regular file", shown(info.name))


def _extracted(archive: tarfile.TarFile, info: tarfile.TarInfo) -> BinaryIO:
    file: Any = archive.extractfile(info)
    assert file is not None, "a regular member"
    return file


def list_source(
    pictures: Sequence[Any], name: str, allow_jpeg: bool = False, crop: int | None = None
) -> PictureSource:
    """PIL pictures and paths of pictures, in their order.

    Raises:
        InputError: see `PictureSource`; anything else in the list.
    """
    entries = []
    for index, picture in enumerate(pictures):
        if isinstance(picture, Image.Image):
            entries.append(Entry(f"{name}[{index}]", lambda p=picture: p))
        elif isinstance(picture, (str, os.PathLike)):
            path = user_path(Path(picture))
            if not os.path.exists(path):
                raise InputError(f"{shown(path)} does not exist: expected a picture")
            entries.append(Entry(shown(path), lambda p=path: regular_file(p)))
        else:
            raise InputError(
                f"{name}[{index}] is a {type(picture).__name__}: expected pictures of PIL, paths, "
                "or arrays"
            )
    return PictureSource(name, entries, Notes(), allow_jpeg, crop)
