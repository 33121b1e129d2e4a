"""How the embedded models are made: named recipes of stages, each resumable."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..models.llamagen.tokenizer import LlamaGenTokenizer
from ..models.llamagen.transformer import LlamaGenTransformer
from .captions import CaptionWriter, measure
from .data import CLASS_NAMES, load_fashion
from .llamagen_text import build_text_encoder, build_text_tokenizer
from .llamagen_tokenizer import TokenizerObjective, encode_all
from .llamagen_transformer import CaptionObjective, ClassObjective, ConsistencyObjective
from .loop import FitConfig, fit, shortened
from .mar_recipe import MAR_RECIPES
from .var_recipe import VAR_RECIPES

Components = dict[str, Any]
"""Trained parts by their name in the pipeline."""


class Recipe(Protocol):
    """Stages that make a model, each resumable; `publish` turns the outcome into a model folder."""

    @property
    def card(self) -> dict[str, str]:
        """ "kind", "conditions" and "summary" of the model."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """Recommended settings, arguments of the pipeline."""
        ...

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages, which are their folders."""
        ...

    def shortened(self, steps: int, num_images: int) -> Recipe:
        """The same recipe with at most `steps` steps per stage on `num_images` images."""
        ...

    def run(self, folder: Path, *, progress: bool = True) -> Components:
        """Train (or resume) every stage under `folder` and return the trained parts."""
        ...


