"""How `var-fashion` and `var-fashion-small` are made."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.var.tokenizer import VARTokenizer
from ..models.var.transformer import VARTransformer
from .data import CLASS_NAMES, load_fashion
from .llamagen_tokenizer import encode_all
from .loop import FitConfig, fit, shortened
from .var import VARClassObjective, VARTokenizerObjective

SCALES = (1, 2, 3, 4, 6, 8)


@dataclass(frozen=True, kw_only=True)
class VARRecipe:
    """Multi-scale tokenizer, then transformer, on Fashion-MNIST.

    Attributes:
        tokenizer_sizes: arguments of `VARTokenizer`.
        transformer_sizes: arguments of `VARTransformer`.
        tokenizer_fit: settings of the tokenizer stage.
        transformer_fit: settings of the transformer stage.
        transformer_stage: its folder; recipes of one folder share the tokenizer.
        num_images: training images used.
        card: "kind", "conditions" and "summary" of the model.
        settings: recommended settings, arguments of the pipeline.
    """

    card: dict[str, str]
    settings: dict[str, Any]
    tokenizer_sizes: dict[str, Any] = field(
        default_factory=lambda: {
            "patch_nums": SCALES,
            "ch": 32,
            "ch_mult": (1, 1, 1),
            "z_channels": 8,
            "codebook_size": 512,
        }
    )
    transformer_sizes: dict[str, Any] = field(
        default_factory=lambda: {
            "patch_nums": SCALES,
            "codebook_size": 512,
            "z_channels": 8,
            "hidden_size": 192,
            "num_layers": 5,
            "num_heads": 3,
            "shared_aln": True,
        }
    )
    tokenizer_fit: FitConfig = FitConfig(
        steps=2400,
        batch_size=32,
        learning_rate=2e-3,
        weight_decay=1e-4,
        betas=(0.9, 0.99),
        mixed_precision="bf16",
        log_every=100,
    )
    transformer_fit: FitConfig = FitConfig(
        steps=3400,
        batch_size=32,
        learning_rate=1.2e-3,
        mixed_precision="bf16",
        log_every=50,
    )
    transformer_stage: str = "transformer"
    num_images: int = 60_000

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages, which are their folders."""
        return ("tokenizer", self.transformer_stage)

    def shortened(self, steps: int, num_images: int) -> VARRecipe:
        """The same recipe with at most `steps` steps per stage on `num_images` images."""
        return shortened(self, steps, num_images=num_images)

    def run(self, folder: Path, *, progress: bool = True) -> dict[str, Any]:
        """Train (or resume) both stages under `folder` and return the trained parts."""
        images, labels = (part[: self.num_images] for part in load_fashion("train"))
        tokenizer = self._tokenizer(images, folder, progress)
        tokens = encode_all(tokenizer, images)
        torch.manual_seed(self.transformer_fit.seed)
        transformer = VARTransformer(num_classes=len(CLASS_NAMES), **self.transformer_sizes)
        objective = VARClassObjective(transformer, tokenizer, tokens, labels)
        fit(objective, self.transformer_fit, folder / self.transformer_stage, progress=progress)
        return {"transformer": transformer.eval(), "tokenizer": tokenizer}

    def _tokenizer(self, images: Tensor, folder: Path, progress: bool) -> VARTokenizer:
        torch.manual_seed(self.tokenizer_fit.seed)
        tokenizer = VARTokenizer(**self.tokenizer_sizes)
        objective = VARTokenizerObjective(tokenizer, images)
        fit(objective, self.tokenizer_fit, folder / "tokenizer", progress=progress)
        return tokenizer.eval()


VAR_RECIPES: dict[str, VARRecipe] = {
    "var-fashion": VARRecipe(
        card={
            "kind": "scale",
            "conditions": "class",
            "summary": "Class-conditional VAR on Fashion-MNIST, 32x32 pixels in six scales up to 8x8",
        },
        settings={
            "class_names": list(CLASS_NAMES),
            "guidance_scale": 6.0,
            "top_p": 0.9,
            "num_threads": 1,
        },
    ),
    "var-fashion-small": VARRecipe(
        card={
            "kind": "scale",
            "conditions": "class",
            "summary": "VAR on Fashion-MNIST, a sixth of var-fashion's size, to finish what it drafts",
        },
        settings={
            "class_names": list(CLASS_NAMES),
            "guidance_scale": 6.0,
            "top_p": 0.9,
            "num_threads": 1,
            "draft": "var-fashion",
        },
        transformer_sizes={
            "patch_nums": SCALES,
            "codebook_size": 512,
            "z_channels": 8,
            "hidden_size": 96,
            "num_layers": 3,
            "num_heads": 3,
            "shared_aln": True,
        },
        transformer_fit=FitConfig(
            steps=2500,
            batch_size=32,
            learning_rate=2e-3,
            mixed_precision="bf16",
            log_every=50,
        ),
        transformer_stage="small",
    ),
}
