"""Training objectives of MAR: its autoencoder, its transformer, and a draft fitted to a target."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..decoding.latents.schedule import NUM_TRAIN_STEPS, Schedule
from ..models.mar.autoencoder import MARAutoencoder
from ..models.mar.transformer import MARTransformer
from .data import in_batches, pixel_loss, to_pixels
from .loop import Chance, Objective


class AutoencoderObjective(Objective):
    """Reconstruction through Gaussian latents that a small divergence keeps near the unit normal.

    Args:
        autoencoder: the model to train.
        images: see `arvision.training.data.to_pixels`.
        divergence_weight: of the mean divergence per latent number. The evidence bound asks for
            half the mean squared error of a pixel times the pixels per latent number, about 3e-3
            here; less gives sharper pictures and latents that are harder to predict.
    """

    def __init__(
        self, autoencoder: MARAutoencoder, images: Tensor, divergence_weight: float = 2e-3
    ) -> None:
        super().__init__()
        self.autoencoder, self.images, self.num_items = autoencoder, images, len(images)
        self.divergence_weight = divergence_weight

    def inputs(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Pictures."""
        return {"images": self.images[indices]}

    def loss(self, inputs: dict[str, Tensor], chance: Chance) -> dict[str, Tensor]:
        """Loss, PSNR in dB and divergence in nats per latent number."""
        pixels = to_pixels(inputs["images"])
        mean, log_variance = (part.float() for part in self.autoencoder.moments(pixels))
        noise = chance.randn(*mean.shape)
        out = self.autoencoder.decode_map(mean + (0.5 * log_variance).exp() * noise).float()
        loss, error = pixel_loss(out, pixels, inputs["images"])
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return {
            "loss": loss + self.divergence_weight * divergence,
            "psnr": 10 * torch.log10(4.0 / error.detach()),
            "divergence": divergence,
        }


@torch.no_grad()
def encode_moments(autoencoder: MARAutoencoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """Unscaled means and standard deviations [M, N, D] of the latents of images, see `to_pixels`."""
    autoencoder.eval()
    side = autoencoder.config["patch_size"]
    means, deviations = [], []
    for part in in_batches(images):
        mean, log_variance = autoencoder.moments(to_pixels(part))
        for found, value in ((means, mean), (deviations, (0.5 * log_variance).exp())):
            found.append(F.pixel_unshuffle(value, side).flatten(2).mT.contiguous())
    return torch.cat(means), torch.cat(deviations)


def initialise(transformer: MARTransformer) -> None:
    """Fresh weights: Xavier for linear layers, normal for embeddings, zero for the head's gates.

    Paper: Li et al., "Autoregressive Image Generation without Vector Quantization", 2024; Peebles
    and Xie, "Scalable Diffusion Models with Transformers", 2023, section 3.2, for the zeros.
    """
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for name, parameter in transformer.named_parameters(recurse=False):
        assert name.endswith(("learned", "token", "latent"))
        nn.init.normal_(parameter, std=0.02)
    net: Any = transformer.diffloss.net
    for block in (*net.res_blocks, net.final_layer):
        nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(block.adaLN_modulation[1].bias)
    nn.init.zeros_(net.final_layer.linear.weight)
    for layer in (net.time_embed.mlp[0], net.time_embed.mlp[2]):
        nn.init.normal_(layer.weight, std=0.02)


def diffusion_loss(
    schedule: Schedule, output: Tensor, start: Tensor, x: Tensor, noise: Tensor, steps: Tensor
) -> Tensor:
    """Squared error of the noise, plus the divergence of the reverse step in bits, per number.

    The divergence trains the variances alone: its mean is detached.

    Args:
        schedule: of all trained steps.
        output: [M, 2D] of the head's network.
        start, x, noise: [M, D], clean latents, noisy ones, and the noise in them.
        steps: [M].

    Returns:
        [M].

    Paper: Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021,
    equation 16, with lambda = 1 / 1000.
    """
    guess, share = output.float().chunk(2, dim=-1)
    true_mean, low = schedule.posterior(start, x, steps)
    mean, log_variance = schedule.moments(x, guess.detach(), share, steps)
    gap = (true_mean - mean).square() * torch.exp(-log_variance)
    divergence = 0.5 * (log_variance - low + torch.exp(low - log_variance) - 1 + gap)
    return ((guess - noise).square() + divergence / 0.6931).mean(-1)


class MARObjective(Objective):
    """Denoising loss of masked latents given the others and a class.

    Args:
        transformer: the model to train.
        means, deviations: [M, N, D], scaled to unit latents; each step draws latents anew.
        labels: [M] classes.
        draws: (step, noise) pairs per masked latent.
        mask_deviation: the masked share is a normal variable around 1 with this deviation, taken
            within (0, 1]; wide, since samplers may draw one latent at a time.
        condition_dropout: share of samples trained with the unconditional row.
    """

    def __init__(
        self,
        transformer: MARTransformer,
        means: Tensor,
        deviations: Tensor,
        labels: Tensor,
        *,
        draws: int = 2,
        mask_deviation: float = 0.5,
        condition_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.transformer, self.labels = transformer, labels
        self.means, self.deviations, self.num_items = means, deviations, len(means)
        self.draws, self.mask_deviation = draws, mask_deviation
        self.condition_dropout = condition_dropout
        self.schedule = Schedule(NUM_TRAIN_STEPS)

    def inputs(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Latents [B, N, D], which are known [B, N], classes [B], which of them are dropped [B]."""
        noise = torch.randn(self.means[indices].shape, generator=generator)
        latents = self.means[indices] + self.deviations[indices] * noise
        size, num = latents.shape[:2]
        share = 2.0
        while share > 1:
            share = 1 - self.mask_deviation * abs(float(torch.randn((), generator=generator)))
            share = share if share > 0 else 2.0
        num_masked = max(1, round(share * num))
        ranks = torch.rand(size, num, generator=generator).argsort(1)
        dropped = torch.rand(size, generator=generator) < self.condition_dropout
        return {
            "latents": latents,
            "known": ranks >= num_masked,
            "labels": self.labels[indices],
            "dropped": dropped,
        }

    def loss(self, inputs: dict[str, Tensor], chance: Chance) -> dict[str, Tensor]:
        """Mean loss of the masked latents."""
        latents, known = inputs["latents"], inputs["known"]
        condition = self.transformer.embed_classes(inputs["labels"], inputs["dropped"])
        z = self.transformer(latents, known, condition)
        z, start = z[~known].repeat(self.draws, 1), latents[~known].repeat(self.draws, 1)
        steps = chance.randint(NUM_TRAIN_STEPS, len(start))
        noise = chance.randn(*start.shape)
        x = self.schedule.add_noise(start, noise, steps)
        output = self.transformer.diffloss.net(x, steps, z)
        loss = diffusion_loss(self.schedule, output, start, x, noise, steps).mean()
        error = (output.detach().float()[:, : x.shape[1]] - noise).square().mean()
        return {"loss": loss, "error": error}
