"""The project's Fashion-MNIST classifier as an extractor."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ...files import user_path
from ..classifier import ASSET, load_classifier
from ..features import EXTRACTORS, Extractor, ExtractorFacts, file_sha256, resize


@EXTRACTORS.register("fashion-classifier")
class FashionFeatures(Extractor):
    """128 penultimate activations and 10 logits; not FID.

    Args:
        weights: folder with another classifier; None takes the embedded one.
    """

    def __init__(self, weights: str | Path | None = None) -> None:
        folder = ASSET if weights is None else user_path(weights)
        classifier = load_classifier(folder)
        super().__init__(
            ExtractorFacts(
                "fashion-classifier",
                classifier.hidden.out_features,
                "bicubic-aa-32 luma x/127.5-1",
                file_sha256(folder / "model.safetensors"),
                "Apache-2.0",
                outputs=("features", "logits"),
            )
        )
        self.classifier = classifier
        self.eval().requires_grad_(False)

    def compute(self, images: Tensor) -> dict[str, Tensor]:
        """Features and logits of images of any size (resized to 32x32)."""
        features = self.classifier.features(resize(images, 32).to(images.dtype))
        return {"features": features, "logits": self.classifier.head(features)}
