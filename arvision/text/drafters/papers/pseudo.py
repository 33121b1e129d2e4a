"""Guesses from pseudo tokens: places behind a candidate that hold no token yet.

A pseudo token j stands j + 1 places behind a candidate and looks at it, at what the candidate looks
at, and at the pseudo tokens before it. What the target's output layer says there is a guess for the
token one place further. So guesses and verification share a pass: behind the last known token and
behind every draft of a chain stand K pseudo tokens, and those of the last accepted draft speak for
the next round. No rule ever accepts a pseudo token, as its number is outside the vocabulary.

What is at such a place is trained: an embedding (PPD), or a hidden state at a middle layer that is
a linear map of the candidate's own (hidden transfer).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ....checkpoint import load_strictly, read_state_dict
from ....decoding.tree import TokenTree
from ....decoding.verify import Round, Verdict
from ....errors import InputError, unknown_name
from ....files import user_path, write_bytes, write_json
from ....schema import Count, Layers, Size
from ....stored import read_sizes
from ..base import TextDrafter, register


class PromptTokens(nn.Module):
    """Embeddings of K pseudo tokens.

    Args:
        hidden_size: C of the target.
        num_guesses: K.

    Paper: Chen et al., "Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration
    of LLM Inference", 2024 (PPD), section 3.
    """

    kind: ClassVar[str] = "ppd"

    def __init__(self, hidden_size: Size, num_guesses: Size, layer: Count = 0) -> None:
        super().__init__()
        self.hidden_size, self.num_guesses, self.layer = hidden_size, num_guesses, layer
        self.embeddings = nn.Parameter(0.02 * torch.randn(num_guesses, hidden_size))

    def vectors(self) -> Tensor:
        """What is fed at pseudo tokens, [K, C]."""
        return self.embeddings

    def edit(self, hidden: Tensor, owners: Tensor, numbers: Tensor) -> Tensor | None:
        """The hidden states [B, T, C] that a middle layer sees instead; None leaves them.

        Args:
            hidden: [B, T, C].
            owners: [T] int64, the place of the candidate that a pseudo token stands behind.
            numbers: [T] int64, which pseudo token a place is; -1 for a token.
        """
        return None


class HiddenTransfer(nn.Module):
    """Hidden states of K pseudo tokens at a middle layer, linear maps of their candidate's.

    Args:
        hidden_size: C of the target.
        num_guesses: K.
        layer: the layer whose input is replaced.

    Paper: Wu et al., "Parallel Decoding via Hidden Transfer for Lossless Large Language Model
    Acceleration", 2024, section 3.
    """

    kind: ClassVar[str] = "hidden_transfer"

    def __init__(self, hidden_size: Size, num_guesses: Layers, layer: Count) -> None:
        super().__init__()
        self.hidden_size, self.num_guesses, self.layer = hidden_size, num_guesses, layer
        maps = [nn.Linear(hidden_size, hidden_size) for _ in range(num_guesses)]
        self.maps = nn.ModuleList(maps)
        for linear in maps:
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)

    def vectors(self) -> Tensor:
        """What is fed at pseudo tokens, [K, C]; the layers below `layer` make nothing of it."""
        device = next(self.parameters()).device
        return torch.zeros(self.num_guesses, self.hidden_size, device=device)

    def edit(self, hidden: Tensor, owners: Tensor, numbers: Tensor) -> Tensor | None:
        """See `PromptTokens`."""
        source, dtype = hidden[:, owners], next(self.parameters()).dtype
        out = hidden
        for number, linear in enumerate(self.maps):
            moved = linear(source.to(dtype)).to(hidden.dtype)
            out = torch.where((numbers == number)[:, None], moved, out)
        return out


KINDS: dict[str, Any] = {cls.kind: cls for cls in (PromptTokens, HiddenTransfer)}


def save_pseudo(module: Any, folder: str | Path, **facts: Any) -> None:
    """Write pseudo tokens into a folder."""
    from safetensors.torch import save

    folder = user_path(folder)
    weights = {name: value.contiguous() for name, value in module.state_dict().items()}
    write_bytes(folder / "pseudo.safetensors", save(weights))
    config = {
        name: getattr(module, name) for name in ("kind", "hidden_size", "num_guesses", "layer")
    }
    write_json(folder / "pseudo.json", {**config, **facts})


def load_pseudo(folder: str | Path) -> Any:
    """Pseudo tokens written by `save_pseudo`.

    Raises:
        CheckpointError: a file that is missing or does not fit.
    """
    folder = user_path(folder)
    cls, sizes = read_sizes(folder / "pseudo.json", KINDS, "pseudo tokens")
    weights = read_state_dict(folder / "pseudo.safetensors", ())
    return load_strictly(cls, sizes, weights, str(folder))


def make_pseudo(kind: str, hidden_size: int, num_guesses: int, layer: int) -> Any:
    """Fresh pseudo tokens.

    Raises:
        InputError: an unknown kind.
    """
    if kind not in KINDS:
        raise unknown_name("kind of pseudo tokens", kind, KINDS)
    return KINDS[kind](hidden_size, num_guesses, layer)


def pseudo_layout(num_chain: int, num_guesses: int) -> tuple[list[int], list[int], list[int]]:
    """A chain with pseudo tokens behind its root and each of its drafts.

    Returns:
        Parents of the chain's drafts and then of the pseudo tokens (-1 is the root); for each place
        of a pass, the root first, its owner and the number of its pseudo token (-1 for tokens).
    """
    parents = list(range(-1, num_chain - 1))
    owners, numbers = list(range(num_chain + 1)), [-1] * (num_chain + 1)
    for owner in range(-1, num_chain):
        above = owner
        for number in range(num_guesses):
            parents.append(above)
            above = len(parents) - 1
            owners.append(owner + 1)
            numbers.append(number)
    return parents, owners, numbers


@register("pseudo", summary="pseudo tokens of `arvision train-draft`: PPD, hidden transfer")
class PseudoDrafter(TextDrafter):
    """A chain of the guesses that the last pass made at its pseudo tokens.

    Args:
        module: `PromptTokens` or `HiddenTransfer`, or the folder of `arvision train-draft`.

    Raises:
        InputError: at use, another width than the model's, or a model without pseudo tokens.
    """

    rules: ClassVar[tuple[str, ...]] = ("greedy", "gumbel")

    def __init__(self, module: Any) -> None:
        self.module = load_pseudo(module) if isinstance(module, str | Path) else module
        num = self.module.num_guesses
        self.num_draft = num + (num + 1) * num

    def begin(self, state: Any) -> None:
        """Hand the pseudo tokens to the target's state."""
        if not hasattr(state, "pseudo"):
            raise InputError(
                "this model's state takes no pseudo tokens: expected a language model of transformers"
            )
        width = state.model.sizes.hidden_size
        if width != self.module.hidden_size:
            raise InputError(
                f"pseudo tokens of width {self.module.hidden_size}: the model has {width}"
            )
        self._state = state
        self.module.to(state.model.device)
        state.pseudo = self.module.vectors().detach()
        self._guesses: Tensor | None = None
        self._num_chain = 0

    def propose(self, tokens: Tensor, lengths: Tensor, num: int, round_number: int) -> TokenTree:
        """See `arvision.decoding.loop.Drafter`."""
        self.follow(tokens, lengths)
        guesses = tokens[:, :0] if self._guesses is None else self._guesses
        count = self.module.num_guesses
        # Room for the chain and for pseudo tokens behind each of its places.
        chain = max(0, min(guesses.shape[1], (num - count) // (count + 1)))
        parents, owners, numbers = pseudo_layout(chain, count)
        self._num_chain = chain
        extra = torch.tensor([n for n in numbers if n >= 0], device=tokens.device)
        extra = (self.vocab_size + extra).expand(len(tokens), -1)
        device = tokens.device
        edit = (
            self.module.layer,
            lambda hidden: self.module.edit(
                hidden, torch.tensor(owners, device=device), torch.tensor(numbers, device=device)
            ),
        )
        return TokenTree(
            torch.cat([guesses[:, :chain], extra], dim=1),
            parents=torch.tensor(parents),
            edit=edit,
        )

    def observe(self, batch: Round, verdict: Verdict) -> None:
        """Read the guesses behind each row's last accepted draft."""
        if batch.drafts.shape[1] == 0:  # the prefill
            return
        count = self.module.num_guesses
        first = 1 + self._num_chain + (verdict.counts - 1) * count
        places = first[:, None] + torch.arange(count, device=first.device)
        rows = torch.arange(len(first), device=first.device)[:, None]
        self._guesses = batch.target_logp[rows, places].argmax(-1)

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows`."""
        super().select(rows)
        if self._guesses is not None:
            self._guesses = self._guesses[rows]
