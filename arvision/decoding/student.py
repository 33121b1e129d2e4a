"""What students of Distilled Decoding share: recognising a codebook, and the nearest code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError


def codebook_mark(codebook: Tensor) -> list[float]:
    """A few numbers that tell a codebook [V, D] from another one, but not from its rounding."""
    codes = codebook.detach().cpu().double()
    weights = torch.arange(len(codes), dtype=torch.float64).cos()
    return [round(value, 4) for value in (weights @ codes).tolist()]


def check_codebook(codebook: Tensor, mark: Sequence[float] | None) -> None:
    """Refuse a codebook that is not the one with this mark.

    Raises:
        InputError: see above.
    """
    if mark is None:
        return
    ours, theirs = torch.tensor(codebook_mark(codebook)), torch.tensor(list(mark))
    if len(ours) != len(theirs) or float((ours - theirs).norm()) > 0.05 * float(theirs.norm()):
        raise InputError(
            "the tokenizer has another codebook than the one that the student was trained for: "
            "expected the tokenizer of its teacher"
        )


def nearest_code(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index [...] of the nearest code of each vector [..., D], by one matrix product."""
    codes = codebook.to(vectors)
    return (vectors @ codes.T - codes.square().sum(-1) / 2).argmax(-1)
