"""Repositories of the hub as folders of this machine: only the files that are needed, checked."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import CheckpointError, InputError
from .files import sha256_of
from .headers import read_header
from .needed import INDEXES, WEIGHTS, index_of, needed_files, read_json

MAIN = "main"
NUM_WORKERS = 4


@dataclass(frozen=True)
class Source:
    """A repository and how it is reached, in the words of huggingface_hub.

    Attributes:
        repo: "owner/name".
        revision: a branch, a tag or a commit; None for the main branch.
        token: of an account; True for the one that this machine is logged in with, None likewise
            where there is one, False for none.
        local_files_only: look at what was downloaded before and ask nobody.
        cache_dir: where downloads lie; None for the hub's own place.
        force_download: fetch also what is there.
    """

    repo: str
    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    local_files_only: bool = False
    cache_dir: str | Path | None = None
    force_download: bool = False

    def __str__(self) -> str:
        return self.repo + ("" if self.revision is None else f" ({self.revision})")

    def file(self, name: str, commit: str | None = None) -> Path:
        """One file, downloaded if it must be; `commit` fixes the revision."""
        from huggingface_hub import hf_hub_download

        with _told(self, name):
            return Path(
                hf_hub_download(
                    self.repo,
                    name,
                    revision=commit or self.revision,
                    token=self.token,
                    cache_dir=self.cache_dir,
                    local_files_only=self.local_files_only,
                    force_download=self.force_download and not self.local_files_only,
                )
            )


@dataclass(frozen=True)
class _Listing:
    """The files of a repository: sizes where they are known, sha256 where the hub tells it."""

    sizes: Mapping[str, int | None]
    sums: Mapping[str, str]
    commit: str | None = None
    """None where the list is what lies in the cache."""


def fetch(source: Source, variant: str | None = None) -> Path:
    """The folder with all files of a model, downloaded where they are not there yet.

    Weights are safetensors; code of the repository is never fetched and never run. Without an
    answer of the hub what lies in the cache counts.

    Args:
        source: where it comes from.
        variant: of the weights, such as "fp16".

    Raises:
        InputError: no such repository, revision or variant, no access, or a name that is none.
        CheckpointError: the hub cannot be reached, a file is missing, was not fetched to its end
            or is not what the hub says.
    """
    listing = _list(source)
    if listing.commit is None:
        source = replace(source, local_files_only=True)
    fetched: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in fetched:
            is_new = source.force_download or _cached(source, name, listing.commit) is None
            # The index goes by the revision's name, so that the cache knows where that points.
            commit = None if name in INDEXES else listing.commit
            path = source.file(name, commit)
            _check(source, name, path, listing, is_new)
            fetched[name] = path
        return fetched[name]

    def read(name: str) -> dict[str, Any]:
        return read_json(get(name), f"{source}: file {name}")

    names = needed_files(str(source), listing.sizes, read, variant)
    with ThreadPoolExecutor(NUM_WORKERS) as pool:
        paths = list(pool.map(get, names))
    return paths[0].parent


def fetch_index(source: Source) -> Path:
    """The file of a repository that says what it holds, see `INDEXES`.

    Raises:
        InputError: as `fetch` does.
        CheckpointError: as `fetch` does.
    """
    return source.file(index_of(str(source), _list(source).sizes))


def _list(source: Source) -> _Listing:
    """The repository's files as the hub tells them, or those in the cache where it is not asked.

    Raises:
        InputError, CheckpointError: see `fetch`.
    """
    from huggingface_hub import HfApi, constants

    if source.local_files_only or constants.HF_HUB_OFFLINE:
        return _list_cached(source, "the hub is not asked (offline)")
    try:
        with _told(source):
            info = HfApi(token=source.token).model_info(
                source.repo, revision=source.revision, files_metadata=True
            )
    except _Unreachable as error:
        return _list_cached(source, _first_line(error).removeprefix(f"{source}: ").split(";")[0])
    files = info.siblings or []
    sums = {f.rfilename: f.lfs.sha256 for f in files if f.lfs is not None}
    return _Listing({f.rfilename: f.size for f in files}, sums, info.sha)


def _list_cached(source: Source, reason: str) -> _Listing:
    """What lies in the cache of this revision.

    Raises:
        CheckpointError: nothing; gives the reason why the hub was not asked.
    """
    for index in INDEXES:
        path = _cached(source, index, None)
        if path is not None:
            found = [p.relative_to(path.parent).as_posix() for p in _files(path.parent)]
            return _Listing(dict.fromkeys(found), {})
    place = source.cache_dir or "the hub's cache"
    raise CheckpointError(
        f"{source}: no such folder, {reason}, and {place} does not hold it: expected a folder, a "
        "network, or a model that was downloaded before"
    )


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path


def _cached(source: Source, name: str, commit: str | None) -> Path | None:
    """Where a file lies in the cache, if it does."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(
            source.repo, name, source.cache_dir, commit or source.revision or MAIN
        )
    except HFValidationError as error:
        raise InputError(f"model {source.repo!r}: {_first_line(error)}") from error
    return Path(found) if isinstance(found, str) else None


