"""Any object with the members of a token model can be sampled from."""

import torch

from arvision import get_sampler


class CoinModel:
    """Sixteen coins, each more likely to show what the one before it showed."""

    vocab_size, num_tokens, grid = 2, 16, None

    def start(self, conditions, guidance_scale=1.0):
        return CoinState(len(conditions)), torch.zeros(len(conditions), 2)


class CoinState:
    allows_overrun = True  # optional: candidates past the last coin are harmless

    def __init__(self, batch):
        self.lengths = torch.zeros(batch, dtype=torch.int64)

    def extend(self, tokens, parents=None):
        return torch.nn.functional.one_hot(tokens, 2) * 1.5  # logits of what follows each token

    def commit(self, kept, counts):
        self.lengths += counts

    def select(self, rows):  # optional: finished rows leave the batch
        self.lengths = self.lengths[rows]


for name in ("ar", "sjd"):
    out = get_sampler(name)(CoinModel(), [None] * 2, seeds=[0, 1])
    print(name, out.stats.forward_passes, "passes", out.tokens.tolist())
