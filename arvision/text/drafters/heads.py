"""Small networks that guess the next tokens from the target's last hidden state.

A head sees the hidden state h at a token and the embeddings of what follows it: the token that the
target drew from h, then the tokens drafted so far. Head k (from 0) guesses token k + 2 behind the
one that h belongs to. All heads end in the target's own output layer, which stays frozen, cut down
to the tokens worth guessing; so a head is small, and what it drafts is in the target's vocabulary.
Some kinds read the hidden states of the whole prefix first: for them h is what a decoder layer of
their own makes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from ...checkpoint import load_strictly, read_state_dict
from ...errors import CheckpointError, InputError, unknown_name
from ...files import user_path, write_bytes, write_json
from ...schema import Between, Layers, Size, check_value, read_json
from ...stored import read_sizes
from .prefix import PrefixLayer

Accuracies = Sequence[Annotated[Sequence[Annotated[float, Between(0, 1)]], Between(1, 1000)]]
"""Of each head, by rank."""


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
    reach: ClassVar[int] = 0
    """R, tokens before the drawn one that a guess depends on as well."""
    accuracies: tuple[tuple[float, ...], ...] = ()
    """How often the guess of each rank was the target's, measured for each head; () if it was not."""

    def __init__(self, hidden_size: Size, num_heads: Size) -> None:
        super().__init__()
        if hidden_size < 1 or num_heads < 1:
            raise InputError(f"hidden_size {hidden_size}, num_heads {num_heads}: expected >= 1")
        self.hidden_size, self.num_heads = hidden_size, num_heads

    def forward(self, head: int, hidden: Tensor, path: Tensor) -> Tensor:
        """What goes into the output layer, [..., C].

        Args:
            head: number k of the head.
            hidden: [..., C], the target's hidden states, or what `PrefixHeads` made of them.
            path: [..., R + k + 1, C], embeddings of the R tokens before the one drawn there, of that
                one, and of the k drafts behind.
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


class PrefixHeads(DraftHeads):
    """Heads that see the whole prefix through a decoder layer; a feature network for `FeatureState`.

    Args:
        hidden_size: C of the target.
        num_heads: K.
    """

    vocab_size = None

    def __init__(self, hidden_size: Size, num_heads: Size) -> None:
        super().__init__(hidden_size, num_heads)
        self.prefix = PrefixLayer(hidden_size)

    @property
    def cache_sizes(self) -> tuple[int, int, int]:
        """See `FeatureNetwork`."""
        return self.prefix.cache_sizes

    def watches(self, model: Any) -> tuple[int, ...]:
        """What the output layer sees."""
        return (model.sizes.num_layers,)

    def fuse(self, features: Tensor) -> Tensor:
        """See `FeatureNetwork`."""
        return features.to(self.prefix.input_layernorm.weight.dtype)

    def join(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """What the layer reads of places, [..., C]: here the hidden states.

        Args:
            embedded: [..., (R + 1) C], embeddings of the tokens that end with the drawn one.
            hidden: [..., C], the hidden states that it was drawn from.
        """
        return hidden

    def step(
        self, embedded: Tensor, hidden: Tensor, mask: Tensor, positions: Tensor, cache: Any
    ) -> Tensor:
        """See `FeatureNetwork`."""
        return self.prefix(self.join(embedded, hidden), mask, positions, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """The heads go on from the layer's output itself."""
        return hidden


def _perceptron(width: int, hidden_size: int, depth: int) -> nn.Sequential:
    """From `width` numbers to `hidden_size`, with `depth` hidden layers."""
    layers: list[nn.Module] = [nn.Linear(width, hidden_size), nn.SiLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(hidden_size, hidden_size), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(hidden_size, hidden_size))


