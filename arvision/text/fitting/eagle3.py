"""EAGLE-3 heads fitted by training-time test: the head learns on its own outputs, several steps deep."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from ...errors import InputError, unknown_name
from ...training.llamagen_draft import DIVERGENCES, divergence
from ...training.loop import Chance, FitConfig, Objective, fit
from ..drafters.eagle3 import Eagle3Head, save_eagle3
from ..layers import find_layers
from .data import Answers, frequent_tokens, read_texts, split_answers


@dataclass(frozen=True, kw_only=True)
class Eagle3Training:
    """Settings of `train_eagle3`.

    Attributes:
        num_steps: how deep the head is unrolled in training.
        num_vocabulary: tokens of the draft vocabulary, the most frequent ones of the answers.
        divergence: from the target's laws.
        decay: weight of each step against the one before.
        length: tokens of a text that are read, from its start.
        fit: settings of the loop.

    Raises:
        InputError: an unknown divergence, or numbers below 1.
    """

    num_steps: int = 4
    num_vocabulary: int = 8192
    divergence: str = "forward_kl"
    decay: float = 0.8
    length: int = 192
    fit: FitConfig = field(
        default_factory=lambda: FitConfig(
            steps=400, batch_size=4, learning_rate=1e-3, warmup=20, mixed_precision="bf16"
        )
    )

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise unknown_name("divergence", self.divergence, DIVERGENCES)
        if self.num_vocabulary < 2 or self.num_steps < 1 or self.length < 4:
            raise InputError(
                f"num_vocabulary {self.num_vocabulary}, num_steps {self.num_steps}, length "
                f"{self.length}: expected at least 2, 1 and 4"
            )


def make_eagle3(network: Any, vocabulary: Tensor) -> Eagle3Head:
    """A fresh head for a target, which starts as much like the target's end as it can.

    The head's own feature starts as the highest one, its norm and output layer as the target's;
    where the target's last layer has weights of the same names and shapes they are taken over.

    Args:
        network: the target.
        vocabulary: [W], ascending ids of the draft vocabulary.
    """
    config = network.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    owner, name = find_layers(network)
    last = getattr(owner, name)[-1].state_dict()
    output = network.get_output_embeddings().weight.detach()
    width, heads = text.hidden_size, text.num_attention_heads
    # No parameter of a Llama's, but kept in its configuration as any other.
    own: dict[str, Any] = {"draft_vocab_size": len(vocabulary)}
    head = Eagle3Head(
        LlamaConfig(
            vocab_size=len(output),
            hidden_size=width,
            intermediate_size=getattr(text, "intermediate_size", None) or 4 * width,
            num_hidden_layers=1,
            num_attention_heads=heads,
            num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or width // heads,
            max_position_embeddings=getattr(text, "max_position_embeddings", None) or 4096,
            rms_norm_eps=getattr(text, "rms_norm_eps", 1e-6),
            rope_parameters=_rotation(text),
            tie_word_embeddings=False,
            **own,
        )
    )
    with torch.no_grad():
        head.fc.weight.zero_()
        head.fc.weight[:, 2 * width :] += torch.eye(width)
        own = head.midlayer.state_dict()
        for key, value in own.items():
            source = last.get(key)
            if key.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                value[:, :width] *= 0.1
                value = value[:, width:]
            if key == "hidden_norm.weight":
                source = last.get("input_layernorm.weight")
            if source is not None and source.shape == value.shape:
                value.copy_(source)
        head.lm_head.weight.copy_(output[vocabulary.to(output.device)])
        norm = getattr(owner, "norm", None)
        if norm is not None and norm.weight.shape == head.norm.weight.shape:
            head.norm.weight.copy_(norm.weight)
        ids = vocabulary.cpu()
        torch.as_tensor(head.d2t).copy_(ids - torch.arange(len(ids)))
        known = torch.zeros(len(output), dtype=torch.bool)
        known[ids] = True
        torch.as_tensor(head.t2d).copy_(known)
    return head


def _rotation(config: Any) -> dict[str, Any]:
    """The target's rotation where it is one for all layers, else Llama's first one."""
    found = getattr(config, "rope_parameters", None)
    if isinstance(found, dict) and "rope_theta" in found and "partial_rotary_factor" not in found:
        return dict(found)
    return {"rope_type": "default", "rope_theta": 10_000.0}


class Unrolled:
    """Keys and values of all steps of an unrolled head, one behind the other, for its attention."""

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Those of one more step; all of them."""
        self._keys.append(keys)
        self._values.append(values)
        return torch.cat(self._keys, dim=2), torch.cat(self._values, dim=2)


def unrolled_mask(length: int, step: int, like: Tensor) -> Tensor:
    """What step `step` of an unrolled head may look at, [1, 1, L, (step + 1) L], additive.

    Place i of step k stands for a draft k tokens behind text that ends at i - k: it sees the true
    features up to there, and of each later step the one place that led to it.
    """
    places = torch.arange(length, device=like.device)
    behind = places[:, None] - places
    blocks = [behind >= step] + [behind == step - number for number in range(1, step + 1)]
    sees = torch.cat(blocks, dim=1)
    return like.new_zeros(sees.shape).masked_fill_(~sees, float("-inf"))[None, None]


