"""torchmetrics classes for training loops: `update`, `compute`, `reset`, synchronised over ranks.

They take uint8 [B, 3, H, W] and any extractor (a registered name or a module). States are float64
moments, not raw sums, and merge in rank order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, check_count, optional
from .classifier import class_consistency
from .features import Extractor, get_extractor
from .frechet import check_gaussian, frechet_distance
from .moments import Moments, merge_all
from .pixels import check_images
from .scores import inception_score, kernel_distance, precision_recall

with optional("eval", "a metric of a training loop"):
    from torchmetrics import Metric
    from torchmetrics.utilities.data import dim_zero_cat


def _pack(moments: Moments) -> Tensor:
    count = torch.tensor([float(moments.count)], dtype=torch.float64, device=moments.mean.device)
    return torch.cat([count, moments.mean, moments.scatter.reshape(-1)])


def _unpack(packed: Tensor, dim: int) -> Moments:
    scatter = packed[1 + dim :].reshape(dim, dim)
    return Moments(int(packed[0].item()), packed[1 : 1 + dim], scatter)


def _merge_packed(stacked: Tensor) -> Tensor:
    """Merge packed moments [ranks, 1 + D + D^2] in rank order."""
    dim = round(((4 * stacked.shape[1] - 3) ** 0.5 - 1) / 2)
    return _pack(merge_all(_unpack(row, dim) for row in stacked))


class _ExtractorMetric(Metric):
    """Holds an extractor that stays in evaluation mode."""

    is_differentiable = False
    full_state_update = False
    extractor: Extractor

    def __init__(self, extractor: str | nn.Module = "lite0", **options: Any) -> None:
        super().__init__(**options)
        self.extractor = get_extractor(extractor)

    def _features(self, images: Tensor) -> Tensor:
        return self.extractor(check_images(images))


class FrechetDistance(_ExtractorMetric):
    """Squared Frechet distance of two streams of images; FID with `inception-adm`.

    Args:
        extractor: a registered name or a module.
        reset_real: whether `reset` forgets the real images too.
        **options: of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = FrechetDistance("random-conv")
        >>> images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
        >>> metric.update(images, real=True)
        >>> metric.update(images, real=False)
        >>> float(metric.compute()) < 1e-9
        True
    """

    higher_is_better = False
    real_moments: Tensor
    fake_moments: Tensor

    def __init__(
        self, extractor: str | nn.Module = "lite0", reset_real: bool = True, **options: Any
    ) -> None:
        super().__init__(extractor, **options)
        self.reset_real = reset_real
        empty = _pack(Moments.zero(self.extractor.facts.dim))
        for name in ("real_moments", "fake_moments"):
            self.add_state(name, empty.clone(), dist_reduce_fx=_merge_packed)

    def update(self, images: Tensor, real: bool) -> None:
        """Add uint8 images [B, 3, H, W] to the real or to the generated ones."""
        name = "real_moments" if real else "fake_moments"
        known: Tensor = getattr(self, name)
        moments = _unpack(known, self.extractor.facts.dim)  # views, so that `add` fills the state
        moments.add(self._features(images).to(known.device))
        known[0] = moments.count

    def set_real_statistics(self, mean: Any, covariance: Any, count: int = 2) -> None:
        """Take the real side from a file's mean [D] and covariance [D, D].

        Raises:
            InputError: another width, no covariance, or a count below 2.
        """
        if check_count("count", count) < 2:
            raise InputError(f"count {count}: expected at least 2")
        check_gaussian(mean, covariance, "statistics")
        mean, covariance = (torch.as_tensor(x).double() for x in (mean, covariance))
        dim = self.extractor.facts.dim
        if mean.shape != (dim,) or covariance.shape != (dim, dim):
            given = f"{list(mean.shape)} and {list(covariance.shape)}"
            raise InputError(f"statistics of shape {given}: expected [{dim}] and [{dim}, {dim}]")
        known = self.real_moments
        self.real_moments = _pack(Moments(count, mean, covariance * (count - 1))).to(known.device)

    def compute(self) -> Tensor:
        """The distance, float64.

        Raises:
            InputError: fewer than 2 images on a side.
        """
        dim = self.extractor.facts.dim
        real, fake = _unpack(self.real_moments, dim), _unpack(self.fake_moments, dim)
        value = frechet_distance(real.mean, real.covariance(), fake.mean, fake.covariance())
        return torch.tensor(value, dtype=torch.float64, device=real.mean.device)

    def reset(self) -> None:
        """Forget the generated images, and the real ones unless `reset_real` is false."""
        kept = self.real_moments.clone()
        super().reset()
        if not self.reset_real:
            self.real_moments = kept.to(self.real_moments.device)


class _RowMetric(_ExtractorMetric):
    """Keeps feature rows of both sides."""

    real_rows: list[Tensor]
    fake_rows: list[Tensor]

    def __init__(self, extractor: str | nn.Module = "lite0", **options: Any) -> None:
        super().__init__(extractor, **options)
        for name in ("real_rows", "fake_rows"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, images: Tensor, real: bool) -> None:
        """Add uint8 images [B, 3, H, W]."""
        rows = self.real_rows if real else self.fake_rows
        rows.append(self._features(images).to(self.device))

    def _both(self) -> tuple[Tensor, Tensor]:
        if len(self.real_rows) == 0 or len(self.fake_rows) == 0:
            raise InputError("expected real and generated images before compute")
        return dim_zero_cat(self.fake_rows), dim_zero_cat(self.real_rows)


class KernelDistance(_RowMetric):
    """KID. Args: see `kernel_distance`."""

    higher_is_better = False

    def __init__(
        self,
        extractor: str | nn.Module = "lite0",
        num_subsets: int = 100,
        subset_size: int = 1000,
        **options: Any,
    ) -> None:
        super().__init__(extractor, **options)
        self.num_subsets, self.subset_size = num_subsets, subset_size

    def compute(self) -> Tensor:
        """The mean over subsets, float64."""
        size = {"num_subsets": self.num_subsets, "subset_size": self.subset_size}
        return torch.tensor(kernel_distance(*self._both(), **size).value, dtype=torch.float64)


class PrecisionRecall(_RowMetric):
    """Precision, recall, density and coverage, by ADM's definitions."""

    higher_is_better = True

    def __init__(self, extractor: str | nn.Module = "lite0", k: int = 3, **options: Any) -> None:
        super().__init__(extractor, **options)
        self.k = k

    def compute(self) -> dict[str, Tensor]:
        """The four shares, float64."""
        found = precision_recall(*self._both(), k=self.k)
        return {name: torch.tensor(s.value, dtype=torch.float64) for name, s in found.items()}


