"""Continuous models whose laws are known."""

from __future__ import annotations

import math
from typing import Any

import torch
from scipy.stats import kstest, norm

NUM = 50_000
CRITICAL = 1.628 / math.sqrt(NUM)
"""Of the Kolmogorov-Smirnov distance at 1 %."""


class GaussianLaw:
    """N(mean, deviation^2) drawn by a chain of K linear Gaussian steps.

    The start is the unit normal; each step moves the chain a share of the way.
    """

    def __init__(self, mean, deviation, num_steps):
        self.num_steps, self.latent_dim = num_steps, mean.shape[1]
        self._mean, self._deviation = mean, deviation
        # Marginals interpolate from N(0, 1) to the goal; steps are autoregressive in between.
        self._shares = [(row + 1) / num_steps for row in range(num_steps)]
        self._keep = 0.6

    def _marginal(self, share):
        variance = (1 - share) + share * self._deviation**2
        return share * self._mean, variance

    def moments(self, x, step):
        row = self.num_steps - 1 - step
        before = self._marginal(row / self.num_steps)
        mean, variance = self._marginal(self._shares[row])
        factor = self._keep * (variance / before[1]).sqrt()
        return mean + factor * (x - before[0]), ((1 - self._keep**2) * variance).log()

    def path_moments(self, states):
        pairs = [self.moments(x, self.num_steps - 1 - row) for row, x in enumerate(states)]
        means, _ = zip(*pairs, strict=True)
        return torch.stack(means), torch.stack([v.expand_as(m) for m, v in pairs])


class GaussianHead:
    def __init__(self, dim, num_steps):
        self.latent_dim, self.num_steps = dim, num_steps

    def law(self, z, guidance_scale=1.0) -> Any:
        mean, deviation = z.chunk(2, dim=-1)
        return GaussianLaw(mean, deviation, self.num_steps)


class GaussianModel:
    """Latent i is N(mean + pull * (sum of the known ones), deviation^2)."""

    def __init__(self, mean, deviation, *, dim=1, num_tokens=1, pull=0.0, num_steps=10):
        self.head: Any = GaussianHead(dim, num_steps)
        self.num_tokens = num_tokens
        self.grid: tuple[int, int] | None = None
        self.mean = torch.as_tensor(mean, dtype=torch.float64).expand(dim)
        self.deviation = torch.as_tensor(deviation, dtype=torch.float64).expand(dim)
        self.pull = pull

    def start(self, conditions, guidance_scale=1.0, order=None):
        return GaussianState(self, len(conditions), order)

    def decode(self, tokens):
        raise NotImplementedError


class GaussianState:
    def __init__(self, model, num, order):
        self.model, self.order = model, order
        self.lengths = torch.zeros(num, dtype=torch.int64)
        self.latents = torch.zeros(num, model.num_tokens, model.head.latent_dim)
        self.known = torch.zeros(num, model.num_tokens, dtype=torch.bool)

    def contexts(self, latents, known, images):
        past = (latents.double() * known[..., None]).sum(1, keepdim=True)
        mean = self.model.mean + self.model.pull * past
        mean = mean.expand(-1, self.model.num_tokens, -1)
        return torch.cat([mean, self.model.deviation.expand_as(mean)], dim=-1)

    def condition(self, count):
        places = self.order[:, int(self.lengths[0]) :][:, :count]
        z = self.contexts(self.latents, self.known, None)
        return z.gather(1, places[..., None].expand(-1, -1, z.shape[-1]))

    def feed(self, latents):
        count = latents.shape[1]
        places = self.order[:, int(self.lengths[0]) :][:, :count]
        self.known = self.known.scatter(1, places, True)
        where = places[..., None].expand_as(latents)
        self.latents = self.latents.double().scatter(1, where, latents.double())
        self.lengths = self.lengths + count


def distance(samples, mean=0.3, deviation=1.2):
    return float(kstest(samples.double().flatten().numpy(), norm(mean, deviation).cdf).statistic)
