"""The head of continuous models: a small residual network that denoises one latent given z.

Source: Li et al., "Autoregressive Image Generation without Vector Quantization", 2024, section 3.2
and appendix A; parameter names are those of the published checkpoints of MAR and NextStep-1. The
first step of MAR's chain multiplies rounding errors by thousands, so operations are in the order of
the official code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..decoding.latents.chain import (
    Guidance,
    LatentLaw,
    Trajectory,
    draw_chain,
    path_log_ratio,
    path_under,
)

NORM_EPS = 1e-6
NUM_FREQUENCIES = 128
MEMO_ELEMENTS = 1 << 24
"""Numbers of a chain's modulations: up to this many, those of all steps are computed in one go."""
Modulations = list[tuple[Tensor, ...]]
"""What the condition and the step make of every block: (shift, scale, gate), last (shift, scale)."""
RunPart = Callable[..., Any]
"""Runs a method of a `HeadNetwork`, by its name, on the arguments that follow: by way of the network
that the head belongs to, whose calls may be compiled or bring weights that wait elsewhere."""


class TimeEmbedding(nn.Module):
    """Sinusoids of a step, cosines first, through two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * NUM_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, timesteps: Tensor) -> Tensor:
        """Step numbers or times [M] to [M, w]."""
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
        return h + gate * self.think(h, shift, scale)

    def think(self, h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """What the block adds before its gate."""
        return self.mlp(self.in_ln(h) * scale + shift)


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
    """What a chain needs to know of a noisy latent, such as the noise in it or its velocity.

    Args:
        latent_dim: D.
        condition_dim: C, width of the conditions z.
        width: w of the residual blocks.
        depth: number of residual blocks.
        num_outputs: vectors of width D that it gives.
    """

    def __init__(
        self, latent_dim: int, condition_dim: int, width: int, depth: int, num_outputs: int = 2
    ) -> None:
        super().__init__()
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(condition_dim, width)
        self.input_proj = nn.Linear(latent_dim, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, num_outputs * latent_dim)

    def embed(self, times: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of times [K] and of conditions [M, C], [K, w] and [M, w]."""
        embedded = self.time_embed(times)
        return embedded, self.cond_embed(z.to(embedded.dtype))

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
        """Noisy latents [..., D] to the outputs side by side, [..., num_outputs * D]."""
        h = self.input_proj(x)
        for block, parts in zip(self.res_blocks, modulations[:-1], strict=True):
            h = block(h, *parts)
        return self.final_layer(h, *modulations[-1])

    def run_keeping(self, x: Tensor, modulations: Modulations) -> tuple[Tensor, list[Tensor]]:
        """As `run`, and what `run_kept` needs of each block [..., w]."""
        h = self.input_proj(x)
        kept = []
        for number, (each, parts) in enumerate(zip(self.res_blocks, modulations[:-1], strict=True)):
            block = cast(ResBlock, each)
            found = block.think(h, *parts[:2]) if number == 0 else block(h, *parts) - h
            h = h + (parts[2] * found if number == 0 else found)
            kept.append(found)
        return self.final_layer(h, *modulations[-1]), kept

    def run_kept(self, x: Tensor, modulations: Modulations, kept: list[Tensor]) -> Tensor:
        """As `run`, with what the blocks added at another step: the first one's through its new gate."""
        h = self.input_proj(x)
        for number, (found, parts) in enumerate(zip(kept, modulations[:-1], strict=True)):
            h = h + (parts[2] * found if number == 0 else found)
        return self.final_layer(h, *modulations[-1])

    def forward(self, x: Tensor, times: Tensor, z: Tensor) -> Tensor:
        """Latents [M, D], times [M] and conditions [M, C] to [M, num_outputs * D]."""
        return self.run(x, self.modulate(self.time_embed(times) + self.cond_embed(z)))


def run_part(net: HeadNetwork, name: str, *arguments: Any) -> Any:
    """See `RunPart`."""
    return getattr(net, name)(*arguments)


