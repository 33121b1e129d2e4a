"""What a metric returns: a value, how sure it is, and how many images it rests on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Score:
    """One measured number.

    Attributes:
        value: the figure itself.
        num_images: images (or pairs) it was computed from.
        interval: 95 % confidence interval, or None where none is defined.
        standard_error: of `value`, or None.
        method: how the interval was made, such as "jackknife-20".
        details: further figures that belong to this one.
    """

    value: float
    num_images: int
    interval: tuple[float, float] | None = None
    standard_error: float | None = None
    method: str | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.value:.4f}"
        return f"{self.value:.4f} [{self.interval[0]:.4f}, {self.interval[1]:.4f}]"

    def to_dict(self) -> dict[str, Any]:
        """The score as plain JSON types."""
        entries = asdict(self)
        if self.interval is not None:
            entries["interval"] = list(self.interval)
        return {key: value for key, value in entries.items() if value not in (None, {})}


def normal_score(
    value: float, standard_error: float, num_images: int, method: str, **details: Any
) -> Score:
    """A `Score` whose 95 % interval is `value` plus or minus 1.96 standard errors."""
    half = 1.959963984540054 * standard_error
    return Score(value, num_images, (value - half, value + half), standard_error, method, details)
