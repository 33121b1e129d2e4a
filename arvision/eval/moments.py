"""Streaming mean and covariance in float64, which merge without losing digits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError

NUM_GROUPS = 20
BUFFER_ROWS = 512


def check_features(features: Tensor | np.ndarray, name: str = "features") -> Tensor:
    """`features` [N, D] as a finite float64 tensor on its device.

    Raises:
        InputError: not a matrix, or a value that is not finite.
    """
    matrix = torch.as_tensor(features)
    if matrix.ndim != 2:
        raise InputError(f"{name} have shape {list(matrix.shape)}: expected [N, D]")
    matrix = matrix.double()
    if not bool(torch.isfinite(matrix).all()):
        raise InputError(f"{name} hold NaN or infinite values: expected finite numbers")
    return matrix


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of feature rows.

    Attributes:
        count: rows seen.
        mean: [D] float64.
        scatter: [D, D] float64, the sum of outer products of deviations from the mean.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def zero(cls, dim: int, device: torch.device | str = "cpu") -> Moments:
        """No rows of width `dim`."""
        kind = {"dtype": torch.float64, "device": device}
        return cls(0, torch.zeros(dim, **kind), torch.zeros(dim, dim, **kind))

    @classmethod
    def of(cls, features: Tensor | np.ndarray) -> Moments:
        """Moments of the rows of `features` [N, D], by the two-pass formula."""
        rows = check_features(features)
        if len(rows) == 0:
            return cls.zero(rows.shape[1], rows.device)
        mean = rows.mean(0)
        centred = rows - mean
        return cls(len(rows), mean, centred.T @ centred)

    @property
    def dim(self) -> int:
        """Width of the features."""
        return len(self.mean)

    def add(self, features: Tensor | np.ndarray) -> None:
        """Fold the rows of `features` [N, D] in, in place: `merge` without its copies.

        Raises:
            InputError: another width.
        """
        rows = check_features(features)
        if rows.shape[1] != self.dim:
            raise InputError(f"features have {rows.shape[1]} dimensions: expected {self.dim}")
        if len(rows) == 0:
            return
        mean, total = rows.mean(0), self.count + len(rows)
        step, rows = mean - self.mean, rows - mean
        self.scatter.addmm_(rows.T, rows)
        self.scatter.addr_(step, step, alpha=self.count * len(rows) / total)
        self.mean += step * (len(rows) / total)
        self.count = total

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets together.

        Raises:
            InputError: different widths.

        Paper: Chan, Golub and LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for
        Computing Sample Variances", eq. 2.1.
        """
        if self.dim != other.dim:
            raise InputError(f"moments of {self.dim} and {other.dim} dimensions do not merge")
        if self.count == 0 or other.count == 0:
            return self if other.count == 0 else other
        total = self.count + other.count
        step = other.mean - self.mean
        mean = self.mean + step * (other.count / total)
        scatter = self.scatter + other.scatter
        scatter += torch.outer(step, step) * (self.count * other.count / total)
        return Moments(total, mean, scatter)

    def without(self, part: Moments) -> Moments:
        """Moments of the rest, when `part` is a subset; `merge` backwards.

        Raises:
            InputError: `part` has as many rows or more.
        """
        rest = self.count - part.count
        if rest < 1:
            raise InputError(f"{part.count} rows cannot be taken out of {self.count}")
        mean = (self.mean * self.count - part.mean * part.count) / rest
        step = part.mean - mean
        scatter = self.scatter - part.scatter
        scatter -= torch.outer(step, step) * (part.count * rest / self.count)
        return Moments(rest, mean, scatter)

    def covariance(self) -> Tensor:
        """Unbiased covariance [D, D].

        Raises:
            InputError: fewer than 2 rows.
        """
        if self.count < 2:
            raise InputError(f"{self.count} images: expected at least 2 for a covariance")
        return self.scatter / (self.count - 1)


def merge_all(parts: Iterable[Moments]) -> Moments:
    """Merge in the given order, which fixes the rounding."""
    parts = list(parts)
    if not parts:
        raise InputError("no moments to merge: expected at least one part")
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    return merged


class GroupedMoments:
    """Moments kept in groups, so that a jackknife can leave one group out.

    Rows are gathered per group and folded in `BUFFER_ROWS` at a time: the result depends on the
    rows and their order, not on how they were cut into batches.

    Args:
        num_groups: groups kept; memory is num_groups * D^2 * 8 bytes, whatever the number of rows.
    """

    def __init__(self, num_groups: int = NUM_GROUPS) -> None:
        if num_groups < 1:
            raise InputError(f"num_groups is {num_groups}: expected at least 1")
        self.num_groups = num_groups
        self._moments: list[Moments | None] = [None] * num_groups
        self._buffers: list[list[Tensor]] = [[] for _ in range(num_groups)]

    def update(self, features: Tensor | np.ndarray, groups: Sequence[int] | Tensor) -> None:
        """Add rows [N, D]; `groups` [N] says which group each belongs to (modulo num_groups)."""
        rows = check_features(features)
        for row, group in zip(rows, torch.as_tensor(groups).tolist(), strict=True):
            buffer = self._buffers[group % self.num_groups]
            buffer.append(row)
            if len(buffer) == BUFFER_ROWS:
                self._fold(group % self.num_groups)

    def _fold(self, group: int) -> None:
        rows, self._buffers[group] = torch.stack(self._buffers[group]), []
        known = self._moments[group]
        if known is None:
            self._moments[group] = Moments.of(rows)
        else:
            known.add(rows)

    def parts(self) -> list[Moments]:
        """Moments of the groups that hold rows, in order."""
        for group, buffer in enumerate(self._buffers):
            if buffer:
                self._fold(group)
        return [part for part in self._moments if part is not None]

    def total(self) -> Moments:
        """Moments of all rows.

        Raises:
            InputError: no rows.
        """
        parts = self.parts()
        if not parts:
            raise InputError("no images: expected at least 2")
        return merge_all(parts)


class GroupAssigner:
    """Deals images into jackknife groups, evenly within each class.

    With labels, the k-th image of a class goes to group (k + label) mod num_groups, whatever the
    order of the file. Without, a multiplicative hash of the image's index spreads both sorted and
    interleaved orders evenly.
    """

    def __init__(self, num_groups: int = NUM_GROUPS) -> None:
        self.num_groups = num_groups
        self._seen: dict[int, int] = {}

    def __call__(self, indices: Sequence[int], labels: Sequence[int] | None = None) -> list[int]:
        """Groups of images `indices`, which must come in ascending order over the calls."""
        if labels is None:
            return [((i * 2654435761) % 2**32) * self.num_groups >> 32 for i in indices]
        groups = []
        for label in labels:
            count = self._seen.get(label, 0)
            self._seen[label] = count + 1
            groups.append((count + label) % self.num_groups)
        return groups
