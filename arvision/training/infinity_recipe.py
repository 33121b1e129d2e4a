"""How `infinity-fashion` is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..models.infinity.tokenizer import InfinityTokenizer
from ..models.infinity.transformer import InfinityTransformer
from .captions import CaptionWriter, measure
from .data import to_pixels
from .infinity import BitCaptionObjective, BitTokenizerObjective
from .llamagen_text import build_text_encoder, build_text_tokenizer
from .loop import FitConfig
from .stages import Recipe, Stage, Work

SCALES = tuple((side, side) for side in (1, 2, 3, 4, 6, 8))
BITS = 12
TEXT_WIDTH = 64


@dataclass(frozen=True, kw_only=True)
class BitTokenizerStage(Stage[Work]):
    """The bitwise image tokenizer.

    Attributes:
        sizes: arguments of `InfinityTokenizer`.
    """

    name: str = "tokenizer"
    fit: FitConfig = FitConfig(
        steps=2400,
        batch_size=32,
        learning_rate=2e-3,
        weight_decay=1e-4,
        betas=(0.9, 0.99),
        mixed_precision="bf16",
        log_every=100,
    )
    sizes: Mapping[str, Any] = field(
        default_factory=lambda: {
            "scale_schedule": SCALES,
            "ch": 32,
            "ch_mult": (1, 1, 1),
            "z_channels": BITS,
        }
    )

    def objective(self, work: Work) -> BitTokenizerObjective:
        """Reconstruction."""
        return BitTokenizerObjective(InfinityTokenizer(**self.sizes), work.images)

    @torch.no_grad()
    def finish(self, work: Work, objective: BitTokenizerObjective) -> None:
        """The tokenizer, and the images' features before they become bits."""
        tokenizer = objective.tokenizer.eval()
        work.parts["tokenizer"] = tokenizer
        parts = work.images.split(500)
        work.codes = torch.cat([tokenizer.features(to_pixels(part)).half() for part in parts])


@dataclass(frozen=True, kw_only=True)
class BitCaptionStage(Stage[Work]):
    """The transformer and its text encoder.

    Attributes:
        sizes: arguments of `InfinityTransformer`.
    """

    name: str = "transformer"
    fit: FitConfig = FitConfig(
        steps=3400,
        batch_size=32,
        learning_rate=1.2e-3,
        mixed_precision="bf16",
        log_every=50,
    )
    sizes: Mapping[str, Any] = field(
        default_factory=lambda: {
            "scale_schedule": SCALES,
            "rope_grid": SCALES[-1],
            "num_bits": BITS,
            "hidden_size": 192,
            "num_layers": 4,
            "num_heads": 3,
            "num_chunks": 1,
            "text_dim": TEXT_WIDTH,
            "text_length": 12,
            "pool_heads": 4,
            "max_scales": len(SCALES),
        }
    )

    def objective(self, work: Work) -> BitCaptionObjective:
        """Bits of every scale behind captions and the coarser ones."""
        words = build_text_tokenizer()
        return BitCaptionObjective(
            InfinityTransformer(**self.sizes),
            work.parts["tokenizer"].pyramid,
            work.codes,
            CaptionWriter(measure(work.images, work.labels)),
            build_text_encoder(len(words), TEXT_WIDTH, self.fit.seed),
            words,
        )

    def finish(self, work: Work, objective: BitCaptionObjective) -> None:
        """The transformer and the text parts."""
        work.parts["transformer"] = objective.transformer
        work.parts["text_encoder"] = objective.text_encoder
        work.parts["text_tokenizer"] = objective.text_tokenizer


INFINITY_RECIPES: dict[str, Recipe] = {
    "infinity-fashion": Recipe(
        card={
            "kind": "scale",
            "conditions": "text",
            "summary": "Text-conditional Infinity on Fashion-MNIST, 32x32 pixels in six scales of bits",
        },
        settings={"guidance_scale": 3.0, "num_threads": 1},
        stages=[BitTokenizerStage(), BitCaptionStage()],
    ),
}
