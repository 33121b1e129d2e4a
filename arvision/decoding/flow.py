"""The flow-matching map: a law over codes and a Gaussian vector give one code, with no other chance.

The path x_t = (1 - t) c + t e joins a code c (t = 0) to noise e (t = 1). For a law over finitely many
codes its velocity is known in closed form, so the ordinary differential equation that carries noise to
codes can be followed exactly: Gaussian noise in, a code drawn from the law out, and the same noise
gives the same code again. With z = x / t and l = (1 - t) / t the equation has no singularity:

    dz/dl = sum_j w_j c_j,    w = softmax_j(log p_j + l z.c_j - l^2 |c_j|^2 / 2),    z(0) = e.

Paper: Liu et al., "Distilled Decoding 1: One-step Sampling of Image Auto-regressive Models with Flow
Matching", 2024, section 3.2. There x_t is followed with DPM-Solver; the coordinates here are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..contracts import codebook_of
from ..errors import InputError
from .noise import Noise
from .verify import Round, Rule, Verdict, follow

DEFAULT_EVALUATIONS = 100
"""Evaluations of the velocity from noise to code; with 50 the law is still right, with 20 it is not."""

CACHE_ELEMENTS = 1 << 18
"""Weights computed at a time (laws times codes) on a CPU, so that they stay in a core's cache."""

MEMORY_ELEMENTS = 1 << 26
"""Numbers computed with at a time elsewhere, codes included: small products would leave an
accelerator idle."""


