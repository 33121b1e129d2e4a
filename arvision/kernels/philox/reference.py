"""Philox4x32-10 in plain PyTorch, on 32-bit words held in int64."""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF
BLOCK = 8192
"""Counters worked on at a time on a CPU, so that the ten rounds stay in its cache."""


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> Tensor:
    """Four random 32-bit words for each counter and key.

    Args:
        counter: four int64 tensors of words in 0..2^32-1 that broadcast together.
        key: two int64 tensors of words that broadcast with them.

    Returns:
        [..., 4] int64 of words in 0..2^32-1.

    Paper: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011, section 3.
    """
    words = torch.broadcast_tensors(*counter, *key)
    if words[0].device.type != "cpu" or words[0].numel() <= BLOCK:
        return _rounds(*words)
    flat = torch.stack(words).view(6, -1)
    made = torch.empty(flat.shape[1], 4, dtype=torch.int64)
    for part, block in zip(made.split(BLOCK), flat.split(BLOCK, dim=1), strict=True):
        part.copy_(_rounds(*block))
    return made.view(*words[0].shape, 4)


def _rounds(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
    """The ten rounds, words [...] to [..., 4]."""
    # Words 0 and 2 are multiplied, words 1 and 3 are mixed in: two stacked tensors halve the number
    # of calls. A 64-bit product wraps, but its bits are right, and the mask undoes the sign.
    product_of = torch.tensor(MULTIPLIERS, device=c0.device).view(2, *[1] * c0.dim())
    multiplied, mixed = torch.stack([c0, c2]), torch.stack([c3, c1])
    # `keys` is ordered like the words that a product's high half lands on.
    keys = torch.stack([k1, k0])
    step = torch.tensor([WEYL[1], WEYL[0]], device=c0.device).view_as(product_of)
    for _ in range(ROUNDS):
        product = multiplied * product_of
        high, low = (product >> 32) & WORD, product & WORD
        landed = high ^ mixed ^ keys
        # high(c0) lands on word 2, high(c2) on word 0; low(c0) becomes word 3, low(c2) word 1.
        multiplied, mixed = landed.flip(0), low
        keys = (keys + step) & WORD
    return torch.stack([multiplied[0], mixed[1], multiplied[1], mixed[0]], dim=-1)
