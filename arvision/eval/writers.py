"""Sample files in other people's layouts, written in one pass with memory of one block."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import InputError, StateError
from ..files import making_folder, replacing, user_path
from ..prompt_files import read_prompts as read_prompts
from .sources import Source, iterate

EPOCH = (1980, 1, 1, 0, 0, 0)


def write_npz(source: Source, path: str | Path) -> Path:
    """ADM's file: uncompressed `arr_0` uint8 [N, H, W, 3] and, where known, labels `arr_1`.

    The same images give the same bytes. ZIP64, so 9.83 GB are no difficulty.
    """
    path = user_path(path)
    side = source.read(0, 1).shape[-2:]
    with (
        replacing(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        with archive.open(zipfile.ZipInfo("arr_0.npy", EPOCH), "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(source), *side, 3)}
            np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]
            for _, images in iterate(source):
                file.write(images.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
        if source.labels is not None:
            with archive.open(zipfile.ZipInfo("arr_1.npy", EPOCH), "w") as file:
                np.lib.format.write_array(file, np.asarray(source.labels, dtype=np.int64))
    return path


def _check_format(file_format: str, allow_jpeg: bool) -> None:
    if file_format not in ("png", "jpg"):
        raise InputError(f"unknown picture format {file_format!r}: expected png or jpg")
    if file_format == "jpg" and not allow_jpeg:
        raise InputError(
            "JPEG changes every distance: expected png (allow JPEG to write it anyway)"
        )


def _encode(image: Any, file_format: str = "png", quality: int = 95) -> bytes:
    """Picture bytes of uint8 [3, H, W]."""
    buffer = io.BytesIO()
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    if file_format == "png":
        picture.save(buffer, "PNG")
    else:
        picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def write_pictures(
    source: Source, folder: str | Path, file_format: str = "png", allow_jpeg: bool = False
) -> Path:
    """A folder of numbered pictures 000000.png ..., which appears when it is complete.

    Raises:
        InputError: the folder exists and is not empty, or JPEG without leave.
    """
    _check_format(file_format, allow_jpeg)
    with making_folder(folder) as place:
        for start, images in iterate(source):
            for offset, image in enumerate(images):
                name = f"{start + offset:06d}.{file_format}"
                (place / name).write_bytes(_encode(image, file_format))
        _check_pictures(place, len(source))
    return user_path(folder)


def _check_pictures(place: Path, num: int) -> None:
    """Refuse to give a folder its name unless it holds as many pictures as were to be written.

    Raises:
        StateError: see above.
    """
    found = sum(path.suffix in (".png", ".jpg") for path in place.rglob("*"))
    if found != num:
        raise StateError(f"{found} pictures were written: expected {num}")


def write_tar(source: Source, path: str | Path) -> Path:
    """A tar file of numbered PNGs, each with a `.cls` file where labels are known (WebDataset)."""
    path = user_path(path)
    with (
        replacing(path) as temporary,
        tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for start, images in iterate(source):
            for offset, image in enumerate(images):
                index = start + offset
                members = {"png": _encode(image)}
                if source.labels is not None:
                    members["cls"] = str(source.labels[index]).encode()
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{index:06d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return path


LAYOUTS = ("geneval", "hpsv2", "dpg-bench")


def export_layout(
    layout: str,
    source: Source,
    records: Sequence[dict[str, Any]],
    folder: str | Path,
    per_prompt: int = 1,
) -> Path:
    """Write samples as a benchmark's own scripts want them.

    - geneval: `00000/metadata.jsonl` and `00000/samples/0000.png` (553 prompts, 4 images each)
    - hpsv2: `style/00000.jpg` (JPEG because its scripts look for it), records with "style"
    - dpg-bench: `id.png`, a 2x2 grid of four images, records with "id" (else the number)

    Args:
        layout: one of `LAYOUTS`.
        source: image p * per_prompt + k is the k-th image of prompt p.
        records: see `read_prompts`.
        folder: new folder.
        per_prompt: images of each prompt.

    Raises:
        InputError: an unknown layout, counts that do not agree, a missing field, a name that is no
            plain file name, or used twice, a used folder.
    """
    writers = {"geneval": _geneval, "hpsv2": _hpsv2, "dpg-bench": _dpg}
    if layout not in writers:
        raise InputError(f"unknown layout {layout!r}: expected one of {', '.join(LAYOUTS)}")
    if len(source) != len(records) * per_prompt:
        wanted = f"{len(records)} prompts x {per_prompt}"
        raise InputError(f"{len(source)} images for {wanted}: expected as many")
    needed = {"geneval": 0, "hpsv2": 1, "dpg-bench": 4}[layout]
    if needed and per_prompt != needed:
        raise InputError(f"{layout} takes {needed} image(s) of each prompt, not {per_prompt}")
    if layout == "hpsv2" and any("style" not in record for record in records):
        raise InputError("hpsv2 records need a style: expected JSON lists by style")
    if layout == "hpsv2":
        _check_names("style", [str(record["style"]) for record in records])
    if layout == "dpg-bench":
        names = _dpg_names(records)
        _check_names("id", names)
        for name, count in Counter(name.casefold() for name in names).items():
            if count > 1:
                raise InputError(f"{count} dpg-bench records have the id {name!r}: expected one")
    with making_folder(folder) as place:
        writers[layout](source, records, place, per_prompt)
        _check_pictures(place, len(records) if layout == "dpg-bench" else len(source))
    return user_path(folder)


RESERVED = {"con", "prn", "aux", "nul", *(f"{d}{k}" for d in ("com", "lpt") for k in range(1, 10))}


def _check_names(kind: str, names: Sequence[str]) -> None:
    """Refuse what is no plain name of a file or folder on every system.

    Raises:
        InputError: a name that is empty, overlong or reserved, that starts or ends with a dot or a
            space, or holds separators or control characters.
    """
    for number, name in enumerate(names):
        is_plain = (
            name == name.strip(" .") and name.isprintable() and not set(name) & set('/\\:*?"<>|')
        )
        is_free = name.casefold().split(".")[0] not in RESERVED
        if not (name and is_plain and is_free and len(name.encode()) <= 200):
            raise InputError(
                f"record {number} has the {kind} {name[:60]!r}: expected a plain file name of at most "
                "200 bytes"
            )


def _dpg_names(records: Sequence[Any]) -> list[str]:
    return [str(record.get("id", f"{number:05d}")) for number, record in enumerate(records)]


def _geneval(source: Source, records: Sequence[Any], place: Path, per_prompt: int) -> None:
    for number, record in enumerate(records):
        own = place / f"{number:05d}"
        (own / "samples").mkdir(parents=True)
        (own / "metadata.jsonl").write_text(json.dumps(record) + "\n")
        images = source.read(number * per_prompt, (number + 1) * per_prompt)
        for k, image in enumerate(images):
            (own / "samples" / f"{k:04d}.png").write_bytes(_encode(image))


def _hpsv2(source: Source, records: Sequence[Any], place: Path, per_prompt: int) -> None:
    counts: dict[str, int] = {}
    for number, record in enumerate(records):
        style = str(record["style"])
        within = counts.get(style, 0)
        counts[style] = within + 1
        (place / style).mkdir(exist_ok=True)
        data = _encode(source.read(number, number + 1)[0], "jpg")
        (place / style / f"{within:05d}.jpg").write_bytes(data)


def _dpg(source: Source, records: Sequence[Any], place: Path, per_prompt: int) -> None:
    for number, name in enumerate(_dpg_names(records)):
        four = source.read(number * 4, number * 4 + 4)
        height, width = four.shape[-2:]
        grid = four.view(2, 2, 3, height, width).permute(2, 0, 3, 1, 4)
        (place / f"{name}.png").write_bytes(_encode(grid.reshape(3, 2 * height, 2 * width)))
