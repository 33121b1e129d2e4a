"""Candidates with parents: which of them may look at which, and how deep they stand."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError


def check_parents(parents: Tensor, num: int) -> None:
    """Refuse a list of parents that is not a tree in topological order.

    Args:
        parents: [T] int64, -1 for the committed prefix.
        num: T.

    Raises:
        InputError: another shape, or a parent that does not come before its child.
    """
    if parents.shape != (num,):
        raise InputError(f"parents {tuple(parents.shape)}: expected [{num}], one per candidate")
    order = torch.arange(num, device=parents.device)
    wrong = ((parents >= order) | (parents < -1)).nonzero()
    if len(wrong):
        child = int(wrong[0])
        raise InputError(
            f"candidate {child} has parent {int(parents[child])}: expected -1 (the committed "
            f"prefix) or an earlier candidate"
        )


def ancestor_mask(parents: Tensor) -> Tensor:
    """[T, T] bool, true where candidate t descends from (or is) candidate u; parents [T]."""
    num = len(parents)
    mask = torch.eye(num, dtype=torch.bool, device=parents.device)
    for child, parent in enumerate(parents.tolist()):
        if parent >= 0:
            mask[child] |= mask[parent]
    return mask


def depths(parents: Tensor) -> Tensor:
    """[T] int64, number of ancestors of each candidate among the candidates; parents [T]."""
    return ancestor_mask(parents).sum(1) - 1
