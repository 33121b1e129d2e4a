"""Small networks that guess the next tokens from the target's last hidden state.

A head sees the hidden state h at a token and the embeddings of what follows it: the token that the
target drew from h, then the tokens drafted so far. Head k (from 0) guesses token k + 2 behind the
one that h belongs to. All heads end in the target's own output layer, which stays frozen, cut down
to the tokens worth guessing; so a head is small, and what it drafts is in the target's vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...checkpoint import load_strictly, read_state_dict
from ...errors import CheckpointError, InputError, unknown_name
from ...files import user_path, write_bytes, write_json
from ...schema import Layers, Size
from ...stored import read_sizes


def _norm(x: Tensor) -> Tensor:
    """Root-mean-square 1 along the last axis: embeddings and hidden states on one footing."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class DraftHeads(nn.Module):
    """What all kinds of heads share.

    Args:
        hidden_size: C of the target.
        num_heads: K, the longest draft.
    """

    kind: ClassVar[str] = ""
    sees_path: ClassVar[bool] = True
    """Whether a guess depends on the tokens between; if not, all of a level are one."""

    def __init__(self, hidden_size: Size, num_heads: Size) -> None:
        super().__init__()
        if hidden_size < 1 or num_heads < 1:
            raise InputError(f"hidden_size {hidden_size}, num_heads {num_heads}: expected >= 1")
        self.hidden_size, self.num_heads = hidden_size, num_heads

    def forward(self, head: int, hidden: Tensor, path: Tensor) -> Tensor:
        """What goes into the output layer, [..., C].

        Args:
            head: number k of the head.
            hidden: [..., C], the target's hidden states.
            path: [..., k + 1, C], embeddings of the token drawn there and of the k drafts behind.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it guesses")


class MedusaHeads(DraftHeads):
    """One residual block per head, from the hidden state alone.

    Paper: Cai et al., "Medusa", 2024, section 2.1 (Medusa-1: the target stays frozen; here the
    output layers are the target's).
    """

    kind = "medusa"
    sees_path = False

    def __init__(self, hidden_size: Size, num_heads: Layers) -> None:
        super().__init__(hidden_size, num_heads)
        blocks = [nn.Linear(hidden_size, hidden_size) for _ in range(num_heads)]
        self.blocks = nn.ModuleList(blocks)
        for block in blocks:
            nn.init.zeros_(block.weight)
            nn.init.zeros_(block.bias)

    def forward(self, head: int, hidden: Tensor, path: Tensor) -> Tensor:
        """See `DraftHeads`."""
        return hidden + nn.functional.silu(self.blocks[head](hidden))


class HydraHeads(DraftHeads):
    """Heads that also see the tokens drafted before: a small network on the concatenation.

    Paper: Ankner et al., "Hydra: Sequentially-Dependent Draft Heads for Medusa Decoding", 2024,
    section 3.
    """

    kind = "hydra"

    def __init__(self, hidden_size: Size, num_heads: Layers) -> None:
        super().__init__(hidden_size, num_heads)
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Linear((head + 2) * hidden_size, hidden_size),
                    nn.SiLU(),
                    nn.Linear(hidden_size, hidden_size),
                )
                for head in range(num_heads)
            ]
        )

    def forward(self, head: int, hidden: Tensor, path: Tensor) -> Tensor:
        """See `DraftHeads`."""
        seen = torch.cat([_norm(hidden), _norm(path).flatten(-2)], dim=-1)
        return hidden + self.blocks[head](seen)


class CloverHeads(DraftHeads):
    """A regressive state carries the sequence through the heads.

    State k attends from the last token to the states before it, then adds a small network of
    both; a residual block per head reads it out.

    Paper: Xiao et al., "Clover: Regressive Lightweight Speculative Decoding with Sequential
    Knowledge", 2024, section 3 (regressive connection, attention decoder).
    """

    kind = "clover"

    def __init__(self, hidden_size: Size, num_heads: Layers) -> None:
        super().__init__(hidden_size, num_heads)
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value = nn.Linear(hidden_size, hidden_size, bias=False)
        self.mix = nn.Sequential(
            nn.Linear(2 * hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.blocks = nn.ModuleList([nn.Linear(hidden_size, hidden_size) for _ in range(num_heads)])

    def forward(self, head: int, hidden: Tensor, path: Tensor) -> Tensor:
        """See `DraftHeads`."""
        states = [hidden]
        for place in range(head + 1):
            token = _norm(path[..., place, :])
            before = _norm(torch.stack(states, dim=-2))
            scores = (self.key(before) * self.query(token)[..., None, :]).sum(-1)
            weights = (scores * self.hidden_size**-0.5).softmax(-1)
            read = (weights[..., None] * self.value(before)).sum(-2)
            mixed = self.mix(torch.cat([_norm(states[-1]) + read, token], dim=-1))
            states.append(states[-1] + mixed)
        return states[-1] + nn.functional.silu(self.blocks[head](_norm(states[-1])))


class ChimeraHeads(DraftHeads):
    """One light model for all places: a trigram encoder fused with the hidden state.

    Paper: Zeng et al., "Chimera: A Lossless Decoding Method for Accelerating Large Language Models
    Inference by Fusing all Tokens", 2024, section 3 (trigram encoder; the fusing of all tokens is
    left to the target's hidden state here).
    """

    kind = "chimera"

    def __init__(self, hidden_size: Size, num_heads: Size) -> None:
        super().__init__(hidden_size, num_heads)
        self.trigram = nn.Linear(3 * hidden_size, hidden_size)
        self.place = nn.Embedding(num_heads, hidden_size)
        self.fuse = nn.Sequential(
            nn.Linear(2 * hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, head: int, hidden: Tensor, path: Tensor) -> Tensor:
        """See `DraftHeads`."""
        last = _norm(path[..., -3:, :])
        if last.shape[-2] < 3:
            missing = last.new_zeros(*last.shape[:-2], 3 - last.shape[-2], last.shape[-1])
            last = torch.cat([missing, last], dim=-2)
        encoded = nn.functional.silu(self.trigram(last.flatten(-2))) + self.place.weight[head]
        return hidden + self.fuse(torch.cat([_norm(hidden), encoded], dim=-1))


KINDS: dict[str, type[DraftHeads]] = {
    cls.kind: cls for cls in (MedusaHeads, HydraHeads, CloverHeads, ChimeraHeads)
}


def make_heads(kind: str, hidden_size: int, num_heads: int) -> DraftHeads:
    """Fresh heads.

    Raises:
        InputError: an unknown kind.
    """
    if kind not in KINDS:
        raise unknown_name("kind of heads", kind, KINDS)
    return KINDS[kind](hidden_size, num_heads)


def save_heads(heads: DraftHeads, vocabulary: Tensor, folder: str | Path, **facts: Any) -> None:
    """Write heads and the tokens they guess, [W], into a folder."""
    from safetensors.torch import save

    folder = user_path(folder)
    weights = {name: value.contiguous() for name, value in heads.state_dict().items()}
    write_bytes(folder / "heads.safetensors", save({**weights, "vocabulary": vocabulary.cpu()}))
    config = {
        "kind": heads.kind,
        "hidden_size": heads.hidden_size,
        "num_heads": heads.num_heads,
        **facts,
    }
    write_json(folder / "heads.json", config)


def load_heads(folder: str | Path) -> tuple[DraftHeads, Tensor]:
    """Heads written by `save_heads`, and the tokens they guess.

    Raises:
        CheckpointError: a file that is missing or does not fit.
    """
    folder = user_path(folder)
    cls, sizes = read_sizes(folder / "heads.json", KINDS, "heads")
    weights = read_state_dict(folder / "heads.safetensors", ())
    vocabulary = weights.pop("vocabulary", None)
    if vocabulary is None or vocabulary.dim() != 1 or vocabulary.is_floating_point():
        raise CheckpointError(f"{folder}: expected 'vocabulary', the tokens that heads guess")
    return load_strictly(cls, sizes, weights, str(folder)), vocabulary
