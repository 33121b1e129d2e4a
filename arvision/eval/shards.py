"""A folder of samples in fixed blocks, which survives crashes.

    OUT/run.json                what was asked for, and its hash
    OUT/blocks/00012.npy        images of block 12, uint8 [n, H, W, 3]
    OUT/blocks/00012.tokens.npy their tokens, where the maker gives some
    OUT/manifest-0003.jsonl     one line per block that rank 3 finished

A block is written to a temporary file, synced, renamed, and only then entered in a manifest; a
block without an entry is made again, and an entry whose file has another hash is an error. Nothing
depends on the number of processes or on the batch size.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from ..errors import InputError, StateError, as_integer, shown
from ..files import (
    append_line,
    read_regular,
    sha256_of,
    sweep,
    user_path,
    working_in,
    write_bytes,
    write_json,
    write_text,
)
from ..schema import Count, check_fields, parse_json, read_json
from .arrays import open_npy

BLOCK_SIZE = 500
MOST_SAMPLES = 10_000_000
"""Images of one run."""


def config_hash(config: dict[str, Any]) -> str:
    """A hash of plain JSON settings, whatever their order."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def npy_bytes(array: np.ndarray) -> bytes:
    """The array as a `.npy` file."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


@dataclass(frozen=True)
class BlockEntry:
    """One manifest line.

    Attributes:
        block: number of the block.
        sha256: of the image file.
        tokens_sha256: of the token file, or None.
        config: hash of the run's settings.
        facts: seconds, passes and what else the maker measured.
    """

    block: Count
    sha256: str
    tokens_sha256: str | None
    config: str
    facts: dict[str, Any] = field(default_factory=dict)


MOST_LINES = 1 << 28
"""Bytes of a manifest."""


def _lines(manifest: Path) -> list[str]:
    return read_regular(manifest, MOST_LINES).splitlines()


class RunFile(TypedDict):
    """What `run.json` holds."""

    config: dict[str, Any]


def _read_entry(line: str, name: str) -> BlockEntry | None:
    """An entry of a manifest; None for a line that a crash tore.

    Raises:
        InputError: a whole line that is no entry.
    """
    try:
        content = parse_json(line, name)
    except InputError:
        return None
    check_fields(content, BlockEntry, name, only=True)
    try:
        return BlockEntry(**content)
    except TypeError as error:
        raise InputError(f"{name}: {error}") from error


class ShardFolder:
    """The blocks of one run.

    Args:
        folder: where they are, or will be.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = user_path(folder)
        self.blocks = self.folder / "blocks"
        self._config: dict[str, Any] | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The settings in run.json.

        Raises:
            InputError: there is no readable run.json.
        """
        if self._config is None:
            path = self.folder / "run.json"
            try:
                content: Any = check_fields(read_json(path), RunFile, str(path))
            except OSError as error:
                raise InputError(f"{path}: expected the settings of a run ({error})") from error
            self._config = content["config"]
        assert self._config is not None
        return self._config

    @property
    def num(self) -> int:
        """Images of the whole run."""
        found = as_integer(self.config.get("num"))
        if found is None or not 1 <= found <= MOST_SAMPLES:
            raise InputError(
                f"{self.folder / 'run.json'}: num is {shown(self.config.get('num'))}, expected 1 to "
                f"{MOST_SAMPLES:,} images"
            )
        return found

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole run."""
        return -(-self.num // BLOCK_SIZE)

    def open(self, config: dict[str, Any]) -> None:
        """Start a run with these settings, or join the one that is there.

        Raises:
            InputError: the folder holds another run; the message names what differs.
        """
        path = self.folder / "run.json"
        if path.exists():
            known = self.config
            if config_hash(known) == config_hash(config):
                sweep(self.blocks)
                return
            if not self.is_empty():
                keys, missing = sorted(set(known) | set(config)), object()
                key = next(k for k in keys if known.get(k, missing) != config.get(k, missing))
                raise InputError(
                    f"{self.folder} holds a run with {key}={known.get(key)!r}, asked for "
                    f"{key}={config.get(key)!r}: expected the same settings or a new folder"
                )
        elif self.blocks.exists() and any(self.blocks.iterdir()):
            raise InputError(f"{self.folder} holds blocks but no run.json: expected a new folder")
        self.blocks.mkdir(parents=True, exist_ok=True)
        write_json(path, {"config": config, "config_hash": config_hash(config)}, indent=2)
        self._config = config

    def is_empty(self) -> bool:
        """Whether no block was ever finished, as after settings that failed at once."""
        return not any(self.folder.glob("manifest-*.jsonl")) and not any(self.blocks.glob("*.npy"))

    def range_of(self, block: int) -> tuple[int, int]:
        """First index of a block and the one past its last."""
        return block * BLOCK_SIZE, min(self.num, (block + 1) * BLOCK_SIZE)

    def path(self, block: int) -> Path:
        """Image file of a block."""
        return self.blocks / f"{block:05d}.npy"

    def tokens_path(self, block: int) -> Path:
        """Token file of a block."""
        return self.blocks / f"{block:05d}.tokens.npy"

    def entries(self) -> dict[int, BlockEntry]:
        """Manifest entries of all ranks; a torn last line is left out.

        Raises:
            InputError: an entry of other settings, or two that disagree about a block.
        """
        wanted, found = config_hash(self.config), {}
        for path in sorted(self.folder.glob("manifest-*.jsonl")):
            for number, line in enumerate(_lines(path), 1):
                try:
                    entry = _read_entry(line, f"{path}, line {number}")
                except InputError as error:
                    raise InputError(f"{error}: {self._advice()}") from error
                if entry is None:
                    continue  # the block is made again
                if entry.config != wanted:
                    raise InputError(f"{path}: block {entry.block} was made with other settings")
                known = found.setdefault(entry.block, entry)
                if known.sha256 != entry.sha256 or known.tokens_sha256 != entry.tokens_sha256:
                    raise InputError(f"{path}: two entries of block {entry.block} disagree")
        return found

    def finished(self) -> dict[int, BlockEntry]:
        """Blocks that are entered, with files whose hashes agree.

        Raises:
            InputError: a file that is missing or has another hash than its entry.
        """
        found = self.entries()
        for entry in found.values():
            self._check_files(entry)
        return found

    def _check_files(self, entry: BlockEntry) -> None:
        self._check(self.path(entry.block), entry.sha256)
        if entry.tokens_sha256 is not None:
            self._check(self.tokens_path(entry.block), entry.tokens_sha256)

    def _check(self, path: Path, wanted: str) -> None:
        if not path.exists():
            raise InputError(f"{path} is in the manifest but missing: {self._advice()}")
        digest = sha256_of(path)
        if digest != wanted:
            raise InputError(
                f"{path}: sha256 {digest[:12]}..., its manifest says {wanted[:12]}...: "
                f"{self._advice()}"
            )

    def _advice(self) -> str:
        return f"run `arvision eval repair --samples {self.folder}`, then generate again"

    def repair(self) -> list[int]:
        """Forget the blocks whose files are missing or damaged, so that they are made again.

        Returns:
            Their numbers.

        Raises:
            InputError: there is no readable run.json, or a run works in the folder.
        """
        num_blocks, forgotten = self.num_blocks, set()
        with working_in(self.folder):
            for path in sorted(self.folder.glob("manifest-*.jsonl")):
                lines = _lines(path)
                kept = [line for line in lines if self._is_sound(line, num_blocks, forgotten)]
                if len(kept) < len(lines):
                    write_text(path, "".join(line + "\n" for line in kept), durable=True)
        return sorted(forgotten - self.entries().keys())

    def _is_sound(self, line: str, num_blocks: int, forgotten: set[int]) -> bool:
        """Whether a manifest's line names files that are there and whole; else notes its block."""
        try:
            entry = _read_entry(line, "")
        except InputError:
            return False
        if entry is None:
            return False
        try:
            self._check_files(entry)
        except InputError:
            forgotten.add(entry.block)
            return False
        return entry.block < num_blocks

    def write(
        self,
        block: int,
        images: np.ndarray,
        tokens: np.ndarray | None,
        rank: int,
        facts: dict[str, Any],
    ) -> None:
        """Store a block, then enter it in the manifest of `rank`.

        Args:
            block: its number.
            images: uint8 [n, H, W, 3].
            tokens: [n, ...] or None.
            rank: of this process.
            facts: recorded beside it.

        Raises:
            StateError: as many images as the block has are not given.
        """
        start, stop = self.range_of(block)
        if images.dtype != np.uint8 or images.ndim != 4 or len(images) != stop - start:
            given = f"{images.dtype} {list(images.shape)}"
            raise StateError(f"block {block}: {given}, expected {stop - start} uint8 images")
        hashes: list[str | None] = [None, None]
        for slot, (path, array) in enumerate(
            ((self.tokens_path(block), tokens), (self.path(block), images))
        ):
            if array is not None:
                data = npy_bytes(array)
                write_bytes(path, data, durable=True)
                hashes[slot] = hashlib.sha256(data).hexdigest()
        entry = {
            "block": block,
            "sha256": hashes[1],
            "tokens_sha256": hashes[0],
            "config": config_hash(self.config),
            "facts": facts,
        }
        append_line(self.folder / f"manifest-{rank:04d}.jsonl", json.dumps(entry))

    def check_complete(self) -> dict[int, BlockEntry]:
        """Entries of all blocks.

        Raises:
            InputError: blocks are missing; the message says how to go on.
        """
        found = self.finished()
        missing = [block for block in range(self.num_blocks) if block not in found]
        if missing:
            raise InputError(
                f"{self.folder}: {len(missing)} of {self.num_blocks} blocks are missing (first "
                f"{missing[0]}): run `arvision eval generate` again to finish"
            )
        return found

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images start..stop-1, uint8 [n, H, W, 3]."""
        return np.concatenate(list(self._pieces(start, stop, self.path)))

    def read_tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens of images start..stop-1.

        Raises:
            InputError: the run kept none.
        """
        if not self.tokens_path(0).exists():
            raise InputError(f"{self.folder} holds no tokens: expected {self.tokens_path(0).name}")
        return np.concatenate(list(self._pieces(start, stop, self.tokens_path)))

    def _pieces(self, start: int, stop: int, path_of: Any) -> Iterator[np.ndarray]:
        for block in range(start // BLOCK_SIZE, -(-stop // BLOCK_SIZE)):
            first, _ = self.range_of(block)
            array = open_npy(path_of(block))
            yield np.array(array[max(0, start - first) : stop - first])
