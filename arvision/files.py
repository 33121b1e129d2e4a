"""The one way in which the package writes: whole or not at all, and never over what is not ours.

What is written lies first in a folder of its own beside its goal, `.NAME.arvision-xxxxxxxx`, with a
name that nobody else has, held by a lock that ends with its process. Whoever meets such a folder
and gets its lock knows that its owner was killed, and only then sweeps it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .errors import ArvisionError, CheckpointError, DiskError, InputError
from .file_kinds import check_kind

try:
    import fcntl
except ImportError:  # no such locks on this system: nothing is swept, nothing is refused
    fcntl = None

MARK = ".arvision-"
LONGEST_NAME = 255
SEAL = b"\nsha256 "
SEAL_LENGTH = len(SEAL) + 64


@contextlib.contextmanager
def replacing(path: str | Path, *, durable: bool = False) -> Iterator[Path]:
    """A temporary path that takes the place of `path` when the block ends without an error.

    It has the same file name, so that libraries that look at its suffix write the right format. Of
    two writers at once each writes the whole file, and the later one's stays.

    Args:
        path: of the file; a symbolic link is followed, folders above it are made.
        durable: have it on the disk, not only in the system's memory, before it gets its name.

    Raises:
        InputError: `path` is a folder, or a place where the system lets nobody write.
        DiskError: the disk is full or fails.
    """
    goal = _followed(path)
    if os.path.isdir(goal):
        raise InputError(f"{goal} is a folder: expected a file name")
    if os.path.lexists(goal) and not os.path.isfile(goal):
        raise InputError(f"{goal} is a pipe or a device: expected a file name")
    check_kind(goal)
    with _place(goal) as temporary:
        yield temporary
        temporary.chmod(0o644)
        if durable:
            _sync(temporary)
        os.replace(temporary, goal)
        if durable:
            _sync(goal.parent)


@contextlib.contextmanager
def making_folder(
    folder: str | Path, *, is_ours: Callable[[Path], bool] | None = None, durable: bool = False
) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends without an error.

    Args:
        folder: new, or empty.
        is_ours: whether a folder that is there already may be replaced; None for never.
        durable: have all files on the disk before the folder gets its name.

    Raises:
        InputError: something is there that may not be replaced, before the block or after it; or
            the system lets nobody write there.
        DiskError: the disk is full or fails.
    """
    goal = _followed(folder)
    _check_goal(goal, is_ours)
    with _place(goal) as temporary:
        temporary.mkdir()
        yield temporary
        if durable:
            for path in (*temporary.rglob("*"), temporary):
                _sync(path)
        _check_goal(goal, is_ours)
        if is_ours is not None and goal.exists():
            _exchange(temporary, goal)
        else:
            _take_name(temporary, goal)
        if durable:
            _sync(goal.parent)


def check_out(path: str | Path, *, suffixes: Sequence[str] = (), is_folder: bool = False) -> None:
    """Refuse a goal that could not be written, before any work for it is done; nothing is made.

    Args:
        path: of a file, or of a folder.
        suffixes: that a file's name may have, such as ".png"; none for any.
        is_folder: whether it is a folder.

    Raises:
        InputError: see above.
    """
    goal = _followed(path)
    if os.path.lexists(goal) and os.path.isdir(goal) != is_folder:
        there, wanted = ("file", "folder") if is_folder else ("folder", "file name")
        raise InputError(f"out {path} is a {there}: expected a {wanted}")
    if suffixes and goal.suffix.lower() not in suffixes:
        raise InputError(f"out {path}: expected a name that ends in {', '.join(suffixes)}")
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in goal.parts):
        raise InputError(f"out {str(path)[:60]}...: expected names of at most {LONGEST_NAME} bytes")
    if not is_folder:
        check_kind(goal)
    above = goal if is_folder else goal.parent
    while not os.path.lexists(above):
        above = above.parent
    if not os.path.isdir(above):
        raise InputError(f"out {path}: {above} is a file, expected a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"out {path}: nobody may write into {above}, expected another place")


@contextlib.contextmanager
def working_in(folder: str | Path) -> Iterator[None]:
    """Make a folder and hold it against other processes; what killed ones left is swept first.

    Raises:
        InputError: another run works in it.
    """
    place = user_path(folder)
    with _refused(place):
        try:
            place.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"{place} cannot be made ({error.strerror})") from error
    try:
        lock = _lock(place, wait=False)
    except BlockingIOError:
        raise InputError(
            f"another run works in {place}: wait until it has ended, or give another folder"
        ) from None
    try:
        sweep(place)
        yield
    finally:
        if lock is not None:
            os.close(lock)


