"""Rules of verification that are wrong by a given share: a test of a law has to find them."""

from __future__ import annotations

from dataclasses import replace

import torch

from arvision.decoding import verify


class GenerousNoise:
    """Acceptance uniforms too small by a share `off`: drafts are accepted that much too often."""

    def __init__(self, noise, off):
        self.noise, self.off = noise, off

    def __len__(self):
        return len(self.noise)

    def select(self, rows):
        return GenerousNoise(self.noise.select(rows), self.off)

    def uniform(self, positions, purpose, *args, **kwargs):
        out = self.noise.uniform(positions, purpose, *args, **kwargs)
        return out * (1 - self.off) if purpose == "accept" else out


def generous(rule, off):
    """A rule whose acceptance probability is too large by a share `off`."""
    return lambda batch: rule(replace(batch, noise=GenerousNoise(batch.noise, off)))


def clinging(off):
    """A Gumbel walk along a chain that keeps a share `off` of the drafts that it should change."""

    def rule(chain):
        verdict = verify.gumbel_coupling(chain)
        if chain.drafts.shape[1] == 0:
            return verdict
        holds = chain.noise.uniform(chain.positions[:, :-1], "accept", chain.number) < off
        tokens = verdict.tokens.clone()
        tokens[:, :-1] = torch.where(holds & (chain.drafts >= 0), chain.drafts, tokens[:, :-1])
        return verify.Verdict(tokens, verify.num_final(chain.drafts == tokens[:, :-1]))

    return rule
