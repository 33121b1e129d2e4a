"""A small Fashion-MNIST classifier that says whether a picture shows the class asked for."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from ..checkpoint import load_strictly, read_state_dict
from ..errors import CheckpointError, InputError
from ..files import user_path
from ..schema import Size, check_fields, read_json
from .pixels import check_images
from .score import Score

ASSET = Path(__file__).resolve().parent.parent / "assets" / "fashion-classifier"
LUMA = (0.299, 0.587, 0.114)


def _block(width_in: int, width_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False),
        nn.BatchNorm2d(width_out),
        nn.ReLU(inplace=True),
    )


class FashionClassifier(nn.Module):
    """Four convolutions and two linear layers on grey 32x32 images.

    Args:
        width: channels of the first convolution; the others are multiples of it.
        feature_dim: width of the penultimate layer, which `features` returns.
        num_classes: of the last layer.
    """

    def __init__(self, width: Size = 32, feature_dim: Size = 128, num_classes: Size = 10) -> None:
        super().__init__()
        self.config = {"width": width, "feature_dim": feature_dim, "num_classes": num_classes}
        self.convolutions = nn.Sequential(
            _block(1, width, 2),  # 16x16
            _block(width, 2 * width, 2),  # 8x8
            _block(2 * width, 3 * width, 1),
            nn.MaxPool2d(2),  # 4x4
            _block(3 * width, 3 * width, 1),
            nn.MaxPool2d(2),  # 2x2
        )
        self.hidden = nn.Linear(3 * width * 4, feature_dim)
        self.head = nn.Linear(feature_dim, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations [B, feature_dim] float32 of uint8 images [B, 1 or 3, 32, 32]."""
        return self.trunk(to_grey(images))

    def trunk(self, grey: Tensor) -> Tensor:
        """The same from grey pixels [B, 1, 32, 32], float in [-1, 1]."""
        return torch.relu(self.hidden(self.convolutions(grey).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Class logits [B, num_classes] of uint8 images [B, 1 or 3, 32, 32]."""
        return self.head(self.features(images))


def to_grey(images: Tensor) -> Tensor:
    """Bytes [B, 1 or 3, 32, 32] to grey float32 [B, 1, 32, 32] in [-1, 1].

    Raises:
        InputError: not bytes, or another size.
    """
    check_images(images)
    if images.shape[2:] != (32, 32):
        raise InputError(f"images are {images.shape[2]}x{images.shape[3]}: expected 32x32")
    pixels = images.float()
    if images.shape[1] == 3:
        luma = torch.tensor(LUMA, device=images.device).view(1, 3, 1, 1)
        pixels = (pixels * luma).sum(1, keepdim=True)
    return pixels / 127.5 - 1.0


def load_classifier(folder: str | Path | None = None) -> FashionClassifier:
    """The trained classifier, in float32 and evaluation mode.

    Args:
        folder: with `config.json` and `model.safetensors`; None takes the embedded one.

    Raises:
        CheckpointError: a file is missing or does not fit.
    """
    place = ASSET if folder is None else user_path(folder)
    try:
        config: Any = read_json(place / "config.json", 1 << 20)
        config = check_fields(config, ClassifierFile, str(place / "config.json"))
        sizes = check_fields(
            config["architecture"], FashionClassifier, str(place / "config.json"), only=True
        )
        weights = read_state_dict(place / "model.safetensors", ())
        model = load_strictly(FashionClassifier, sizes, weights, str(place / "model.safetensors"))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"no usable Fashion-MNIST classifier in {place}: {reason}") from error
    return model.requires_grad_(False)


class ClassifierFile(TypedDict):
    """What the classifier's `config.json` holds."""

    architecture: dict[str, int]


@lru_cache(maxsize=1)
def _embedded() -> FashionClassifier:
    return load_classifier()


@torch.inference_mode()
def classify(
    images: Tensor, batch_size: int = 500, model: FashionClassifier | None = None
) -> Tensor:
    """Class probabilities [B, 10] float32 of uint8 images [B, 1 or 3, 32, 32]."""
    network = _embedded() if model is None else model
    device = next(network.parameters()).device
    parts = [network(part.to(device)).softmax(-1).cpu() for part in images.split(batch_size)]
    return torch.cat(parts) if parts else torch.empty(0, 10)


def class_consistency(
    images: Tensor, labels: Tensor | list[int], model: FashionClassifier | None = None
) -> Score:
    """Share of images that the classifier puts into the class they were asked for.

    Args:
        images: uint8 [B, 1 or 3, 32, 32].
        labels: [B] class ids 0..9.
        model: None takes the embedded classifier.

    Returns:
        A `Score` in [0, 1] with Wilson's 95 % interval; `details["per_class"]` maps each class
        that occurs to its share, `details["confusion"]` is asked-by-seen counts (10 lists of 10).

    Raises:
        InputError: no images, or as many labels as images are not given.
    """
    wanted = torch.as_tensor(labels, dtype=torch.int64).cpu()
    if wanted.ndim != 1 or len(wanted) != len(images) or len(images) == 0:
        given = f"{len(images)} images and labels of shape {list(wanted.shape)}"
        raise InputError(f"{given}: expected one label per image and at least one image")
    if int(wanted.min()) < 0 or int(wanted.max()) > 9:
        raise InputError(f"labels span {int(wanted.min())}..{int(wanted.max())}: expected 0..9")
    seen = classify(images, model=model).argmax(-1)
    confusion = torch.bincount(wanted * 10 + seen, minlength=100).view(10, 10)
    counts, hits = confusion.sum(1), confusion.diagonal()
    per_class = {c: hits[c].item() / counts[c].item() for c in range(10) if counts[c] > 0}
    share, num_images = hits.sum().item() / len(wanted), len(wanted)
    return Score(
        share,
        num_images,
        wilson_interval(share, num_images),
        method="wilson",
        details={"per_class": per_class, "confusion": confusion.tolist()},
    )


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion. Paper: Wilson 1927."""
    z = 1.959963984540054
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    half = z * spread / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)