class HydraHeads(DraftHeads):
    """Heads that also see the tokens drafted before: a small network on the concatenation.

    Paper: Ankner et al., "Hydra: Sequentially-Dependent Draft Heads for Medusa Decoding", 2024,
    section 3.
    """

    kind = "hydra"
    depth: ClassVar[int] = 1

    def __init__(self, hidden_size: Size, num_heads: Layers) -> None:
        super().__init__(hidden_size, num_heads)
        widths = [(head + 2) * hidden_size for head in range(num_heads)]
        self.blocks = nn.ModuleList(
            [_perceptron(width, hidden_size, self.depth) for width in widths]
        )

    def forward(self, head: int, hidden: Tensor, path: Tensor) -> Tensor:
        """See `DraftHeads`."""
        seen = torch.cat([_norm(hidden), _norm(path).flatten(-2)], dim=-1)
        return hidden + self.blocks[head](seen)


class HydraPlusHeads(HydraHeads, PrefixHeads):
    """Deeper heads behind a prefix attention layer.

    Paper: Ankner et al., "Hydra", 2024, section 4 (Hydra++: prefix attention, deeper heads; the
    teacher's laws for a loss, which all heads here are fitted with).
    """

    kind = "hydra++"
    depth = 4


class CloverHeads(PrefixHeads):
    """A regressive state carries the sequence through the heads, from augmented hidden states on.

    State k attends from the last token to the states before it, then adds a small network of
    both; a residual block per head reads it out. State 0 is the augmenting block's.

    Paper: Xiao et al., "Clover: Regressive Lightweight Speculative Decoding with Sequential
    Knowledge", 2024, section 3 (regressive connection, attention decoder, augmenting block).
    """

    kind = "clover"

    def __init__(self, hidden_size: Size, num_heads: Layers) -> None:
        super().__init__(hidden_size, num_heads)
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value = nn.Linear(hidden_size, hidden_size, bias=False)
        self.mix = _perceptron(2 * hidden_size, hidden_size, 1)
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


class ChimeraHeads(PrefixHeads):
    """Trigrams for what is near, a layer over the whole context for what is far, residual heads.

    The trigram encoder reads each three tokens in a row. The full-context encoder attends over its
    codes of all known tokens, each fused with the target's hidden state; the heads add to that the
    code of the three tokens that a draft stands behind.

    Paper: Zeng et al., "Chimera: A Lossless Decoding Method for Accelerating Large Language Models
    Inference by Fusing all Tokens", 2024, section 3 (trigram encoder, full-context encoder,
    residual decoding heads).
    """

    kind = "chimera"
    reach = 2

    def __init__(self, hidden_size: Size, num_heads: Size) -> None:
        super().__init__(hidden_size, num_heads)
        self.trigram = nn.Linear(3 * hidden_size, hidden_size)
        self.near = _perceptron(2 * hidden_size, hidden_size, 1)
        self.place = nn.Embedding(num_heads, hidden_size)
        self.fuse_near = _perceptron(2 * hidden_size, hidden_size, 1)
        last: Any = self.near[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def _encode(self, trigrams: Tensor) -> Tensor:
        """Codes [..., C] of the embeddings of three tokens each, [..., 3, C]."""
        return nn.functional.silu(self.trigram(_norm(trigrams).flatten(-2)))

    def join(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """See `PrefixHeads`: the hidden state fused with the code of the trigram."""
        code = self._encode(embedded.unflatten(-1, (3, self.hidden_size)))
        return hidden + self.near(torch.cat([_norm(hidden), code], dim=-1))

    def forward(self, head: int, hidden: Tensor, path: Tensor) -> Tensor:
        """See `DraftHeads`."""
        code = self._encode(path[..., -3:, :]) + self.place.weight[head]
        return hidden + self.fuse_near(torch.cat([_norm(hidden), code], dim=-1))


KINDS: dict[str, type[DraftHeads]] = {
    cls.kind: cls for cls in (MedusaHeads, HydraHeads, HydraPlusHeads, CloverHeads, ChimeraHeads)
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
    if heads.accuracies:
        config["accuracies"] = heads.accuracies
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
    heads = load_strictly(cls, sizes, weights, str(folder))
    measured = read_json(folder / "heads.json").get("accuracies", [])
    try:
        check_value(measured, Accuracies, f"{folder / 'heads.json'}: accuracies")
    except InputError as error:
        raise CheckpointError(str(error)) from error
    heads.accuracies = tuple(map(tuple, measured))
    return heads, vocabulary
