"""Fashion-MNIST, padded to 32x32, from the Debian package or through torchvision.

Data: Xiao, Rasul and Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine
Learning Algorithms", 2017; MIT licence.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
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


def _read_idx(path: Path) -> np.ndarray:
    """Read one gzipped IDX file of unsigned bytes."""
    raw = gzip.decompress(path.read_bytes())
    num_dims = raw[3]
    shape = np.frombuffer(raw, dtype=">i4", count=num_dims, offset=4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * num_dims).reshape(tuple(shape))


def load_fashion(split: str, download_to: str | Path = "out/data") -> tuple[Tensor, Tensor]:
    """Images and labels of Fashion-MNIST.

    The files of Debian's `dataset-fashion-mnist` are used where they are installed; otherwise
    torchvision downloads them.

    Args:
        split: "train" (60,000 images) or "test" (10,000).
        download_to: folder for torchvision's download.

    Returns:
        Images [M, 32, 32] uint8 (28x28 with 2 black pixels on each side), labels [M] int64.

    Raises:
        InputError: an unknown split.
    """
    if split not in ("train", "test"):
        raise InputError(f"unknown split {split!r}: expected 'train' or 'test'")
    prefix = "train" if split == "train" else "t10k"
    files = [DEBIAN_FOLDER / f"{prefix}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    if all(file.exists() for file in files):
        images, labels = (torch.from_numpy(_read_idx(file).copy()) for file in files)
    else:
        from torchvision.datasets import FashionMNIST

        data = FashionMNIST(str(download_to), train=split == "train", download=True)
        images, labels = data.data, data.targets
    return torch.nn.functional.pad(images, (2, 2, 2, 2)), labels.long()


def to_pixels(images: Tensor) -> Tensor:
    """Grey images [M, H, W] uint8 to pixels [M, 3, H, W] float32 in [-1, 1]."""
    return (images.float() / 127.5 - 1.0).unsqueeze(1).expand(-1, 3, -1, -1)
