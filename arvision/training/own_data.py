"""A person's own pictures: read once from a folder, kept beside the training as bytes of one size."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import InputError, check_count
from ..eval.picture_sources import FolderSource, natural_key
from ..eval.pictures import as_seen
from ..files import making_folder, user_path
from ..prompt_files import read_captions

MOST_SIDE = 512
"""Pixels of a side, beyond which training on a person's own pictures is not a matter of hours."""

HELD_OUT, MOST_HELD_OUT = 0.1, 500
"""Share of the pictures that is never trained on, and how many at most."""

WORK = "work"
"""The folder of what a run needs to go on."""

FACTS = "pictures.json"
"""The file beside the packed pictures: labels, captions, and what they were read for."""

NO_CLASS = "picture"
"""The one class of pictures without classes."""


class OwnSource(FolderSource):
    """Pictures of a folder as viewers show them, each cropped to the square in its middle.

    Args:
        folder: searched with its subfolders; JPEG is as good as any other format.
        side: pixels of the square.

    Raises:
        InputError: no pictures, or one that cannot be opened.
    """

    rgb = staticmethod(as_seen)

    def __init__(self, folder: str | Path, side: int) -> None:
        super().__init__(folder, allow_jpeg=True, crop=side)

    def _look(self, picture: Image.Image, file: Any, where: str, allow_jpeg: bool) -> None:
        """Whatever can be opened can be learnt from."""


@dataclass(frozen=True)
class OwnPictures:
    """What is trained on, and behind it what is held out.

    Attributes:
        images: [M, 3, S, S] uint8, in an order that the seed has drawn; the last are held out.
        labels: [M] int64, classes.
        class_names: in the order of their ids; None where pictures have captions.
        captions: of each picture; None where they have classes.
        num_train: pictures that are trained on.
    """

    images: Tensor
    labels: Tensor
    class_names: list[str] | None
    captions: list[list[str]] | None
    num_train: int

    @property
    def held_out(self) -> Tensor:
        """Numbers of the pictures that are held out."""
        return torch.arange(self.num_train, len(self.images))


def check_run(out: Path, asked: dict[str, Any]) -> bool:
    """Whether the run that `asked` describes starts anew in a folder.

    Raises:
        InputError: the folder holds another run, or something else.
    """
    packed = out / WORK / "pictures"
    if not packed.exists():
        for folder, own in ((out, WORK), (out / WORK, None)):
            found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
            for name in found:
                if name != own and not name.startswith("."):
                    raise InputError(
                        f"out {out} holds {name} and no run: expected a new or empty folder, or that "
                        "of a run to go on with"
                    )
        return True
    try:
        before = json.loads((packed / FACTS).read_text())["run"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{packed / FACTS} cannot be read ({error}): expected another folder"
        ) from error
    for name in [*asked, *before]:
        old, new = before.get(name), asked.get(name)
        if old != new:
            raise InputError(
                f"out {out} holds a run with {name} {old}, not {new}: expected another folder, or "
                "the settings of that run"
            )
    return False


def open_pictures(place: Path) -> OwnPictures:
    """What `pack_pictures` wrote."""
    facts = json.loads((place / FACTS).read_text())
    # Read from the disk as needed, and never written to.
    array = np.load(place / "pictures.npy", mmap_mode="c")
    labels = torch.tensor(facts["labels"], dtype=torch.int64)
    return OwnPictures(
        torch.from_numpy(array), labels, facts["class_names"], facts["captions"], facts["num_train"]
    )


def pack_pictures(
    folder: str | Path,
    side: int,
    place: Path,
    run: Mapping[str, Any],
    *,
    captions: str | Path | None = None,
    is_unconditional: bool = False,
    seed: int = 0,
    most_side: int = MOST_SIDE,
    progress: bool = True,
) -> None:
    """Read the pictures of a folder and write them, cropped, into `place`.

    Args:
        folder: pictures, or a subfolder of pictures for each class.
        side: pixels of the squares that they become.
        place: folder to write, which appears whole or not at all.
        run: what they are read for; kept beside them under "run".
        captions: file of captions, see `arvision.prompt_files.read_captions`; pictures without one
            are left out.
        is_unconditional: whether subfolders are no classes.
        seed: of the order.
        most_side: what `side` may be.
        progress: show a bar on stderr.

    Raises:
        InputError: no pictures or a single one, one that cannot be read, pictures beside subfolders
            of classes, or a caption of a picture that is not there.
    """
    path = user_path(folder)
    if not path.is_dir():
        raise InputError(f"data {folder}: expected a folder of pictures")
    check_count("size", side, most_side)
    source = OwnSource(path, side)
    names = [entry.inside for entry in source.entries]
    kept: Sequence[int] = range(len(names))
    texts = None
    if captions is not None:
        texts = _texts_of(names, captions, path)
        kept = [index for index, own in enumerate(texts) if own]
    if len(kept) < 2:
        raise InputError(f"{folder}: 1 picture, expected at least 2, of which one is held out")
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [kept[index] for index in order]
    num_held = max(1, min(MOST_HELD_OUT, round(HELD_OUT * len(chosen))))
    facts: dict[str, Any] = {"num_train": len(chosen) - num_held, "class_names": None}
    facts |= {"run": dict(run), "captions": None, "labels": [0] * len(chosen)}
    if texts is not None:
        facts["captions"] = [texts[index] for index in chosen]
    else:
        labels, facts["class_names"] = _classes_of(names, path, is_unconditional)
        facts["labels"] = [labels[index] for index in chosen]
    with making_folder(place, durable=True) as made:
        shape = (len(chosen), 3, side, side)
        array = np.lib.format.open_memmap(
            made / "pictures.npy", mode="w+", dtype=np.uint8, shape=shape
        )
        bar = tqdm(chosen, disable=not progress, desc="pictures", leave=False)
        for row, index in enumerate(bar):
            array[row] = source.read(index, index + 1)[0].numpy()
        array.flush()
        (made / FACTS).write_text(json.dumps(facts))


def _classes_of(
    names: Sequence[str], folder: Path, is_unconditional: bool
) -> tuple[list[int], list[str]]:
    """The class of each picture, and the names of the classes.

    Raises:
        InputError: some pictures lie in subfolders and others do not.
    """
    tops = [name.split("/")[0] if "/" in name else "" for name in names]
    if is_unconditional or not any(tops):
        return [0] * len(names), [NO_CLASS]
    if not all(tops):
        beside = names[tops.index("")]
        raise InputError(
            f"{folder}: {beside} lies beside subfolders: expected all pictures in subfolders, whose "
            "names are the classes, or unconditional training"
        )
    classes = sorted(set(tops), key=natural_key)
    number = {name: index for index, name in enumerate(classes)}
    return [number[top] for top in tops], classes


def _texts_of(names: Sequence[str], captions: str | Path, folder: Path) -> list[list[str]]:
    """The captions of each picture.

    Raises:
        InputError: a caption of a picture that is not in the folder.
    """
    found: dict[str, list[str]] = {name: [] for name in names}
    missing: Counter[str] = Counter()
    for record in read_captions(captions):
        name = Path(record["file"].strip()).as_posix()
        if name in found:
            found[name].append(record["text"].strip())
        else:
            missing[name] += 1
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"{captions} names {next(iter(missing))}{more}: no such picture in {folder}"
        )
    return list(found.values())
