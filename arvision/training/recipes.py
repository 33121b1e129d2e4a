"""How the embedded models are made: named recipes, see `arvision.training.stages`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..models.llamagen.tokenizer import LlamaGenTokenizer
from ..models.llamagen.transformer import LlamaGenTransformer
from .captions import CaptionWriter, measure
from .data import CLASS_NAMES
from .infinity_recipe import INFINITY_RECIPES
from .llamagen_text import build_text_encoder, build_text_tokenizer
from .llamagen_tokenizer import TokenizerObjective, encode_all
from .llamagen_transformer import CaptionObjective, ClassObjective, ConsistencyObjective
from .loop import FitConfig
from .mar_recipe import MAR_RECIPES
from .stages import Recipe, Stage, Work
from .var_recipe import VAR_RECIPES

GUIDANCE_SCALE = 3.0

TRANSFORMER_SIZES: Mapping[str, Any] = {
    "vocab_size": 512,
    "grid": (8, 8),
    "hidden_size": 256,
    "num_layers": 5,
    "num_heads": 4,
    "intermediate_size": 432,
}


@dataclass(frozen=True, kw_only=True)
class TokenizerStage(Stage[Work]):
    """The image tokenizer.

    Attributes:
        sizes: arguments of `LlamaGenTokenizer`.
    """

    name: str = "tokenizer"
    fit: FitConfig = FitConfig(
        steps=4500,
        batch_size=32,
        learning_rate=2e-3,
        weight_decay=1e-4,
        betas=(0.9, 0.99),
        mixed_precision="bf16",
        log_every=100,
    )
    sizes: Mapping[str, Any] = field(
        default_factory=lambda: {
            "ch": 32,
            "ch_mult": (1, 1, 1),
            "z_channels": 32,
            "codebook_size": 512,
            "code_dim": 8,
            "num_recorded": 0,
        }
    )

    def objective(self, work: Work) -> TokenizerObjective:
        """Reconstruction."""
        # A short run needs its codebook before it ends.
        plain = min(150, self.fit.steps // 4)
        tokenizer = LlamaGenTokenizer(**self.sizes)
        return TokenizerObjective(tokenizer, work.images, unquantised_steps=plain)

    def finish(self, work: Work, objective: TokenizerObjective) -> None:
        """The tokenizer, and the images as tokens."""
        work.parts["tokenizer"] = objective.tokenizer
        work.codes = encode_all(objective.tokenizer, work.images)


class TransformerStage(Stage[Work]):
    """A stage that trains the transformer, and whatever stands beside it."""

    def finish(self, work: Work, objective: ClassObjective) -> None:
        """The transformer."""
        work.parts["transformer"] = objective.transformer
        work.last = objective


@dataclass(frozen=True, kw_only=True)
class ClassStage(TransformerStage):
    """The class-conditional transformer."""

    name: str = "transformer"
    fit: FitConfig = FitConfig(
        steps=6000,
        batch_size=64,
        learning_rate=1.2e-3,
        mixed_precision="bf16",
        log_every=50,
    )
    sizes: Mapping[str, Any] = field(default_factory=lambda: TRANSFORMER_SIZES)

    def objective(self, work: Work) -> ClassObjective:
        """Next tokens behind the true ones."""
        transformer = LlamaGenTransformer(num_classes=work.num_classes, **self.sizes)
        return ClassObjective(transformer, work.codes, work.labels)


@dataclass(frozen=True, kw_only=True)
class PolishStage(TransformerStage):
    """The same transformer again, with some context tokens of its own drawing.

    Attributes:
        context_noise: mean share of such tokens, see `ClassObjective`.
    """

    name: str = "polish"
    fit: FitConfig = FitConfig(
        steps=500,
        batch_size=64,
        learning_rate=4e-4,
        warmup=20,
        mixed_precision="bf16",
        log_every=50,
        seed=1,
    )
    context_noise: float = 0.2

    def objective(self, work: Work) -> ClassObjective:
        """Next tokens behind partly drawn ones."""
        transformer = work.parts["transformer"]
        return ClassObjective(
            transformer, work.codes, work.labels, context_noise=self.context_noise
        )


@dataclass(frozen=True, kw_only=True)
class CaptionStage(TransformerStage):
    """A text-conditional transformer that starts from the class-conditional one's weights."""

    name: str = "caption"
    fit: FitConfig = FitConfig(
        steps=2000,
        batch_size=64,
        learning_rate=6e-4,
        mixed_precision="bf16",
        log_every=50,
    )
    sizes: Mapping[str, Any] = field(default_factory=lambda: TRANSFORMER_SIZES)

    def objective(self, work: Work) -> CaptionObjective:
        """Next tokens behind captions; the text encoder is trained too."""
        transformer = LlamaGenTransformer(
            num_classes=None, caption_dim=64, caption_length=12, **self.sizes
        )
        start = work.parts["transformer"].state_dict()
        kept = {k: v for k, v in start.items() if not k.startswith("cls_embedding")}
        transformer.load_state_dict(kept, strict=False)
        text_tokenizer = build_text_tokenizer()
        text_encoder = build_text_encoder(len(text_tokenizer), 64, self.fit.seed)
        captions = CaptionWriter(measure(work.images, work.labels))
        return CaptionObjective(transformer, work.codes, captions, text_encoder, text_tokenizer)

    def finish(self, work: Work, objective: CaptionObjective) -> None:
        """The transformer and the text parts."""
        super().finish(work, objective)
        work.parts["text_encoder"] = objective.text_encoder
        work.parts["text_tokenizer"] = objective.text_tokenizer


@dataclass(frozen=True, kw_only=True)
class ConsistencyStage(Stage[Work]):
    """The last stage of a transformer: the same laws behind right and wrong tokens.

    Attributes:
        guidance_scale: at which the laws are compared, see `ConsistencyObjective`.
    """

    name: str = "consistency"
    fit: FitConfig = FitConfig(
        steps=600,
        batch_size=32,
        learning_rate=6e-4,
        warmup=20,
        mixed_precision="bf16",
        log_every=50,
        seed=1,
    )
    guidance_scale: float = GUIDANCE_SCALE

    def objective(self, work: Work) -> ConsistencyObjective:
        """Of the transformer as the stage before left it."""
        return ConsistencyObjective(work.last, self.guidance_scale)

    def finish(self, work: Work, objective: ConsistencyObjective) -> None:
        """Nothing is new: the transformer was trained where it stands."""


RECIPES: dict[str, Recipe] = {
    "llamagen-fashion": Recipe(
        card={
            "kind": "token",
            "conditions": "class",
            "summary": "Class-conditional LlamaGen on Fashion-MNIST, 32x32 pixels in 8x8 tokens",
        },
        stages=[TokenizerStage(), ClassStage(), PolishStage(), ConsistencyStage()],
        settings={
            "class_names": list(CLASS_NAMES),
            "guidance_scale": GUIDANCE_SCALE,
            "num_threads": 1,
            "draft": "llamagen-fashion-draft",
        },
    ),
    "llamagen-fashion-t2i": Recipe(
        card={
            "kind": "token",
            "conditions": "text",
            "summary": "Text-conditional LlamaGen on Fashion-MNIST, 32x32 pixels in 8x8 tokens",
        },
        stages=[TokenizerStage(), ClassStage(), CaptionStage()],
        settings={"guidance_scale": GUIDANCE_SCALE, "num_threads": 1},
    ),
}
RECIPES |= VAR_RECIPES | MAR_RECIPES | INFINITY_RECIPES
