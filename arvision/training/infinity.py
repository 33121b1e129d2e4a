"""Training objectives of Infinity: its bitwise tokenizer, and its transformer on captioned pictures."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..models.infinity.bits import BitPyramid
from ..models.infinity.tokenizer import InfinityTokenizer
from ..models.infinity.transformer import InfinityTransformer
from .data import pixel_loss, to_pixels
from .loop import Chance, Objective


class BitTokenizerObjective(Objective):
    """Reconstruction through residual bits of every scale, with straight-through gradients.

    Args:
        tokenizer: the model to train.
        images: [M, H, W] uint8.
        commitment: weight of the distance between features and the canvas after each scale.

    Paper: Han et al., "Infinity", 2024, section 3 (bitwise visual tokenizer), without its
    adversarial and entropy terms.
    """

    def __init__(
        self, tokenizer: InfinityTokenizer, images: Tensor, commitment: float = 0.25
    ) -> None:
        super().__init__()
        self.tokenizer, self.images, self.commitment = tokenizer, images, commitment
        self.num_items = len(images)

    def inputs(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Pictures."""
        return {"images": self.images[indices]}

    def loss(self, inputs: dict[str, Tensor], chance: Chance) -> dict[str, Tensor]:
        """Loss and PSNR in dB."""
        pixels = to_pixels(inputs["images"])
        features = self.tokenizer.features(pixels).float()
        canvas, distance = self._canvas(features)
        out = self.tokenizer.paint(features + (canvas - features).detach()).float()
        loss, error = pixel_loss(out, pixels, inputs["images"])
        loss = loss + self.commitment * distance
        return {"loss": loss, "psnr": 10 * torch.log10(4.0 / error.detach())}

    def _canvas(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The finished canvas, and the mean over scales of its distance to the features."""
        pyramid, still = self.tokenizer.pyramid, features.detach()
        bits = pyramid.encode(still)
        canvas = torch.zeros_like(still)
        distance = features.new_zeros(())
        for scale, part in enumerate(bits.split(pyramid.counts, dim=1)):
            canvas = pyramid.paint(canvas, part, scale)
            distance = distance + F.mse_loss(features, canvas)
        return canvas, distance / len(pyramid.scales)


def corrected_bits(
    pyramid: BitPyramid, features: Tensor, rate: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Bits to predict and what is fed on the way, with bits flipped as a sampler might err.

    At each scale a share of the bits, uniform up to `rate`, enters the canvas flipped; finer scales
    code what is then left over, so that the model learns to correct itself.

    Args:
        pyramid: of the tokenizer.
        features: [B, D, H, W].
        rate: largest share of flipped bits.
        generator: of the flips.

    Returns:
        Bits [B, L, d] float and views [B, L - n_0, d].

    Paper: Han et al., "Infinity", 2024, section 3 (bitwise self-correction).
    """
    canvas, labels, views = torch.zeros_like(features), [], []
    for scale in range(len(pyramid.scales)):
        if scale:
            views.append(pyramid.view(canvas, scale))
        seen = F.interpolate(features - canvas, size=pyramid.latent_size(scale), mode="area")
        bits = pyramid.fold((seen > 0).to(features.dtype))
        share = rate * torch.rand(len(bits), 1, 1, generator=generator)
        flips = torch.rand(bits.shape, generator=generator) < share
        canvas = pyramid.paint(canvas, torch.where(flips, 1 - bits, bits), scale)
        labels.append(bits)
    return torch.cat(labels, dim=1), torch.cat(views, dim=1)


class BitCaptionObjective(Objective):
    """Cross-entropy of every bit given a caption and all coarser scales; trains the text encoder too.

    Args:
        transformer: the model to train.
        pyramid: of the tokenizer.
        features: [M, D, H, W] of the training images, before they become bits.
        write_caption: (index of an image, generator) to a caption.
        text_encoder: T5-style encoder.
        text_tokenizer: of the encoder.
        condition_dropout: share of samples trained with the null text, for guidance.
        flip_rate: largest share of flipped bits, see `corrected_bits`.
    """

    def __init__(
        self,
        transformer: InfinityTransformer,
        pyramid: BitPyramid,
        features: Tensor,
        write_caption: Any,
        text_encoder: nn.Module,
        text_tokenizer: Any,
        condition_dropout: float = 0.1,
        flip_rate: float = 0.3,
    ) -> None:
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder
        self.pyramid, self.image_features = pyramid, features
        self.write_caption, self.text_tokenizer = write_caption, text_tokenizer
        self.condition_dropout, self.flip_rate = condition_dropout, flip_rate
        self.num_items = len(features)

    def inputs(self, indices: Tensor, generator: torch.Generator) -> dict[str, Any]:
        """Bits and what is fed on the way, ids and mask of captions, and which are the null text."""
        features = self.image_features[indices].float()
        bits, views = corrected_bits(self.pyramid, features, self.flip_rate, generator)
        captions = [self.write_caption(index, generator) for index in indices.tolist()]
        words = self.text_tokenizer(captions, padding=True, return_tensors="pt")
        null = torch.rand(len(captions), generator=generator) < self.condition_dropout
        return {"bits": bits, "views": views, "words": dict(words), "null": null}

    def loss(self, inputs: dict[str, Any], chance: Chance) -> dict[str, Tensor]:
        """Mean loss in nats per bit, and that of the finest scale."""
        bits, views = inputs["bits"], inputs["views"]
        texts = self._texts(inputs["words"], inputs["null"])
        with sdpa_kernel(SDPBackend.MATH):
            logits = self.transformer.teacher_forced(texts, views)
        losses = F.binary_cross_entropy_with_logits(
            logits[..., 1] - logits[..., 0], bits, reduction="none"
        )
        finest = losses[:, -self.pyramid.counts[-1] :]
        return {"loss": losses.mean(), "finest": finest.mean()}

    def _texts(self, words: dict[str, Tensor], null: Tensor) -> list[Tensor]:
        """Features [T_i, C] of captions, or null rows in their place."""
        found = self.text_encoder(**words).last_hidden_state
        lengths = words["attention_mask"].sum(1).tolist()
        table = self.transformer.cfg_uncond
        return [
            table[:length] if dropped else rows[:length]
            for rows, length, dropped in zip(found, lengths, null.tolist(), strict=True)
        ]
