"""MAR's diffusion head: a small residual network that denoises one latent given its condition.

Source: Li et al., "Autoregressive Image Generation without Vector Quantization", 2024, section 3.2
and appendix A; parameter names are those of the published checkpoints. The first step of a chain
multiplies rounding errors by thousands, so operations are in the order of the official code.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import NORM_EPS

NUM_FREQUENCIES = 128
Modulations = list[tuple[Tensor, ...]]
"""What the condition and the step make of every block: (shift, scale, gate), last (shift, scale)."""


class TimeEmbedding(nn.Module):
    """Sinusoids of a step, cosines first, through two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * NUM_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, timesteps: Tensor) -> Tensor:
        """Trained step numbers [M] to [M, w]."""
        exponents = torch.arange(NUM_FREQUENCIES, device=timesteps.device, dtype=torch.float32)
        frequencies = torch.exp(-math.log(10000.0) * exponents / NUM_FREQUENCIES)
        angles = timesteps[:, None].float() * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(waves.to(next(self.mlp.parameters()).dtype))


class ResBlock(nn.Module):
    """h + gate * MLP(LN(h) * (1 + scale) + shift)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, h: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """[..., w] to [..., w]."""
        return h + gate * self.mlp(self.in_ln(h) * scale + shift)


class FinalLayer(nn.Module):
    """Modulated normalisation without parameters, and the output projection."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """[..., w] to [..., out]."""
        normed = F.layer_norm(h, h.shape[-1:], eps=NORM_EPS)
        return self.linear(normed * scale + shift)


class HeadNetwork(nn.Module):
    """Estimates the noise in a latent, and where its reverse variance lies in the allowed range.

    Args:
        latent_dim: D.
        condition_dim: width of the conditions z.
        width: w of the residual blocks.
        depth: number of residual blocks.
    """

    def __init__(self, latent_dim: int, condition_dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(condition_dim, width)
        self.input_proj = nn.Linear(latent_dim, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * latent_dim)

    def modulate(self, conditions: Tensor) -> Modulations:
        """What the blocks need to know of time_embed(t) + cond_embed(z) [..., w].

        The modulations do not depend on the latent: those of many steps can be computed in one go.
        `scale` comes with its 1 added.
        """
        parts = []
        for block in self.res_blocks:
            modulation = cast(ResBlock, block).adaLN_modulation
            shift, scale, gate = modulation(conditions).chunk(3, dim=-1)
            parts.append((shift, scale + 1, gate))
        shift, scale = self.final_layer.adaLN_modulation(conditions).chunk(2, dim=-1)
        return [*parts, (shift, scale + 1)]

    def run(self, x: Tensor, modulations: Modulations) -> Tensor:
        """Noisy latents [..., D] to [..., 2D]: the noise in them, and the share of the variance."""
        h = self.input_proj(x)
        for block, parts in zip(self.res_blocks, modulations[:-1], strict=True):
            h = block(h, *parts)
        return self.final_layer(h, *modulations[-1])

    def forward(self, x: Tensor, timesteps: Tensor, z: Tensor) -> Tensor:
        """Latents [M, D], trained steps [M] and conditions [M, C] to [M, 2D]."""
        return self.run(x, self.modulate(self.time_embed(timesteps) + self.cond_embed(z)))


class DiffusionHead(nn.Module):
    """Holds the network under the name that the checkpoints give it."""

    def __init__(self, latent_dim: int, condition_dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.net = HeadNetwork(latent_dim, condition_dim, width, depth)