def _check(source: Source, name: str, path: Path, listing: _Listing, is_new: bool) -> None:
    """Compare a file with what the hub says; a new one that differs is taken out of the cache.

    Raises:
        CheckpointError: it differs.
    """
    size, known = path.stat().st_size, listing.sizes.get(name)
    fault = None
    if known is not None and size != known:
        fault = f"has {size} bytes, the hub says {known}"
    elif is_new and name in listing.sums:
        digest = sha256_of(path)
        if digest != listing.sums[name]:
            fault = f"has sha256 {digest[:12]}..., the hub says {listing.sums[name][:12]}..."
    if fault is None and name.endswith(WEIGHTS):
        try:
            read_header(path)
        except CheckpointError as error:
            fault = f"is broken ({str(error).removeprefix(f'{path}: ')})"
    if fault is None:
        return
    advice = f"delete {path} or load with force_download=True"
    if is_new:
        for one in (os.path.realpath(path), path):
            Path(one).unlink(missing_ok=True)
        advice = "it was taken out of the cache; load again"
    raise CheckpointError(f"{source}: file {name} {fault}: {advice}")


class _Unreachable(CheckpointError):
    """The hub gave no answer."""


@contextlib.contextmanager
def _told(source: Source, file: str | None = None) -> Iterator[None]:
    """Around a call of huggingface_hub: its many errors as ours, with what to do."""
    try:
        yield
    except Exception as error:
        told = _translated(source, file, error)
        if told is None:
            raise
        raise told from error


def _translated(source: Source, file: str | None, error: Exception) -> Exception | None:
    """One of our errors for one of huggingface_hub's; None for what is neither."""
    from huggingface_hub import constants, errors

    what = str(source) if file is None else f"{source}: file {file}"
    at = constants.ENDPOINT
    if isinstance(error, errors.HFValidationError):
        return InputError(f"model {source.repo!r}: {_first_line(error)}")
    if isinstance(error, errors.LocalTokenNotFoundError):
        return InputError("token True: this machine is not logged in, see `hf auth login`")
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"revision {source.revision!r}: {source.repo} has none at {at}")
    if isinstance(error, errors.LocalEntryNotFoundError):
        cause = error.__cause__
        if cause is None or isinstance(cause, errors.OfflineModeIsEnabled):
            return CheckpointError(
                f"{what} was not downloaded before and the hub is not asked (offline): expected a "
                "network once"
            )
        return _translated(source, file, cause) if isinstance(cause, Exception) else None
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        more = ""
        if isinstance(error, errors.GatedRepoError):
            more = f", after its terms were accepted at {at}/{source.repo}"
        elif isinstance(error, errors.RepositoryNotFoundError):
            more = "; it is private, or there is none of that name"
        return InputError(
            f"{what}: {at} refuses access ({status}): expected token= of an account that may read "
            f"it (`hf auth login`){more}"
        )
    if status == 404 and file is None:
        return InputError(
            f"model {source.repo!r}: no such folder, and no such repository at {at} (404); a "
            "private one needs token="
        )
    if status == 404:
        return CheckpointError(f"{what} is missing at {at} (404)")
    if status is not None:
        return _Unreachable(f"{what}: {at} answers with {status}, try again later")
    # The transport's errors have the base of HTTP errors, whatever the transport.
    transport = errors.HfHubHTTPError.__mro__[1]
    if isinstance(error, (transport, ConnectionError, TimeoutError)):
        reason = f"{at} cannot be reached ({type(error).__name__})"
        return _Unreachable(f"{what}: {reason}; load again to go on, whole files are kept")
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return CheckpointError(f"{what} came with another size than {at} says: load again")
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
