"""How the embedded MAR models are made: autoencoder, then transformer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..models.mar.autoencoder import MARAutoencoder
from ..models.mar.transformer import MARTransformer
from .data import CLASS_NAMES
from .loop import FitConfig
from .mar import AutoencoderObjective, MARObjective, encode_moments, initialise
from .stages import Recipe, Stage, Work


@dataclass(frozen=True, kw_only=True)
class AutoencoderStage(Stage[Work]):
    """The KL autoencoder.

    Attributes:
        sizes: arguments of `MARAutoencoder`.
    """

    name: str = "autoencoder"
    fit: FitConfig = FitConfig(
        steps=2800,
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
            "ch_mult": (1, 1, 2),
            "num_res_blocks": 1,
            "latent_dim": 4,
        }
    )

    def objective(self, work: Work) -> AutoencoderObjective:
        """Reconstruction, and latents near a Gaussian."""
        return AutoencoderObjective(MARAutoencoder(**self.sizes), work.images)

    def finish(self, work: Work, objective: AutoencoderObjective) -> None:
        """The autoencoder with its scaling factor, and the moments of the images' latents."""
        autoencoder = objective.autoencoder
        mean, deviation = encode_moments(autoencoder, work.images[:5000])
        spread = (mean.var() + deviation.square().mean()).sqrt()
        scale = float(1 / spread)
        autoencoder.register_to_config(scaling_factor=scale)
        work.parts["tokenizer"] = autoencoder
        work.codes = tuple(scale * part for part in encode_moments(autoencoder, work.images))


@dataclass(frozen=True, kw_only=True)
class MARTransformerStage(Stage[Work]):
    """The transformer with its diffusion head.

    Attributes:
        sizes: arguments of `MARTransformer`.
    """

    name: str = "transformer"
    fit: FitConfig = FitConfig(
        steps=2400,
        batch_size=64,
        learning_rate=1e-3,
        weight_decay=0.02,
        clip_norm=3.0,
        mixed_precision="bf16",
        log_every=50,
        average_decay=0.999,
    )
    sizes: Mapping[str, Any] = field(
        default_factory=lambda: {
            "latent_dim": 4,
            "grid": (8, 8),
            "hidden_size": 256,
            "encoder_depth": 2,
            "decoder_depth": 3,
            "num_heads": 4,
            "head_width": 192,
            "head_depth": 2,
            "num_buffer": 4,
            "num_sampling_steps": 50,
            "noisiest": 980,
        }
    )

    def objective(self, work: Work) -> MARObjective:
        """Noise on masked latents."""
        transformer = MARTransformer(num_classes=work.num_classes, **self.sizes)
        initialise(transformer)
        means, deviations = work.codes
        return MARObjective(transformer, means, deviations, work.labels)

    def finish(self, work: Work, objective: MARObjective) -> None:
        """The transformer."""
        work.parts["transformer"] = objective.transformer


MAR_RECIPES: dict[str, Recipe] = {
    "mar-fashion": Recipe(
        card={
            "kind": "continuous",
            "conditions": "class",
            "summary": "Class-conditional MAR on Fashion-MNIST, 32x32 pixels in 8x8 latents of 4 numbers",
        },
        stages=[AutoencoderStage(), MARTransformerStage()],
        settings={
            "class_names": list(CLASS_NAMES),
            "guidance_scale": 3.0,
            "temperature": 0.95,
            "num_threads": 1,
            "draft": "mar-fashion-draft",
        },
    )
}
