"""Captions of the COCO-30k protocol."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from ..errors import InputError
from ..files import write_text
from ..schema import check_fields, read_json

MOST_BYTES = 1 << 28
"""Of the file of annotations; the published one has 33 million."""


class CocoImage(TypedDict):
    """A picture of the file of annotations."""

    id: int
    file_name: str


class CocoCaption(TypedDict):
    """A caption of a picture."""

    id: int
    image_id: int
    caption: str


class CocoFile(TypedDict):
    """The file of annotations, of which more is not read."""

    images: list[CocoImage]
    annotations: list[CocoCaption]


def choose_captions(
    annotations: str | Path, num: int = 30_000, seed: int = 0
) -> list[dict[str, Any]]:
    """One caption of each of `num` images of COCO 2014 val.

    The published lists were never agreed on, so the choice is by seed and its hash is recorded:
    images by a seeded permutation, and of each the caption with the lowest id.

    Args:
        annotations: `captions_val2014.json`.
        num: images.
        seed: of the permutation.

    Returns:
        Records with "prompt", "image_id", "file_name", in the order of the image ids.

    Raises:
        InputError: another file, or fewer images than `num`.
    """
    try:
        found: Any = check_fields(read_json(annotations, MOST_BYTES), CocoFile, str(annotations))
        names = {image["id"]: image["file_name"] for image in found["images"]}
        captions: dict[int, tuple[int, str]] = {}
        for entry in found["annotations"]:
            known = captions.get(entry["image_id"])
            if known is None or entry["id"] < known[0]:
                captions[entry["image_id"]] = (entry["id"], entry["caption"].strip())
    except (OSError, InputError) as error:
        raise InputError(f"{annotations}: expected COCO captions ({error})") from error
    ids = sorted(captions)
    if not 2 <= num <= len(ids):
        raise InputError(
            f"num is {num}: expected between 2 and the {len(ids)} images with captions"
        )
    chosen = np.random.default_rng(seed).permutation(len(ids))[:num]
    return [
        {"prompt": captions[i][1], "image_id": i, "file_name": names.get(i)}
        for i in sorted(ids[position] for position in chosen)
    ]


def write_captions(records: list[dict[str, Any]], path: str | Path) -> None:
    """Records as JSON lines, whole or not at all."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))