class InceptionScore(_ExtractorMetric):
    """Inception score of images in the order they come: keep classes interleaved."""

    higher_is_better = True
    rows: list[Tensor]

    def __init__(
        self, extractor: str | nn.Module = "inception-adm", num_splits: int = 10, **options: Any
    ) -> None:
        super().__init__(extractor, **options)
        if "logits" not in self.extractor.facts.outputs:
            raise InputError(f"extractor {self.extractor.facts.name} has no logits for this score")
        self.num_splits = num_splits
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, images: Tensor) -> None:
        """Add uint8 images [B, 3, H, W]."""
        self.rows.append(self.extractor.outputs(check_images(images))["logits"].to(self.device))

    def compute(self) -> Tensor:
        """The mean over splits, float64."""
        if len(self.rows) == 0:
            raise InputError("expected images before compute")
        value = inception_score(dim_zero_cat(self.rows), self.num_splits).value
        return torch.tensor(value, dtype=torch.float64)


class ClassConsistency(Metric):
    """Share of Fashion-MNIST-like images in the class that they were asked for."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    hits: Tensor
    seen: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in ("hits", "seen"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Tensor, labels: Tensor) -> None:
        """Add uint8 images [B, 1 or 3, 32, 32] and their class ids [B]."""
        score = class_consistency(images, labels)
        self.hits = self.hits + round(score.value * score.num_images)
        self.seen = self.seen + score.num_images

    def compute(self) -> Tensor:
        """The share, float64."""
        if float(self.seen) == 0:
            raise InputError("expected images before compute")
        return self.hits / self.seen