def user_path(path: str | Path) -> Path:
    """A path as users write it: a leading `~` or `~name` is that user's home.

    Raises:
        InputError: no such user, or a character that no path has.
    """
    try:
        place = Path(path).expanduser()
        os.fsencode(place)
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"path {path!r}: {error}, expected a path") from error
    if "\0" in str(place):
        raise InputError(f"path {str(path)[:60]!r}: expected no zero byte")
    return place


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Hold a file against other processes and threads that hold it so, while it is read and replaced.

    A file that is absent is made, empty; folders above it are made.

    Raises:
        InputError: there is something else than a file, or the system lets nobody write there.
    """
    goal = _followed(path)
    with _refused(goal):
        goal.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(goal, os.O_RDONLY | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o644)
        try:
            _check_regular(goal, os.fstat(handle).st_mode)
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX)
            # Whoever held it before may have put another file in its place.
            if not goal.exists() or not os.path.samestat(os.stat(goal), os.fstat(handle)):
                continue
            yield
            return
        finally:
            os.close(handle)


def read_regular(path: str | Path, most: int) -> str:
    """The text of a regular file; pipes and devices, which could hang or never end, are refused.

    Args:
        path: of the file.
        most: bytes.

    Returns:
        Its text, empty if there is no file.

    Raises:
        InputError: it is no regular file, or longer.
        OSError: it cannot be read.
    """
    try:
        file = regular_file(path, most)
    except FileNotFoundError:
        return ""
    with file:
        return file.read(most).decode(errors="replace")


def _followed(path: str | Path) -> Path:
    path = user_path(path)
    return path.resolve() if os.path.islink(path) else path


def _check_goal(goal: Path, is_ours: Callable[[Path], bool] | None) -> None:
    if os.path.lexists(goal):
        is_free = goal.is_dir() and not any(goal.iterdir())
        if not is_free and not (is_ours is not None and goal.is_dir() and is_ours(goal)):
            raise _used(goal)


def _used(goal: Path) -> InputError:
    return InputError(f"{goal} exists and is not an empty folder: expected a new name")


def _take_name(temporary: Path, goal: Path) -> None:
    """Rename, unless somebody else has taken the name meanwhile."""
    with contextlib.suppress(OSError):
        goal.rmdir()  # empty, or it stays
    try:
        os.rename(temporary, goal)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _used(goal) from error
        raise


def _exchange(temporary: Path, goal: Path) -> None:
    """Put the old folder away and the new one in its place; a kill in between is mended by `sweep`."""
    old = temporary.parent / "old" / goal.name
    old.parent.mkdir()
    os.rename(goal, old)
    try:
        os.rename(temporary, goal)
    except OSError:
        os.rename(old, goal)
        raise


@contextlib.contextmanager
def _place(goal: Path) -> Iterator[Path]:
    """A path with the goal's name in a locked folder of its own beside the goal."""
    with _refused(goal):
        try:
            goal.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"{goal.parent} cannot be made ({error.strerror})") from error
        sweep(goal.parent, goal.name)
        place, lock = _locked_place(goal)
    try:
        with _refused(goal):
            yield place / goal.name
    finally:
        shutil.rmtree(place, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked_place(goal: Path) -> tuple[Path, int | None]:
    while True:
        place = Path(tempfile.mkdtemp(prefix=_prefix(goal.name), dir=goal.parent))
        lock = _lock(place)
        if lock is None or place.exists():
            return place, lock
        os.close(lock)  # somebody swept it between its making and its lock


def _prefix(name: str) -> str:
    """Of the temporary folders of a goal; a long name is cut, since file systems allow 255 bytes."""
    return f".{name.encode()[:120].decode(errors='ignore')}{MARK}"


def sweep(folder: str | Path, name: str | None = None) -> None:
    """Remove what killed runs left in a folder; what a living process holds stays.

    Args:
        folder: where to look; folders below it are not looked at.
        name: of the goal; None for all.
    """
    pattern = "." if name is None else _prefix(name)
    for place in list(Path(folder).iterdir()):
        start, mark, end = place.name.rpartition(MARK)
        is_ours = mark and len(end) == 8 and (start + mark).startswith(pattern)
        if not is_ours or place.is_symlink() or not place.is_dir():
            continue
        try:
            lock = _lock(place, wait=False)
        except BlockingIOError:
            continue  # its owner lives
        if lock is None:
            continue
        for old in place.glob("old/*"):  # killed between two renames: the old folder goes back
            if not (Path(folder) / old.name).exists():
                os.rename(old, Path(folder) / old.name)
        shutil.rmtree(place, ignore_errors=True)
        os.close(lock)


def _lock(folder: Path, wait: bool = True) -> int | None:
    """A descriptor that holds the folder until it is closed; None where there are no locks.

    Raises:
        BlockingIOError: without waiting, if somebody holds it.
    """
    if fcntl is None:
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:
        os.close(handle)
        return None
    return handle


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_REFUSALS = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


@contextlib.contextmanager
def _refused(goal: Path) -> Iterator[None]:
    """Turn the system's refusal to write into one line; other errors pass."""
    try:
        yield
    except ArvisionError:
        raise
    except Exception as error:
        number = _error_number(error)
        if number in _FAULTS:
            message = f"{goal} cannot be written: {os.strerror(number)}"
            raise DiskError(message) from error
        if number in _REFUSALS:
            reason = os.strerror(number)
            raise InputError(
                f"{goal} cannot be written ({reason}): expected another place"
            ) from error
        raise


def _error_number(error: BaseException | None) -> int | None:
    """The system's number of an error, which libraries in other languages hide in one of their own."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    said = re.search(r"\(os error (\d+)\)", str(error))
    if error is None or said is not None:
        return None if said is None else int(said[1])
    return _error_number(error.__cause__ or error.__context__)


KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def regular_file(path: str | Path, most: int | None = None) -> BinaryIO:
    """Open a regular file for reading; what it links to counts.

    Opening a FIFO waits for whoever writes into it, and a device may give bytes without end: what
    comes from strangers is opened here.

    Args:
        path: of the file; `~` is the user's home.
        most: bytes that it may have; None for any number.

    Raises:
        InputError: a FIFO, a socket, a device or a folder, or a file of more bytes.
        OSError: no such file, or nobody may read it.
    """
    place = user_path(path)
    _check_regular(path, os.stat(place).st_mode)
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(place, flags)  # without waiting: it may have become a FIFO meanwhile
    try:
        found = os.fstat(handle)
        _check_regular(path, found.st_mode)
        if most is not None and found.st_size > most:
            raise InputError(f"{path}: {found.st_size} bytes, expected at most {most}")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _check_regular(path: str | Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise InputError(f"{path} is {kind}: expected a regular file")


def write_text(path: str | Path, text: str, *, durable: bool = False) -> None:
    """Write a text that appears whole or not at all, see `replacing`."""
    with replacing(path, durable=durable) as temporary:
        temporary.write_text(text)


def write_bytes(path: str | Path, data: bytes, *, durable: bool = False) -> None:
    """Write bytes that appear whole or not at all, see `replacing`."""
    with replacing(path, durable=durable) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | Path, content: Any, *, indent: int = 1) -> None:
    """Write JSON that appears whole or not at all, see `replacing`."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def append_line(path: Path, line: str) -> None:
    """Put a line at the end of a file, and on the disk; a last line that a crash tore is ended."""
    with _refused(path), open(path, "ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def seal(path: str | Path) -> None:
    """Put its hash behind the end of a file, of a format whose readers ignore what follows."""
    with open(path, "rb+") as file:
        digest = _digest(file, os.fstat(file.fileno()).st_size)
        file.write(SEAL + digest)


def check_seal(path: str | Path, advice: str) -> None:
    """Refuse a sealed file that was cut or changed.

    Args:
        path: of the file.
        advice: what to do about it.

    Raises:
        CheckpointError: see above.
    """
    with open(path, "rb") as file:
        digest = _digest(file, max(0, os.fstat(file.fileno()).st_size - SEAL_LENGTH))
        if file.read() != SEAL + digest:
            raise CheckpointError(f"{path} is damaged (its sha256 does not fit): {advice}")


def sha256_of(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a regular file."""
    with regular_file(path) as file:
        return _digest(file, os.fstat(file.fileno()).st_size).decode()


def _digest(file: BinaryIO, length: int) -> bytes:
    """Hexadecimal SHA-256 of the next `length` bytes."""
    digest = hashlib.sha256()
    while length and (part := file.read(min(length, 1 << 20))):
        digest.update(part)
        length -= len(part)
    return digest.hexdigest().encode()