class HeadHolder(nn.Module):
    """Holds the network under the name that the checkpoints give it; arguments are the network's."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.net = HeadNetwork(*sizes)


class SteppedHead:
    """A head's network bound to M conditions, run at one step of a chain or along all of them.

    Args:
        net: the network.
        run: runs its parts.
        times: [K], what it is told at each step, in the order of drawing.
        z: [M, G * C], conditions of G branches of guidance side by side.
    """

    def __init__(self, net: HeadNetwork, run: RunPart, times: Tensor, z: Tensor) -> None:
        self.num_branches = z.shape[1] // net.cond_embed.in_features
        self._run_part, self._num_steps = run, len(times)
        z = z.view(len(z), self.num_branches, -1).transpose(0, 1).flatten(0, 1)
        self._times, self._conditions = run("embed", times.to(z.device), z)
        per_row = (3 * len(net.res_blocks) + 2) * self._times.shape[1]
        self._rows_at_once = max(1, MEMO_ELEMENTS // max(1, per_row * len(z)))
        self._per_step: list[Modulations] = []

    def at(self, x: Tensor, row: int) -> Tensor:
        """Outputs [G, M, O] for `x` [M, D] at a step."""
        return self._run(x, self._step_modulations(row))

    def lazily(self, x: Tensor, row: int, is_fresh: bool) -> Tensor:
        """As `at`, but computed as a whole in fresh steps only; an approximation.

        In between the blocks add what they added at the last fresh step, and the branches beyond the
        first stand as far from it as they stood there.
        """
        modulations = self._step_modulations(row)
        x = x.to(self._times.dtype)
        if is_fresh:
            out, self._kept = self._run_part(
                "run_keeping", torch.cat([x] * self.num_branches, dim=-2), modulations
            )
            out = torch.stack(out.chunk(self.num_branches, dim=-2))
            self._distance = out - out[:1]
            return out
        num = len(x)
        own = [tuple(part[:num] for part in parts) for parts in modulations]
        out = self._run_part("run_kept", x, own, [part[:num] for part in self._kept])
        return out + self._distance

    def along(self, states: Tensor) -> Tensor:
        """Outputs [G, K, M, O] for `states` [K, M, D], row i at step i, in one call."""
        parts = []
        for first in range(0, self._num_steps, self._rows_at_once):
            last = min(first + self._rows_at_once, self._num_steps)
            parts.append(self._run(states[first:last], self._modulations(first, last)))
        return torch.cat(parts, dim=1)

    def _modulations(self, first: int, last: int) -> Modulations:
        """Of rows first to last (exclusive), [last - first, G * M, w] each."""
        return self._run_part("modulate", self._times[first:last, None] + self._conditions)

    def _step_modulations(self, row: int) -> Modulations:
        """Of one row, [G * M, w] each."""
        if self._rows_at_once < self._num_steps:
            return self._run_part("modulate", self._times[row] + self._conditions)
        if not self._per_step:
            of_blocks = [
                list(zip(*(part.unbind(0) for part in parts), strict=True))
                for parts in self._modulations(0, self._num_steps)
            ]
            self._per_step = [list(blocks) for blocks in zip(*of_blocks, strict=True)]
        return self._per_step[row]

    def _run(self, x: Tensor, modulations: Modulations) -> Tensor:
        """Outputs [G, ..., M, O] for `x` [..., M, D]; all branches see the same latents."""
        x = x.to(self._times.dtype)
        out = self._run_part("run", torch.cat([x] * self.num_branches, dim=-2), modulations)
        return torch.stack(out.chunk(self.num_branches, dim=-2))


class ChainHead:
    """Draws latents from p(x | z) and compares laws; the `head` of a continuous model.

    Args:
        net: the network.
        num_steps: K of a chain.
        run: runs the network's parts; None to call them.

    Attributes:
        num_steps: K of a chain.
        latent_dim: D.
    """

    def __init__(self, net: HeadNetwork, num_steps: int, run: RunPart | None = None) -> None:
        self.net, self.num_steps, self.latent_dim = net, num_steps, net.input_proj.in_features
        self.run: RunPart = partial(run_part, net) if run is None else run

    def law(self, z: Tensor, guidance_scale: Guidance = 1.0) -> LatentLaw:
        """Law of M latents given conditions [M, Dz]."""
        raise NotImplementedError

    def sample(
        self,
        z: Tensor,
        noise: Tensor,
        *,
        guidance_scale: Guidance = 1.0,
        temperature: float = 1.0,
        last_noise: bool = False,
    ) -> Tensor:
        """Latents [..., D] of conditions [..., Dz], all positions and images in one chain.

        Args:
            z: as `state.condition` gives them.
            noise: [K + 1, ..., D]; row 0 is the start.
            guidance_scale: of the head's estimates.
            temperature: multiplies the noise of the steps; 0 leaves the means.
            last_noise: add noise in the last step, too.
        """
        law = self.law(z.flatten(0, -2), guidance_scale)
        path = draw_chain(law, noise.flatten(1, -2), temperature, last_noise)
        return path.latents.view(*z.shape[:-1], self.latent_dim)

    def log_prob_ratio(
        self,
        path: Trajectory,
        z: Tensor,
        *,
        guidance_scale: Guidance = 1.0,
        temperature: float = 1.0,
    ) -> Tensor:
        """log density [M] of a path under this head, less that under the law that drew it.

        Args:
            path: of M latents, drawn with noise in the last step.
            z: [M, Dz].
            guidance_scale: of this head.
            temperature: of this head.
        """
        return path_log_ratio(path_under(self.law(z, guidance_scale), path, temperature), path)
