"""The same seed gives the same picture, whatever the sampler, window or batch."""

import torch

import arvision

pipe = arvision.load("llamagen-fashion", dtype="float64")
plain = arvision.sample(pipe, "bag", "ar", num_images=4, seed=3)
fast = arvision.sample(pipe, "bag", "sjd", num_images=4, seed=3, window=32)
third = arvision.sample(pipe, "bag", "sjd", seed=[(3, 2)])

assert torch.equal(plain.tokens, fast.tokens)
assert torch.equal(plain.tokens[2], third.tokens[0])
print(plain.stats.forward_passes, "passes became", fast.stats.forward_passes)
