"""Fashion-MNIST, padded to 32x32, from a folder or from the Debian package.

Data: Xiao, Rasul and Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine
Learning Algorithms", 2017; MIT licence.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..files import regular_file, user_path

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
MAX_BYTES = 2**28
"""Bytes that one file may hold when inflated; the data set's largest has 47 million."""
FOLDER_VARIABLE = "ARVISION_FASHION_MNIST"
FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
CLASS_NAMES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def fashion_folder() -> Path:
    """Folder of the data set: what `ARVISION_FASHION_MNIST` names, else the Debian package's.

    Work that needs the data set asks here first, so that it fails before it has begun.

    Raises:
        InputError: neither is there, or files are missing.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    folder = user_path(named) if named else DEBIAN_FOLDER
    missing = [file for pair in FILES.values() for file in pair if not (folder / file).is_file()]
    if missing and named:
        raise InputError(
            f"Fashion-MNIST folder {named} has no {', '.join(missing)}: expected the data set's "
            "four .gz files"
        )
    if missing:
        raise InputError(
            "Fashion-MNIST is not on this machine: `apt-get install dataset-fashion-mnist`, or "
            "name a folder of its four .gz files (github.com/zalandoresearch/fashion-mnist) with "
            f"--fashion-mnist or {FOLDER_VARIABLE}"
        )
    return folder


def _read_idx(path: Path) -> np.ndarray:
    """Read one gzipped IDX file of unsigned bytes, of the size that its header says.

    Raises:
        InputError: no regular file, cut off, longer than its header says, or larger than `MAX_BYTES`.
    """
    try:
        with regular_file(path) as packed, gzip.GzipFile(fileobj=packed) as file:
            start = file.read(4)
            if start[:3] != b"\0\0\x08" or len(start) < 4:
                raise ValueError("no header of unsigned bytes")
            sides = file.read(4 * start[3])
            shape = tuple(np.frombuffer(sides, ">i4", start[3]).tolist())
            size = math.prod(shape)
            if min(shape, default=0) < 1 or size > MAX_BYTES:
                raise ValueError(f"{list(shape)}, {MAX_BYTES:,} bytes at most")
            data = file.read(size + 1)  # and its check sum, which is looked at behind the last byte
        if len(data) != size:
            raise ValueError(f"{len(data):,} bytes or more for {list(shape)}")
        return np.frombuffer(data, np.uint8).reshape(shape)
    except InputError:
        raise
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"{path}: expected a whole gzipped IDX file ({error})") from error


def load_fashion(split: str) -> tuple[Tensor, Tensor]:
    """Images and labels of Fashion-MNIST, from `fashion_folder()`.

    Args:
        split: "train" (60,000 images) or "test" (10,000).

    Returns:
        Images [M, 32, 32] uint8 (28x28 with 2 black pixels on each side), labels [M] int64.

    Raises:
        InputError: an unknown split, or no data set.
    """
    if split not in FILES:
        raise InputError(f"unknown split {split!r}: expected 'train' or 'test'")
    folder = fashion_folder()
    images, labels = (torch.from_numpy(_read_idx(folder / file).copy()) for file in FILES[split])
    return torch.nn.functional.pad(images, (2, 2, 2, 2)), labels.long()


def to_pixels(images: Tensor) -> Tensor:
    """Grey images [M, H, W] or coloured ones [M, 3, H, W], uint8, to pixels [M, 3, H, W] in [-1, 1]."""
    pixels = images.float() / 127.5 - 1.0
    return pixels if pixels.dim() == 4 else pixels.unsqueeze(1).expand(-1, 3, -1, -1)


def in_batches(images: Tensor) -> Iterable[Tensor]:
    """Images [M, ...] in parts, each of as many pixels as 500 images of 32 x 32 have."""
    return images.split(max(1, 500 * 1024 // (images.shape[-2] * images.shape[-1])))


COLOUR_WEIGHT = 4.0
"""Of the error in what three channels differ by, which is learnt last: an autoencoder of coloured shapes
is grey after 300 steps with the plain error (19.3 dB), and no longer with weight 3 (20.9 dB)."""


def pixel_loss(out: Tensor, pixels: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of a reconstruction, and its mean squared error.

    Args:
        out: [B, 3, H, W], float32.
        pixels: likewise, the goal.
        images: what they were made of, see `to_pixels`; only coloured ones are weighed by colour.
    """
    error = F.mse_loss(out, pixels)
    loss = error + 0.2 * F.l1_loss(out, pixels)
    if images.dim() == 4:
        gap = out - pixels
        loss = loss + COLOUR_WEIGHT * (gap - gap.mean(1, keepdim=True)).square().mean()
    return loss, error
