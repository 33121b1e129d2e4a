"""How `var-fashion` and `var-fashion-small` are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..models.var.tokenizer import VARTokenizer
from ..models.var.transformer import VARTransformer
from .data import CLASS_NAMES
from .llamagen_tokenizer import encode_all
from .loop import FitConfig
from .stages import Recipe, Stage, Work
from .var import VARClassObjective, VARTokenizerObjective

SCALES = (1, 2, 3, 4, 6, 8)


@dataclass(frozen=True, kw_only=True)
class VARTokenizerStage(Stage[Work]):
    """The multi-scale image tokenizer.

    Attributes:
        sizes: arguments of `VARTokenizer`.
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
            "patch_nums": SCALES,
            "ch": 32,
            "ch_mult": (1, 1, 1),
            "z_channels": 8,
            "codebook_size": 512,
        }
    )

    def objective(self, work: Work) -> VARTokenizerObjective:
        """Reconstruction."""
        plain = min(150, self.fit.steps // 4)  # a short run needs its codebook before it ends
        tokenizer = VARTokenizer(**self.sizes)
        return VARTokenizerObjective(tokenizer, work.images, unquantised_steps=plain)

    def finish(self, work: Work, objective: VARTokenizerObjective) -> None:
        """The tokenizer, and the images as tokens."""
        work.parts["tokenizer"] = objective.tokenizer
        work.codes = encode_all(objective.tokenizer, work.images)


@dataclass(frozen=True, kw_only=True)
class VARTransformerStage(Stage[Work]):
    """The transformer.

    Attributes:
        sizes: arguments of `VARTransformer`.
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
            "patch_nums": SCALES,
            "codebook_size": 512,
            "z_channels": 8,
            "hidden_size": 192,
            "num_layers": 5,
            "num_heads": 3,
            "shared_aln": True,
        }
    )

    def objective(self, work: Work) -> VARClassObjective:
        """Tokens of every scale behind the coarser ones."""
        transformer = VARTransformer(num_classes=work.num_classes, **self.sizes)
        return VARClassObjective(transformer, work.parts["tokenizer"], work.codes, work.labels)

    def finish(self, work: Work, objective: VARClassObjective) -> None:
        """The transformer."""
        work.parts["transformer"] = objective.transformer


VAR_RECIPES: dict[str, Recipe] = {
    "var-fashion": Recipe(
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
        stages=[VARTokenizerStage(), VARTransformerStage()],
    ),
    "var-fashion-small": Recipe(
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
        stages=[
            VARTokenizerStage(),
            VARTransformerStage(
                name="small",
                fit=FitConfig(
                    steps=2500,
                    batch_size=32,
                    learning_rate=2e-3,
                    mixed_precision="bf16",
                    log_every=50,
                ),
                sizes={
                    "patch_nums": SCALES,
                    "codebook_size": 512,
                    "z_channels": 8,
                    "hidden_size": 96,
                    "num_layers": 3,
                    "num_heads": 3,
                    "shared_aln": True,
                },
            ),
        ],
    ),
}