class FlowMap:
    """The map of one codebook.

    The steps are those of the two-step Adams-Bashforth method (second order, one evaluation each) over
    times spread evenly in t, t being measured in units of the codebook's spread: moving, turning or
    scaling codes and noise together changes no token.

    Args:
        codebook: [V, D], finite.
        num_evaluations: evaluations of the velocity, the last of which names the code.

    Raises:
        InputError: another shape, or fewer than 2 evaluations.

    Cost: two matrix products per evaluation, [P, D + 1] x [D + 1, K] and back, for P laws that keep
    at most K codes. Memory: P * K * (D + 4) numbers for the kept codes of the laws.
    """

    def __init__(self, codebook: Tensor, num_evaluations: int = DEFAULT_EVALUATIONS) -> None:
        if codebook.dim() != 2 or not codebook.is_floating_point():
            raise InputError(f"codebook {tuple(codebook.shape)}: expected floats [V, D]")
        check_evaluations(num_evaluations)
        self.num_evaluations = num_evaluations
        wide = codebook.detach().double()
        self._centre = wide.mean(0)
        codes = wide - self._centre
        self._spread = float(codes.pow(2).sum(-1).mean().sqrt()) or 1.0
        # With -|c|^2 / 2 as one more coordinate, a single product gives the whole exponent.
        self._wide = torch.cat([codes, -codes.pow(2).sum(-1, keepdim=True) / 2], dim=1)
        self._tables: dict[torch.dtype, Tensor] = {torch.float64: self._wide}

    @property
    def width(self) -> int:
        """Width D of a code, and of its noise."""
        return self._wide.shape[1] - 1

    def __call__(self, logp: Tensor, noise: Tensor) -> Tensor:
        """The code that each noise vector becomes.

        Args:
            logp: [..., V] log-probabilities, -inf for codes that must not come; float32 or float64,
                which is also the precision of the computation.
            noise: [..., D] standard normal.

        Returns:
            [...] int64.

        Raises:
            InputError: shapes that do not fit each other or the codebook.
        """
        laws, z = self._flat(logp, noise)
        times = torch.linspace(1, 0, self.num_evaluations + 1, dtype=torch.float64)[:-1]
        tokens = [
            self._last(part, x, times.tolist())
            for part, x in zip(*self._blocks(laws, z), strict=True)
        ]
        return torch.cat(tokens).view(logp.shape[:-1])

    def transport(self, logp: Tensor, x: Tensor, start: float, end: float) -> Tensor:
        """Follow points from time `start` to time `end`, in either direction.

        Args:
            logp: [..., V] log-probabilities.
            x: [..., D] at time `start`.
            start: in (0, 1]; 1 is noise.
            end: in (0, 1].

        Returns:
            [..., D] at time `end`. The map takes a share of `num_evaluations` as large as the share
            of the time axis that is crossed.
        """
        if not (0 < start <= 1 and 0 < end <= 1):
            raise InputError(f"times {start} and {end}: expected 0 < t <= 1")
        laws, points = self._flat(logp, x)
        num = max(1, round(self.num_evaluations * abs(self._clock(start) - self._clock(end))))
        clock = torch.linspace(
            self._clock(start), self._clock(end), num + 1, dtype=torch.float64
        ).tolist()
        moved = []
        for part, block in zip(*self._blocks(laws, points), strict=True):
            codes, values, _ = self._kept(part)
            shift = (1 - start) / start * self._centre.to(block)
            z = self._follow(values, codes, block / start - shift, clock)
            moved.append((z + (1 - end) / end * self._centre.to(block)) * end)
        return torch.cat(moved).view(x.shape)

    def _clock(self, t: float) -> float:
        """Time on the axis of a codebook of unit spread: l is in units of 1 / spread there."""
        level = (1 - t) / t * self._spread
        return 1 / (1 + level)

    def _level(self, clock: float) -> float:
        return (1 - clock) / clock / self._spread

    def _flat(self, logp: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        size, width = len(self._wide), self.width
        if logp.shape[-1] != size or noise.shape[-1] != width:
            raise InputError(
                f"laws over {logp.shape[-1]} codes and noise of width {noise.shape[-1]}: the codebook "
                f"has {size} codes of width {width}"
            )
        if logp.shape[:-1] != noise.shape[:-1]:
            raise InputError(
                f"laws {tuple(logp.shape)} and noise {tuple(noise.shape)}: expected one vector a law"
            )
        dtype = torch.float64 if logp.dtype == torch.float64 else torch.float32
        return logp.reshape(-1, size).to(dtype), noise.reshape(-1, width).to(logp.device, dtype)

    def _blocks(self, laws: Tensor, points: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        kept = int((laws > float("-inf")).sum(-1).max()) if len(laws) else 1
        most, of_law = CACHE_ELEMENTS, max(1, kept)
        if laws.device.type != "cpu":
            most, of_law = MEMORY_ELEMENTS, of_law * (self.width + 4)
        rows = max(1, most // of_law)
        return list(laws.split(rows)), list(points.split(rows))

    def _kept(self, laws: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes [V, D + 1], log p and None; or, where the laws [P, V] keep few, [P, K, D + 1], [P, K]
        and which codes these are [P, K]."""
        table = self._tables.get(laws.dtype)
        if table is None or table.device != laws.device:
            table = self._tables[laws.dtype] = self._wide.to(laws)
        most = int((laws > float("-inf")).sum(-1).max())
        if most > laws.shape[-1] // 2:
            return table, laws, None
        values, chosen = laws.topk(most, dim=-1, sorted=False)
        return table[chosen], values, chosen

    @staticmethod
    def _exponents(values: Tensor, codes: Tensor, z: Tensor, level: float) -> Tensor:
        """log w up to a constant, [P, K]."""
        query = torch.cat([z * level, torch.full_like(z[:, :1], level * level)], dim=1)
        if codes.dim() == 2:
            return torch.addmm(values, query, codes.T)
        return torch.baddbmm(values[:, None], query[:, None], codes.transpose(1, 2))[:, 0]

    def _follow(self, values: Tensor, codes: Tensor, z: Tensor, clock: list[float]) -> Tensor:
        """Integrate z [P, D] over the times `clock`."""
        previous, before = None, 0.0
        for now, then in pairwise(clock):
            level = self._level(now)
            step = self._level(then) - level
            weights = self._exponents(values, codes, z, level).softmax(-1)
            if codes.dim() == 2:
                slope = (weights @ codes)[:, :-1]
            else:
                slope = torch.bmm(weights[:, None], codes)[:, 0, :-1]
            if previous is None:
                z = z + step * slope
            else:
                ratio = step / before / 2
                z = z + step * ((1 + ratio) * slope - ratio * previous)
            previous, before = slope, step
        return z

    def _last(self, laws: Tensor, noise: Tensor, clock: list[float]) -> Tensor:
        """Follow noise [P, D] to the last time and name the likeliest code, [P]."""
        codes, values, chosen = self._kept(laws)
        z = self._follow(values, codes, noise, clock)
        best = self._exponents(values, codes, z, self._level(clock[-1])).argmax(-1)
        return best if chosen is None else chosen.gather(-1, best[:, None])[:, 0]


def flow_map_of(model: Any, num_evaluations: int = DEFAULT_EVALUATIONS) -> FlowMap:
    """The flow to the codes of a model.

    Raises:
        InputError: a model without a codebook.
    """
    codebook = codebook_of(model)
    if codebook is None:
        raise InputError("noise 'flow': this model has no codebook to flow to")
    return FlowMap(codebook, num_evaluations)


def check_evaluations(num_evaluations: int) -> None:
    """Refuse a number of evaluations below 2.

    Raises:
        InputError: see above.
    """
    if isinstance(num_evaluations, bool) or num_evaluations < 2:
        raise InputError(f"num_evaluations {num_evaluations}: expected an integer >= 2")


def flow_rule(flow_map: FlowMap) -> Rule:
    """A rule under which each token is the code that its position's Gaussian noise flows to.

    Exact, and the whole image is a function of its noise, which is what a student of Distilled
    Decoding learns. As with Gumbel coupling the noise is fixed per image and position.
    """

    def rule(batch: Round) -> Verdict:
        noise = flow_noise(batch.noise, batch.positions, flow_map.width)
        return follow(batch, flow_map(batch.target_logp, noise))

    return rule


def flow_noise(noise: Noise, positions: Tensor, width: int) -> Tensor:
    """The Gaussian noise [B, T, D] float64 of positions [B, T] that `flow_rule` reads."""
    return noise.normal(positions, width, "flow")


def flow_pick(flow_map: FlowMap) -> Callable[[Tensor, Tensor, Noise], Tensor]:
    """`flow_rule` for scale models: laws [B, n, V] at positions [B, n], and noise, to tokens."""

    def pick(laws: Tensor, positions: Tensor, noise: Noise) -> Tensor:
        vectors = flow_noise(noise, positions, flow_map.width)
        return flow_map(laws, vectors)

    return pick