@dataclass(frozen=True, kw_only=True)
class LlamaGenRecipe:
    """Tokenizer, then transformer, on Fashion-MNIST.

    Attributes:
        tokenizer_sizes: arguments of `LlamaGenTokenizer`.
        transformer_sizes: arguments of `LlamaGenTransformer`.
        tokenizer_fit: settings of the tokenizer stage.
        transformer_fit: settings of the class-conditional stage.
        polish_fit: settings of a last class-conditional stage, in which some context tokens are the
            model's own draws (see `ClassObjective`); None for no such stage.
        context_noise: mean share of such tokens.
        caption_fit: settings of the text-conditional stage, which starts from the weights of the
            class-conditional one; None for a class-conditional model.
        consistency_fit: settings of the very last stage, see `ConsistencyObjective`; None for none.
        num_images: training images used.
        card: "kind", "conditions" and "summary" of the model.
        settings: recommended settings, arguments of the pipeline.
    """

    card: dict[str, str]
    settings: dict[str, Any]
    tokenizer_sizes: dict[str, Any] = field(
        default_factory=lambda: {
            "ch": 32,
            "ch_mult": (1, 1, 1),
            "z_channels": 32,
            "codebook_size": 512,
            "code_dim": 8,
            "num_recorded": 0,
        }
    )
    transformer_sizes: dict[str, Any] = field(
        default_factory=lambda: {
            "vocab_size": 512,
            "grid": (8, 8),
            "hidden_size": 256,
            "num_layers": 5,
            "num_heads": 4,
            "intermediate_size": 432,
        }
    )
    tokenizer_fit: FitConfig = FitConfig(
        steps=4500,
        batch_size=32,
        learning_rate=2e-3,
        weight_decay=1e-4,
        betas=(0.9, 0.99),
        mixed_precision="bf16",
        log_every=100,
    )
    transformer_fit: FitConfig = FitConfig(
        steps=6000,
        batch_size=64,
        learning_rate=1.2e-3,
        mixed_precision="bf16",
        log_every=50,
    )
    polish_fit: FitConfig | None = None
    context_noise: float = 0.2
    caption_fit: FitConfig | None = None
    consistency_fit: FitConfig | None = None
    num_images: int = 60_000

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages, which are their folders."""
        optional = {
            "polish": self.polish_fit,
            "caption": self.caption_fit,
            "consistency": self.consistency_fit,
        }
        named = [name for name, config in optional.items() if config is not None]
        return ("tokenizer", "transformer", *named)

    def shortened(self, steps: int, num_images: int) -> LlamaGenRecipe:
        """The same recipe with at most `steps` steps per stage on `num_images` images."""
        return shortened(self, steps, num_images=num_images)

    def run(self, folder: Path, *, progress: bool = True) -> Components:
        """Train (or resume) every stage under `folder` and return the trained parts."""
        images, labels = (part[: self.num_images] for part in load_fashion("train"))
        tokenizer = self._tokenizer(images, folder, progress)
        tokens = encode_all(tokenizer, images)
        transformer = self._transformer(tokens, labels, folder, progress)
        objective = ClassObjective(transformer, tokens, labels, context_noise=self.context_noise)
        if self.polish_fit is not None:
            fit(objective, self.polish_fit, folder / "polish", progress=progress)
        parts: Components = {"transformer": transformer, "tokenizer": tokenizer}
        if self.caption_fit is not None:
            objective = self._caption_model(transformer, tokens, images, labels, folder, progress)
            parts |= {
                "transformer": objective.transformer,
                "text_encoder": objective.text_encoder.eval(),
                "text_tokenizer": objective.text_tokenizer,
            }
        if self.consistency_fit is not None:
            last = ConsistencyObjective(objective, self.settings["guidance_scale"])
            fit(last, self.consistency_fit, folder / "consistency", progress=progress)
        parts["transformer"].eval()
        return parts

    def _tokenizer(self, images: Tensor, folder: Path, progress: bool) -> LlamaGenTokenizer:
        torch.manual_seed(self.tokenizer_fit.seed)
        tokenizer = LlamaGenTokenizer(**self.tokenizer_sizes)
        fit(
            TokenizerObjective(tokenizer, images),
            self.tokenizer_fit,
            folder / "tokenizer",
            progress=progress,
        )
        return tokenizer.eval()

    def _transformer(
        self, tokens: Tensor, labels: Tensor, folder: Path, progress: bool
    ) -> LlamaGenTransformer:
        torch.manual_seed(self.transformer_fit.seed)
        transformer = LlamaGenTransformer(num_classes=10, **self.transformer_sizes)
        objective = ClassObjective(transformer, tokens, labels)
        fit(objective, self.transformer_fit, folder / "transformer", progress=progress)
        return transformer.eval()

    def _caption_model(
        self,
        start: LlamaGenTransformer,
        tokens: Tensor,
        images: Tensor,
        labels: Tensor,
        folder: Path,
        progress: bool,
    ) -> CaptionObjective:
        assert self.caption_fit is not None
        torch.manual_seed(self.caption_fit.seed)
        transformer = LlamaGenTransformer(
            num_classes=None, caption_dim=64, caption_length=12, **self.transformer_sizes
        )
        weights = {k: v for k, v in start.state_dict().items() if not k.startswith("cls_embedding")}
        transformer.load_state_dict(weights, strict=False)
        text_tokenizer = build_text_tokenizer()
        text_encoder = build_text_encoder(len(text_tokenizer), 64, self.caption_fit.seed)
        objective = CaptionObjective(
            transformer,
            tokens,
            CaptionWriter(measure(images, labels)),
            text_encoder,
            text_tokenizer,
        )
        fit(objective, self.caption_fit, folder / "caption", progress=progress)
        return objective


RECIPES: dict[str, Recipe] = {
    "llamagen-fashion": LlamaGenRecipe(
        card={
            "kind": "token",
            "conditions": "class",
            "summary": "Class-conditional LlamaGen on Fashion-MNIST, 32x32 pixels in 8x8 tokens",
        },
        settings={
            "class_names": list(CLASS_NAMES),
            "guidance_scale": 3.0,
            "num_threads": 1,
            "draft": "llamagen-fashion-draft",
        },
        polish_fit=FitConfig(
            steps=500,
            batch_size=64,
            learning_rate=4e-4,
            warmup=20,
            mixed_precision="bf16",
            log_every=50,
            seed=1,
        ),
        consistency_fit=FitConfig(
            steps=600,
            batch_size=32,
            learning_rate=6e-4,
            warmup=20,
            mixed_precision="bf16",
            log_every=50,
            seed=1,
        ),
    ),
    "llamagen-fashion-t2i": LlamaGenRecipe(
        card={
            "kind": "token",
            "conditions": "text",
            "summary": "Text-conditional LlamaGen on Fashion-MNIST, 32x32 pixels in 8x8 tokens",
        },
        settings={"guidance_scale": 3.0, "num_threads": 1},
        caption_fit=FitConfig(
            steps=2000,
            batch_size=64,
            learning_rate=6e-4,
            mixed_precision="bf16",
            log_every=50,
        ),
    ),
}
RECIPES |= VAR_RECIPES | MAR_RECIPES


def stage_seconds(folder: Path, stages: Iterable[str]) -> dict[str, float]:
    """Wall time of each stage of a finished recipe, from its log."""
    seconds = {}
    for stage in stages:
        lines = (folder / stage / "log.jsonl").read_text().splitlines()
        seconds[stage] = json.loads(lines[-1])["seconds"]
    return seconds