class Eagle3Objective(Objective):
    """Divergence of the head from the target along the target's answers, at every step of the unroll.

    Args:
        head: what is trained: an `Eagle3Head`, or another feature network with its `vocabulary`,
            `layers_of` and `draft_logits`.
        network: the target, frozen.
        answers: its answers; features are read from the target once, and kept in half precision.
        training: settings.
        progress: show a bar.

    Raises:
        InputError: answers that are all too short.
    """

    def __init__(
        self,
        head: Any,
        network: Any,
        answers: Answers,
        training: Eagle3Training,
        *,
        progress: bool = False,
    ) -> None:
        super().__init__()
        self.head, self._settings = head, training
        self._embedding = network.get_input_embeddings().weight.detach()
        self._output = network.get_output_embeddings().weight.detach()[head.vocabulary]
        last = len(getattr(*find_layers(network)))
        vocab_size, width = self._embedding.shape
        layers = head.layers_of(last, width, vocab_size)
        self._texts = read_texts(
            network, answers, training.length, layers=layers, progress=progress
        )
        self.num_items = len(self._texts.texts)

    def inputs(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """See `TextExamples.rows`."""
        return self._texts.rows(indices)

    def unroll(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """The head's outputs [B, L - 1, C] of each step.

        Place i holds the pair of token i + 1 and the feature of place i; what comes out speaks of
        token i + 2. A step's output at a place is the next step's feature one place further.
        """
        tokens = inputs["texts"][:, 1:]
        embedded = self._embedding[tokens.to(self._embedding.device)].float()
        hidden = self.head.fuse(inputs["features"][:, :-1].float())
        positions = torch.arange(tokens.shape[1], device=hidden.device).expand(len(tokens), -1)
        cache, outputs = Unrolled(), []
        for step in range(self._settings.num_steps):
            mask = unrolled_mask(tokens.shape[1], step, hidden)
            # The first places of late steps stand for nothing: they see themselves.
            mask[..., :step, -tokens.shape[1] :] = 0.0
            out = self.head.step(embedded, hidden, mask, positions, cache)
            outputs.append(out)
            hidden = torch.cat([torch.zeros_like(out[:, :1]), out[:, :-1]], dim=1)
        return outputs

    def loss(self, inputs: dict[str, Tensor], chance: Chance) -> dict[str, Tensor]:
        """Weighted divergence, and how often the first step's best guess is the target's."""
        right = self._compare(inputs)
        loss = torch.zeros((), device=self.device)
        for step, (divergences, _) in enumerate(right):
            loss = loss + self._settings.decay**step * divergences.mean()
        return {"loss": loss, "agreement": right[0][1].float().mean()}

    def _compare(self, inputs: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Divergence, and whether the best guess is the target's, at the answers' places, by step."""
        length = inputs["texts"].shape[1]
        places = torch.arange(length - 1, device=inputs["starts"].device)
        told = (places + 2 >= inputs["starts"][:, None]) & (places + 2 < inputs["lengths"][:, None])
        with torch.no_grad():
            teacher = inputs["hidden"][:, 1:].to(self._output.dtype)
        found = []
        for step, out in enumerate(self.unroll(inputs)):
            valid = told & (places >= step)
            with torch.no_grad():
                logp = (teacher[valid] @ self._output.T).float().log_softmax(-1)
            logq = self.head.draft_logits(out[valid]).float().log_softmax(-1)
            apart = divergence(self._settings.divergence, logp, logq)
            found.append((apart, logp.argmax(-1) == logq.argmax(-1)))
        return found

    @torch.no_grad()
    def agreement(self) -> list[float]:
        """For each step, how often its best guess is the target's, over all texts."""
        right: list[list[Tensor]] = [[] for _ in range(self._settings.num_steps)]
        for index in range(self.num_items):
            inputs = self.inputs(torch.tensor([index]), torch.Generator())
            inputs = {key: value.to(self.device) for key, value in inputs.items()}
            for step, (_, hits) in enumerate(self._compare(inputs)):
                right[step].append(hits)
        return [round(float(torch.cat(hits).float().mean()), 4) for hits in right]


def train_eagle3(
    network: Any,
    answers: Answers,
    out: Path,
    training: Eagle3Training | None = None,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Fit a head on a frozen target and save it in `out`, in the published layout; resumes.

    Returns:
        Figures: "agreement" of each step on answers held out, "answers", "parameters",
        "vocabulary", "seconds".

    Raises:
        InputError: bad settings, or answers that are too short or too few.
    """
    training = training or Eagle3Training()
    torch.manual_seed(training.fit.seed)
    learn, held = split_answers(answers)
    device = network.get_output_embeddings().weight.device
    head = make_eagle3(network, frequent_tokens(answers, training.num_vocabulary)).to(device)
    objective = Eagle3Objective(head, network, learn, training, progress=progress)
    log = fit(objective, training.fit, out / "fit", device=device, progress=progress)
    judge = Eagle3Objective(head.eval(), network, held, training)
    figures = {
        "agreement": judge.agreement(),
        "answers": objective.num_items,
        "parameters": sum(parameter.numel() for parameter in head.parameters()),
        "vocabulary": len(head.vocabulary),
        "seconds": log[-1]["seconds"],
    }
    save_eagle3(head, out, figures=figures)
    return figures
