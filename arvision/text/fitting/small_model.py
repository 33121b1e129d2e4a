"""A small draft model of a language model's own architecture, distilled on its answers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...decoding.transformers_cache import TextSizes
from ...errors import InputError
from ...training.llamagen_draft import divergence as divergence_of
from ...training.loop import Chance, FitConfig, Objective, fit
from ..layers import find_layers
from .data import Answers

SMALL_FIT = FitConfig(
    steps=300, batch_size=4, learning_rate=1e-3, warmup=20, mixed_precision="bf16", log_every=10
)


def small_copy(network: Any, share: float = 0.1) -> Any:
    """The target's first and last layers, embeddings and output layer, as a model of its own.

    Args:
        network: a causal language model of transformers.
        share: of the layers, at least two; spread evenly.

    Raises:
        InputError: a network whose layers are in no list.
    """
    owner, name = find_layers(network)
    layers = getattr(owner, name)
    num = max(2, round(share * TextSizes.of(network).num_layers))
    if num >= len(layers):
        raise InputError(f"a draft of {num} layers for a target of {len(layers)}: expected fewer")
    config = copy.deepcopy(network.config)
    config.num_hidden_layers = num
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num]
    for field in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, field):
            delattr(config, field)
    draft = type(network)(config)
    kept = torch.linspace(0, len(layers) - 1, num).round().long().tolist()
    small_owner, small_name = find_layers(draft)
    for layer, index in zip(getattr(small_owner, small_name), kept, strict=True):
        layer.load_state_dict(layers[index].state_dict())
    rest = {key: value for key, value in network.state_dict().items() if f"{name}." not in key}
    draft.load_state_dict(rest, strict=False)
    draft.generation_config = copy.deepcopy(network.generation_config)
    return draft.float()


class SmallModelObjective(Objective):
    """Divergence of the draft's laws from the target's along the target's answers."""

    def __init__(
        self, draft: Any, network: Any, answers: Answers, divergence: str, length: int = 160
    ) -> None:
        super().__init__()
        self.draft, self._frozen = draft, (network,)
        self._divergence, self._answers, self._length = divergence, answers, length
        # Embeddings and output layer stay the target's: most of the weights, and they fit already.
        draft.get_input_embeddings().weight.requires_grad_(False)
        draft.get_output_embeddings().weight.requires_grad_(False)
        self.num_items = len(answers.texts)

    def inputs(self, indices: Tensor, generator: torch.Generator) -> dict[str, Any]:
        """Texts, and the place of each whose law is the first to be learnt."""
        texts = [torch.tensor([self._answers.texts[i][: self._length]]) for i in indices.tolist()]
        starts = [self._answers.starts[i] for i in indices.tolist()]
        firsts = [min(start, t.shape[1] - 1) - 1 for start, t in zip(starts, texts, strict=True)]
        return {"texts": texts, "firsts": firsts}

    def loss(self, inputs: dict[str, Any], chance: Chance) -> dict[str, Tensor]:
        """Mean divergence per token of the answers, and the mean probability of acceptance."""
        network, losses, overlaps = self._frozen[0], [], []
        for text, first in zip(inputs["texts"], inputs["firsts"], strict=True):
            with torch.no_grad():
                logp = network(text, use_cache=False).logits[0, first:].float().log_softmax(-1)
            logq = self.draft(text, use_cache=False).logits[0, first:].float().log_softmax(-1)
            losses.append(divergence_of(self._divergence, logp, logq).mean())
            overlaps.append(torch.minimum(logp, logq.detach()).exp().sum(-1).mean())
        return {"loss": torch.stack(losses).mean(), "acceptance": torch.stack(overlaps).mean()}


def train_small_model(
    network: Any,
    tokenizer: Any,
    answers: Answers,
    out: Path,
    *,
    divergence: str = "forward_kl",
    share: float = 0.1,
    config: FitConfig = SMALL_FIT,
    progress: bool = True,
) -> dict[str, Any]:
    """Distil a small draft model and save it in `out` as transformers does; resumes.

    Returns:
        Figures: "acceptance" (1 - TV) and "loss" of the last logged step, "parameters", "seconds".

    Raises:
        InputError: an unknown divergence, or a target with too few layers.

    Paper: Zhou et al., "DistillSpec", 2023; Zafrir et al., "FastDraft: How to Train Your Draft",
    2024 (there the draft is pre-trained first; here it starts from the target's own layers).
    """
    torch.manual_seed(0)
    device = network.get_input_embeddings().weight.device
    draft = small_copy(network, share).to(device)
    objective = SmallModelObjective(draft, network, answers, divergence)
    log = fit(objective, config, out / "fit", device=device, progress=progress)
    draft.requires_grad_(True).eval().to(network.dtype).save_pretrained(out)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    return {
        "acceptance": log[-1]["acceptance"],
        "loss": log[-1]["loss"],
        "parameters": sum(parameter.numel() for parameter in draft.parameters()),
        "layers": draft.config.num_hidden_layers,
        "seconds": log[-1]["seconds"],
    }
