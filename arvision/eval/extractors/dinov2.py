"""DINOv2 through timm, for FD-DINOv2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, InputError, optional
from ..features import EXTRACTORS, Extractor, ExtractorFacts, file_sha256, resize, safe_load

ARCHITECTURE = "vit_large_patch14_dinov2.lvd142m"
SIDE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@EXTRACTORS.register("dinov2-vitl14")
class DINOv2(Extractor):
    """Class-token features of DINOv2 at 224x224.

    Antialiased bicubic on whole grey levels as dgm-eval does it on PIL images. timm's default
    size of 518 and torch-fidelity's TensorFlow-1 bilinear give other numbers.

    Args:
        weights: local file in timm's layout (`.pth` or `.safetensors`).
        download: fetch timm's weights; never done unasked.
        architecture: timm name; another one is labelled with its own name.

    Paper: Stein et al. 2023, "Exposing flaws of generative model evaluation metrics", section 3.
    """

    mean: Tensor
    std: Tensor
    network: Any

    def __init__(
        self,
        weights: str | Path | None = None,
        download: bool = False,
        architecture: str = ARCHITECTURE,
    ) -> None:
        if weights is None and not download:
            raise InputError(
                "extractor dinov2-vitl14 has no weights: give weights=PATH in timm's layout, "
                f"or download=True to fetch {architecture}"
            )
        with optional("eval", "extractor dinov2-vitl14"):
            import timm
        network: Any = timm.create_model(
            architecture, pretrained=weights is None, num_classes=0, img_size=SIDE
        )
        digest = None
        if weights is not None:
            digest = file_sha256(weights)
            _load(network, safe_load(weights), weights)
        name = "dinov2-vitl14" if architecture == ARCHITECTURE else f"dinov2:{architecture}"
        width = int(network.num_features)
        preprocess = f"bicubic-aa-{SIDE} imagenet-mean-std"
        super().__init__(ExtractorFacts(name, width, preprocess, digest, "Apache-2.0"))
        self.network = network
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def compute(self, images: Tensor) -> dict[str, Tensor]:
        """The pooled class token."""
        pixels = resize(images, SIDE) / 255.0
        return {"features": self.network((pixels - self.mean) / self.std)}


def _load(network: Any, state: dict[str, Tensor], source: object) -> None:
    """Strict load, with timm's own resampling of the position table to 224x224."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    try:
        network.load_state_dict(checkpoint_filter_fn(state, network))
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{source} does not fit the network: {reason}") from error
