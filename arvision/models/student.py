"""What the students of all families are: vectors in, logits and vectors of a whole image out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contracts import Conditions
from ..decoding.student import check_codebook
from ..errors import InputError
from ..networks import enter, place_of
from .conditions import resolve_class

if TYPE_CHECKING:
    from typing_extensions import Self


class VectorHead(nn.Module):
    """Features to the vector that stands at a position, modulated by the condition."""

    def __init__(self, width: int, code_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, code_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """[B, N, C] and one conditioning row [B, 1, C] to [B, N, D]."""
        shift, scale = (self.scale_shift_table[None] + condition).chunk(2, dim=1)
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


def check_timesteps(timesteps: Sequence[int], num_units: int, unit: str = "") -> None:
    """Refuse numbers of known units that no pass can start from.

    Args:
        timesteps: to check.
        num_units: of an image.
        unit: for the message, such as " scales".

    Raises:
        InputError: see above.
    """
    steps = list(timesteps)
    if not steps or steps[0] != 0 or sorted(set(steps)) != steps or steps[-1] >= num_units:
        raise InputError(f"timesteps {steps}: expected 0 first, growing, below {num_units}{unit}")


@dataclass
class About:
    """A student's pass with its conditions: a function of vectors alone.

    Attributes:
        transformer: the network.
        condition: what it is told, [B, ...].
        counts: [B] int64, known units.
        mask: of the condition, where it has one.
    """

    transformer: Any
    condition: Tensor
    counts: Tensor
    mask: list[Tensor]

    def __call__(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, N, V] and vectors [B, N, D] of all positions, from vectors [B, N, D]."""
        return self.transformer(self.condition, vectors, self.counts, *self.mask)


class Student:
    """A student with its image tokenizer; see `arvision.contracts.StudentModel`.

    A family adds how it is made, how it decodes, and `fits`: sizes that the tokenizer must share.

    Args:
        transformer: the network.
        tokenizer: its teacher's image tokenizer.
        class_names: names of the classes, in the order of their ids.

    Raises:
        InputError: another tokenizer than the one that the student was trained for.
    """

    fits: Mapping[str, str]
    """Names of sizes in the network's configuration, and what the tokenizer calls them."""

    def __init__(
        self, transformer: Any, tokenizer: Any, class_names: Sequence[str] | None = None
    ) -> None:
        config = transformer.config
        if tokenizer is None:
            raise InputError("a student needs its image tokenizer: its codes are what it is fed")
        for ours, theirs in self.fits.items():
            if tokenizer.config[theirs] != config[ours]:
                raise InputError(
                    f"the tokenizer has {theirs} {tokenizer.config[theirs]}: expected {config[ours]}, "
                    "that of the student's teacher"
                )
        self.transformer, self.tokenizer = transformer, tokenizer
        self.class_names = list(class_names or [])
        self.num_tokens: int = transformer.num_tokens
        self.timesteps: tuple[int, ...] = tuple(config["timesteps"])
        self.unit_ends: tuple[int, ...] = transformer.ends()
        self.split: int = len(self.unit_ends) if config["split"] is None else config["split"]
        self.teacher_name: str | None = config["teacher_name"]
        check_codebook(self.codebook, config["codebook_mark"])

    @property
    def device(self) -> torch.device:
        """Where the transformer runs."""
        return place_of(self.transformer)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the transformer."""
        return self.transformer.dtype

    @property
    def vocab_size(self) -> int:
        """Codes of the image tokenizer."""
        return self.tokenizer.config["codebook_size"]

    @property
    def codebook(self) -> Tensor:
        """Codes of the tokenizer [V, D], as the student is fed them."""
        return enter(self.tokenizer, "codes").detach()

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast both networks, as `nn.Module.to` does; returns the model itself."""
        self.transformer.to(*args, **kwargs)
        self.tokenizer.to(*args, **kwargs)
        return self

    @torch.no_grad()
    def predict(self, conditions: Conditions, vectors: Tensor, known: int) -> tuple[Tensor, Tensor]:
        """Logits [B, N, V] and vectors [B, N, D] of all positions from one pass.

        Args:
            conditions: one per image.
            vectors: [B, N, D], codes of the first `known` units, then noise.
            known: one of `timesteps`.

        Raises:
            InputError: no conditions, or one that the model does not know.
        """
        return self.about(conditions, known)(vectors)

    def about(self, conditions: Conditions, known: int) -> About:
        """`predict` from vectors alone."""
        condition, *mask = self.describe(conditions)
        counts = torch.full((len(conditions),), known, device=self.device)
        return About(self.transformer, condition, counts, mask)

    def start_from(self, other: Student) -> None:
        """Take over the weights of a trained student, perhaps of another teacher, wherever shapes allow."""
        own, given = self.transformer.state_dict(), other.transformer.state_dict()
        fitting = {k: v for k, v in given.items() if k in own and own[k].shape == v.shape}
        self.transformer.load_state_dict(fitting, strict=False)

    def describe(self, conditions: Conditions) -> tuple[Tensor, ...]:
        """What the network is told of conditions: class ids [B] here, more in a family with captions.

        The first goes before the vectors, the others (a mask) behind the numbers of known units.

        Raises:
            InputError: no conditions, or one that the model does not know.
        """
        if len(conditions) == 0:
            raise InputError("no conditions: expected at least one")
        num_classes = self.transformer.config["num_classes"]
        ids = [resolve_class(c, num_classes, self.class_names) for c in conditions]
        return (torch.tensor(ids, device=self.device),)
