"""An MTP layer fitted on a frozen target, for models that ship none; saved in DeepSeek-V3's layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...decoding.transformers_cache import TextSizes
from ...files import replacing, write_json
from ...training.loop import fit
from ..drafters.mtp import LAYOUTS, MTP_FILE, MTPLayer
from ..layers import find_layers
from .data import Answers, split_answers
from .eagle3 import Eagle3Objective, Eagle3Training

LAYOUT = "nextn"


class FittedMTP(MTPLayer):
    """An MTP layer that is being trained: it starts as the target's last layer on the hidden state.

    Args:
        network: the target, frozen.
    """

    def __init__(self, network: Any) -> None:
        super().__init__(network, LAYOUT)
        owner, name = find_layers(network)
        self.float()
        with torch.no_grad():
            self.block.load_state_dict(getattr(owner, name)[-1].state_dict())
            width = self.projection.out_features
            self.projection.weight.zero_()
            self.projection.weight[:, width:] = torch.eye(width)

    @property
    def vocabulary(self) -> Tensor:
        """Ids that it knows: all, [V]."""
        return torch.arange(len(self._model[0].get_output_embeddings().weight))

    def layers_of(self, last: int, width: int, vocab_size: int) -> tuple[int, ...]:
        """Layers of the target whose inputs it reads: what goes into the output layer."""
        return (last,)

    def draft_logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of the target's output layer, in the layer's own precision."""
        weight = self._model[0].get_output_embeddings().weight.detach()
        return nn.functional.linear(self.last_norm(hidden), weight.to(hidden.dtype))


def published_names(state: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """The weights of an `MTPLayer` under the names of its layout."""
    layout = LAYOUTS[LAYOUT]
    own = ("embedding_norm", "hidden_norm", "projection", "last_norm")
    outside = {
        f"{mine}.weight": f"{layout.parts}{theirs}.weight"
        for mine, theirs in zip(own, layout.names, strict=True)
    }
    return {
        outside.get(key, key.replace("block.", layout.block, 1)).format(num_layers): value
        for key, value in state.items()
    }


def train_mtp(
    network: Any,
    answers: Answers,
    out: Path,
    training: Eagle3Training | None = None,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Fit an MTP layer on a frozen target's answers and save it in `out`; resumes.

    Published layers are trained with their models; this one learns afterwards, as an EAGLE-3 head does:
    unrolled on its own outputs, towards the target's laws.

    Args:
        network: the target, of Llama's kind.
        answers: of the target; a tenth is held out.
        out: takes the checkpoints and the layer, which `drafter="mtp"` reads (option `folder`).
        training: settings; the vocabulary is the target's.
        progress: show bars on stderr.

    Returns:
        Figures: "agreement" of each step on answers held out, "answers", "parameters", "seconds".

    Raises:
        InputError: too few answers, or a model of another kind.
    """
    training = training or Eagle3Training(num_steps=2)
    torch.manual_seed(training.fit.seed)
    learn, held = split_answers(answers)
    device = network.get_output_embeddings().weight.device
    layer = FittedMTP(network).to(device).requires_grad_(True)
    objective = Eagle3Objective(layer, network, learn, training, progress=progress)
    log = fit(objective, training.fit, out / "fit", device=device, progress=progress)
    judge = Eagle3Objective(layer.eval(), network, held, training)
    figures = {
        "agreement": judge.agreement(),
        "answers": objective.num_items,
        "parameters": sum(parameter.numel() for parameter in layer.parameters()),
        "seconds": log[-1]["seconds"],
    }
    state = {key: value.to(network.dtype).cpu() for key, value in layer.state_dict().items()}
    with replacing(out / "mtp.safetensors") as temporary:
        save_file(published_names(state, TextSizes.of(network).num_layers), temporary)
    write_json(out / MTP_FILE, figures)
    return figures
