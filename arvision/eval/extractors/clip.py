"""CLIP through transformers: image features, and text features for the CLIP score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, InputError
from ...files import user_path
from ..features import EXTRACTORS, Extractor, ExtractorFacts, resize

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@EXTRACTORS.register("clip")
class CLIP(Extractor):
    """Unit-length image features, and `text_features` for captions.

    Images are brought to the network's size by antialiased bicubic of the short side and a centre
    crop. transformers 5 wraps features in an output object, which is unwrapped here.

    Args:
        weights: local folder with a transformers CLIP model and tokenizer, or, with `download`, a
            hub id such as "openai/clip-vit-base-patch32".
        download: allow the hub; never done unasked.
        network: a `CLIPModel` that is in memory already.
        tokenizer: its tokenizer.
    """

    mean: Tensor
    std: Tensor
    network: Any
    tokenizer: Any

    def __init__(
        self,
        weights: str | Path | None = None,
        download: bool = False,
        network: Any = None,
        tokenizer: Any = None,
    ) -> None:
        name = str(weights) if weights is not None else "in-memory"
        if network is None:
            network, tokenizer = _load(weights, download)
        width, side = network.config.projection_dim, network.config.vision_config.image_size
        label = f"clip:{Path(name).name if user_path(name).exists() else name}"
        preprocess = f"bicubic-aa-{side} centre-crop clip-mean-std"
        super().__init__(ExtractorFacts(label, width, preprocess, None, "see the model"))
        self.network, self.tokenizer, self.side = network, tokenizer, side
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def compute(self, images: Tensor) -> dict[str, Tensor]:
        """Unit-length image features."""
        short = min(images.shape[-2:])
        top, left = (images.shape[-2] - short) // 2, (images.shape[-1] - short) // 2
        square = images[..., top : top + short, left : left + short]
        pixels = (resize(square, self.side) / 255.0 - self.mean) / self.std
        return {"features": _unit(self.network.get_image_features(pixel_values=pixels))}

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Unit-length features [B, D] of captions, cut so that the end token stays."""
        with torch.inference_mode():
            tokens = self.tokenizer(
                list(texts),
                padding=True,
                truncation=True,
                max_length=self.network.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(self.device)
            found = self.network.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            )
            return _unit(found)


def _unit(found: Any) -> Tensor:
    """Features as a unit-length float32 tensor, whether wrapped (transformers 5) or not."""
    tensor = found if isinstance(found, Tensor) else found.pooler_output
    return torch.nn.functional.normalize(tensor.float(), dim=-1)


def _load(weights: str | Path | None, download: bool) -> tuple[Any, Any]:
    if weights is None or not (download or user_path(weights).is_dir()):
        raise InputError(
            f"extractor clip has no weights at {weights}: give weights=FOLDER, or a hub id such as "
            "openai/clip-vit-base-patch32 with download=True"
        )
    from transformers import AutoTokenizer, CLIPModel  # seconds of imports, for CLIP alone

    local = not download
    try:
        network = CLIPModel.from_pretrained(weights, local_files_only=local)
        tokenizer = AutoTokenizer.from_pretrained(weights, local_files_only=local)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise CheckpointError(f"{weights}: no CLIP model with a tokenizer ({reason})") from error
    return network, tokenizer
