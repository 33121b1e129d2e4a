"""Pseudo tokens: places behind a candidate that hold no token yet.

A pseudo token j stands j + 1 places behind a candidate and looks at it, at what the candidate looks
at, and at the pseudo tokens before it. What the target's output layer says there is a guess for the
token one place further. So guesses and verification share a pass, see `pseudo_drafter`. No rule ever
accepts a pseudo token, as its number is outside the vocabulary.

What is at such a place is trained: embeddings (PPD), a hidden state at a middle layer that is a
linear map of the candidate's own (hidden transfer), or one embedding for all, with the whole target
(lexical units).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from ....checkpoint import load_strictly, read_state_dict
from ....contracts import Edit
from ....errors import CheckpointError, InputError, unknown_name
from ....files import user_path, write_bytes, write_json
from ....schema import Between, Count, Layers, Size, hints_of
from ....stored import read_sizes

NUM_RANKS = 8
"""Guesses of a pseudo token that may become candidates."""

FIRST_RATE, NEXT_RATE, DEEPER_RATE = 0.4, 0.3, 0.7
"""Acceptances where none were measured: of the first guess behind a candidate, and by what they fall
with each rank and with each place further."""


class PseudoTokens(nn.Module):
    """K pseudo tokens behind a candidate, each of E members whose words are averaged.

    Attributes:
        ranks: [K, NUM_RANKS], how often guess r of pseudo token k was right on answers that the fit
            had not seen.
        shape: what is drafted from the guesses, see `PseudoDrafter`.
        threshold: likewise.
    """

    kind: ClassVar[str]
    shape: ClassVar[str] = "tree"
    threshold: float = 0.0
    num_ensemble: int = 1
    ranks: Tensor

    def __init__(self, hidden_size: int, num_guesses: int) -> None:
        super().__init__()
        self.hidden_size, self.num_guesses = hidden_size, num_guesses
        places, ranks = torch.arange(num_guesses)[:, None], torch.arange(NUM_RANKS)
        self.register_buffer("ranks", FIRST_RATE * DEEPER_RATE**places * NEXT_RATE**ranks)

    def vectors(self) -> Tensor:
        """What is fed at pseudo tokens, [K E, C]: all members of the first, then of the second, ..."""
        raise NotImplementedError

    def edit(self, owners: Tensor, numbers: Tensor) -> Edit | None:
        """What layers see instead of the hidden states [B, T, C]; None to change nothing.

        Args:
            owners: [B, T] int64, the place of the candidate that a pseudo token stands behind.
            numbers: [B, T] int64, which pseudo token a place is; -1 for a token.
        """
        return None


class PromptTokens(PseudoTokens):
    """Embeddings of K pseudo tokens; of several members for each, the logits are averaged.

    Args:
        hidden_size: C of the target.
        num_guesses: K.
        num_ensemble: E. Member e of a pseudo token looks at members e of those before it only.

    Paper: Chen et al., "Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration
    of LLM Inference", 2024 (PPD), section 3 (ensemble prompt tokens).
    """

    kind: ClassVar[str] = "ppd"

    def __init__(self, hidden_size: Size, num_guesses: Size, num_ensemble: Size = 1) -> None:
        super().__init__(hidden_size, num_guesses)
        self.num_ensemble = num_ensemble
        self.embeddings = nn.Parameter(0.02 * torch.randn(num_guesses, num_ensemble, hidden_size))

    def vectors(self) -> Tensor:
        """See `PseudoTokens`."""
        return self.embeddings.flatten(0, 1)


class HiddenTransfer(PseudoTokens):
    """Hidden states of K pseudo tokens, each at a layer of its own, linear maps of their candidate's.

    Args:
        hidden_size: C of the target.
        num_guesses: K.
        layers: [K], the layer whose input at pseudo token k becomes map k of what goes into it at the
            candidate.

    Raises:
        InputError: another number of layers than of guesses.

    Paper: Wu et al., "Parallel Decoding via Hidden Transfer for Lossless Large Language Model
    Acceleration", 2024, section 3.
    """

    kind: ClassVar[str] = "hidden_transfer"

    def __init__(
        self,
        hidden_size: Size,
        num_guesses: Layers,
        layers: Annotated[Sequence[Count], Between(1, 64)],
    ) -> None:
        super().__init__(hidden_size, num_guesses)
        self.layers = tuple(layers)
        if len(self.layers) != num_guesses:
            raise InputError(f"layers {self.layers}: expected {num_guesses}, one for each guess")
        maps = [nn.Linear(hidden_size, hidden_size) for _ in range(num_guesses)]
        self.maps = nn.ModuleList(maps)
        for linear in maps:
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)

    def vectors(self) -> Tensor:
        """See `PseudoTokens`; the layers below a transfer make nothing of them."""
        return torch.zeros(self.num_guesses, self.hidden_size, device=self.ranks.device)

    def edit(self, owners: Tensor, numbers: Tensor) -> Edit | None:
        """See `PseudoTokens`."""

        def at(layer: int) -> Callable[[Tensor], Tensor]:
            own = [number for number, place in enumerate(self.layers) if place == layer]

            def change(hidden: Tensor) -> Tensor:
                index = owners[..., None].expand(*hidden.shape)
                source, out = hidden.gather(1, index).to(self.ranks.dtype), hidden
                for number in own:
                    moved = self.maps[number](source).to(hidden.dtype)
                    out = torch.where((numbers == number)[..., None], moved, out)
                return out

            return change

        return {layer: at(layer) for layer in sorted(set(self.layers))}


class UnitTokens(PseudoTokens):
    """One embedding for all places of a lexical unit but the first, in a target trained with it.

    Args:
        hidden_size: C of the target.
        num_guesses: K, the most tokens of a unit but one.
        threshold: least confidence of a token in a unit.

    Paper: Sun et al., "Decoding at the Speed of Thought: Harnessing Parallel Decoding of Lexical
    Units for LLMs", 2024 (LUD), section 3.
    """

    kind: ClassVar[str] = "lud"
    shape: ClassVar[str] = "unit"

    def __init__(
        self, hidden_size: Size, num_guesses: Size, threshold: Annotated[float, Between(0, 1)] = 0.8
    ) -> None:
        super().__init__(hidden_size, num_guesses)
        self.threshold = threshold
        self.embedding = nn.Parameter(0.02 * torch.randn(hidden_size))

    def vectors(self) -> Tensor:
        """See `PseudoTokens`."""
        return self.embedding.expand(self.num_guesses, -1)


KINDS: dict[str, Any] = {cls.kind: cls for cls in (PromptTokens, HiddenTransfer, UnitTokens)}


def save_pseudo(module: PseudoTokens, folder: str | Path, **facts: Any) -> None:
    """Write pseudo tokens into a folder."""
    from safetensors.torch import save

    folder = user_path(folder)
    weights = {name: value.contiguous() for name, value in module.state_dict().items()}
    write_bytes(folder / "pseudo.safetensors", save(weights))
    config = {name: getattr(module, name) for name in ("kind", *hints_of(type(module)))}
    write_json(folder / "pseudo.json", {**config, **facts})


def load_pseudo(folder: str | Path) -> Any:
    """Pseudo tokens written by `save_pseudo`.

    Raises:
        CheckpointError: a file that is missing or does not fit.
    """
    folder = user_path(folder)
    cls, sizes = read_sizes(folder / "pseudo.json", KINDS, "pseudo tokens")
    weights = read_state_dict(folder / "pseudo.safetensors", ())
    try:
        return load_strictly(cls, sizes, weights, str(folder))
    except InputError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def make_pseudo(kind: str, hidden_size: int, num_guesses: int, **sizes: Any) -> Any:
    """Fresh pseudo tokens.

    Raises:
        InputError: an unknown kind.
    """
    if kind not in KINDS:
        raise unknown_name("kind of pseudo tokens", kind, KINDS)
    return KINDS[kind](hidden_size, num_guesses, **sizes)
