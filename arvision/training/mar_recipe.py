"""How the embedded MAR models are made: autoencoder, then transformer; each stage resumable."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.mar.autoencoder import MARAutoencoder
from ..models.mar.transformer import MARTransformer
from .data import CLASS_NAMES, load_fashion
from .loop import FitConfig, fit, shortened
from .mar import AutoencoderObjective, MARObjective, encode_moments, initialise


@dataclass(frozen=True, kw_only=True)
class MARRecipe:
    """KL autoencoder, then MAR, on Fashion-MNIST.

    Attributes:
        autoencoder_sizes: arguments of `MARAutoencoder`.
        transformer_sizes: arguments of `MARTransformer`.
        autoencoder_fit: settings of the autoencoder stage.
        transformer_fit: settings of the transformer stage.
        num_images: training images used.
        card: "kind", "conditions" and "summary" of the model.
        settings: recommended settings, arguments of the pipeline.
    """

    card: dict[str, str]
    settings: dict[str, Any]
    autoencoder_sizes: dict[str, Any] = field(
        default_factory=lambda: {
            "ch": 32,
            "ch_mult": (1, 1, 2),
            "num_res_blocks": 1,
            "latent_dim": 4,
        }
    )
    transformer_sizes: dict[str, Any] = field(
        default_factory=lambda: {
            "latent_dim": 4,
            "grid": (8, 8),
            "hidden_size": 256,
            "encoder_depth": 2,
            "decoder_depth": 3,
            "num_heads": 4,
            "head_width": 192,
            "head_depth": 2,
            "num_classes": 10,
            "num_buffer": 4,
            "num_sampling_steps": 50,
            "noisiest": 980,
        }
    )
    autoencoder_fit: FitConfig = FitConfig(
        steps=2800,
        batch_size=32,
        learning_rate=2e-3,
        weight_decay=1e-4,
        betas=(0.9, 0.99),
        mixed_precision="bf16",
        log_every=100,
    )
    transformer_fit: FitConfig = FitConfig(
        steps=2400,
        batch_size=64,
        learning_rate=1e-3,
        weight_decay=0.02,
        clip_norm=3.0,
        mixed_precision="bf16",
        log_every=50,
        average_decay=0.999,
    )
    num_images: int = 60_000

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages, which are their folders."""
        return ("autoencoder", "transformer")

    def shortened(self, steps: int, num_images: int) -> MARRecipe:
        """The same recipe with at most `steps` steps per stage on `num_images` images."""
        return shortened(self, steps, num_images=num_images)

    def run(self, folder: Path, *, progress: bool = True) -> dict[str, Any]:
        """Train (or resume) both stages under `folder` and return the trained parts."""
        images, labels = (part[: self.num_images] for part in load_fashion("train"))
        autoencoder = self._autoencoder(images, folder, progress)
        scale = autoencoder.config["scaling_factor"]
        means, deviations = (scale * part for part in encode_moments(autoencoder, images))
        torch.manual_seed(self.transformer_fit.seed)
        transformer = MARTransformer(**self.transformer_sizes)
        initialise(transformer)
        objective = MARObjective(transformer, means, deviations, labels)
        fit(objective, self.transformer_fit, folder / "transformer", progress=progress)
        return {"transformer": transformer.eval(), "tokenizer": autoencoder}

    def _autoencoder(self, images: Tensor, folder: Path, progress: bool) -> MARAutoencoder:
        torch.manual_seed(self.autoencoder_fit.seed)
        autoencoder = MARAutoencoder(**self.autoencoder_sizes)
        objective = AutoencoderObjective(autoencoder, images)
        fit(objective, self.autoencoder_fit, folder / "autoencoder", progress=progress)
        mean, deviation = encode_moments(autoencoder.eval(), images[:5000])
        spread = (mean.var() + deviation.square().mean()).sqrt()
        autoencoder.register_to_config(scaling_factor=float(1 / spread))
        return autoencoder


MAR_RECIPES: dict[str, MARRecipe] = {
    "mar-fashion": MARRecipe(
        card={
            "kind": "continuous",
            "conditions": "class",
            "summary": "Class-conditional MAR on Fashion-MNIST, 32x32 pixels in 8x8 latents of 4 numbers",
        },
        settings={
            "class_names": list(CLASS_NAMES),
            "guidance_scale": 3.0,
            "temperature": 0.95,
            "num_threads": 1,
            "draft": "mar-fashion-draft",
        },
    )
}
