"""Will a draft be accepted? A head on the draft model that ends chains where a rejection is likely."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....checkpoint import load_strictly, read_state_dict
from ....decoding.draft_model import FEATURES
from ....errors import InputError
from ....files import user_path, write_bytes, write_json
from ....networks import place_of
from ....schema import Count, Size
from ....stored import read_sizes

CONFIDENCES = len(FEATURES) - 1
"""Of `confidence_features`, the bias left out."""


class AcceptanceHead(nn.Module):
    """The probability that a drafted token is accepted, from what the draft makes of it.

    Residual blocks on the draft's last hidden state at the token, as published; besides them the
    head sees the three confidences by which the drafts of images are calibrated.

    Args:
        hidden_size: C of the draft model.
        depth: residual blocks.

    Paper: Huang, Guo and Wang, "SpecDec++: Boosting Speculative Decoding via Adaptive Candidate
    Lengths", 2024, section 3.2.
    """

    kind = "acceptance"

    def __init__(self, hidden_size: Size, depth: Count = 2) -> None:
        super().__init__()
        self.hidden_size, self.depth = hidden_size, depth
        blocks = [nn.Linear(hidden_size, hidden_size) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.score = nn.Linear(hidden_size, 1)
        self.confidence = nn.Linear(CONFIDENCES, 1, bias=False)
        for block in [*blocks, self.score]:
            nn.init.zeros_(block.bias)
        for layer in (self.score, self.confidence):
            nn.init.zeros_(layer.weight)

    def logits(self, hidden: Tensor, features: Tensor) -> Tensor:
        """Logits [...] of acceptance.

        Args:
            hidden: [..., C], the draft's last layer at the drafted tokens.
            features: [..., 4], see `arvision.decoding.draft_model.confidence_features`.
        """
        x = hidden.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        for block in self.blocks:
            x = x + nn.functional.silu(block(x))
        return (self.score(x) + self.confidence(features[..., 1:].float()))[..., 0]

    def forward(self, hidden: Tensor, features: Tensor) -> Tensor:
        """Probabilities [...], of the dtype of the features; arguments as in `logits`."""
        return self.logits(hidden, features).sigmoid().to(features.dtype)

    def check_draft(self, draft: Any, translation: Any) -> None:
        """Refuse a draft that the head was not fitted for, and move to where it is.

        Raises:
            InputError: another width, no hidden states, or another vocabulary than the target's.
        """
        network = getattr(draft, "network", None)
        if network is None or translation is not None:
            raise InputError(
                "acceptance looks at the hidden states of a draft model: expected a language model "
                "of transformers with the target's vocabulary"
            )
        width = network.get_output_embeddings().weight.shape[1]
        if width != self.hidden_size:
            raise InputError(
                f"the acceptance head was fitted on a draft of width {self.hidden_size}: this one "
                f"has {width}"
            )
        self.to(place_of(network))

    def save(self, folder: str | Path, **facts: Any) -> None:
        """Write the head into a folder, with facts about the fit."""
        from safetensors.torch import save

        folder = user_path(folder)
        weights = {name: value.contiguous().cpu() for name, value in self.state_dict().items()}
        write_bytes(folder / "acceptance.safetensors", save(weights))
        sizes = {"kind": self.kind, "hidden_size": self.hidden_size, "depth": self.depth}
        write_json(folder / "acceptance.json", {**sizes, **facts})

    @classmethod
    def of(cls, given: AcceptanceHead | str | Path | None) -> AcceptanceHead | None:
        """A head, or the one in a folder of `arvision train-draft --kind acceptance`.

        Raises:
            CheckpointError: a file that is missing or does not fit.
        """
        if not isinstance(given, str | Path):
            return given
        folder = user_path(given)
        kind, sizes = read_sizes(folder / "acceptance.json", {cls.kind: cls}, "acceptance head")
        weights = read_state_dict(folder / "acceptance.safetensors", ())
        return load_strictly(kind, sizes, weights, str(folder)).requires_grad_(False)
