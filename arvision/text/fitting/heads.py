"""Draft heads fitted on a frozen target: its own answers, its own laws as the teacher."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError, unknown_name
from ...training.llamagen_draft import DIVERGENCES, divergence
from ...training.loop import Chance, FitConfig, Objective, fit
from ..drafters.heads import DraftHeads, make_heads, save_heads
from .data import Answers, HeadExamples, frequent_tokens, head_examples, num_held_out


@dataclass(frozen=True, kw_only=True)
class HeadTraining:
    """Settings of `train_heads`.

    Attributes:
        kind: a name in `arvision.text.drafters.heads.KINDS`.
        num_heads: K.
        num_vocabulary: tokens that the heads may guess, the most frequent ones of the answers.
        divergence: from the target's laws, a name in `arvision.training.llamagen_draft.DIVERGENCES`.
        decay: weight of each head against the one before.
        fit: settings of the loop.

    Raises:
        InputError: an unknown divergence, or numbers below 1.
    """

    kind: str = "hydra"
    num_heads: int = 3
    num_vocabulary: int = 8192
    divergence: str = "forward_kl"
    decay: float = 0.8
    fit: FitConfig = field(
        default_factory=lambda: FitConfig(
            steps=400, batch_size=192, learning_rate=2e-3, warmup=20, mixed_precision="bf16"
        )
    )

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise unknown_name("divergence", self.divergence, DIVERGENCES)
        if self.num_vocabulary < 2 or self.num_heads < 1:
            raise InputError(
                f"num_vocabulary {self.num_vocabulary}, num_heads {self.num_heads}: expected at "
                "least 2 and 1"
            )


class HeadObjective(Objective):
    """Divergence of the heads from the target along its answers.

    Args:
        heads: what is trained.
        examples: places of answers.
        embedding: [V, C] of the target.
        output: [W, C], rows of the target's output layer.
        training: settings.
    """

    def __init__(
        self,
        heads: DraftHeads,
        examples: HeadExamples,
        embedding: Tensor,
        output: Tensor,
        training: HeadTraining,
    ) -> None:
        super().__init__()
        self.heads, self.training_settings = heads, training
        self._examples, self._embedding, self._output = examples, embedding, output
        self.num_items = len(examples.places)

    def inputs(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """See `HeadExamples.rows`."""
        return self._examples.rows(indices)

    def laws(self, head: int, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The target's and a head's log-probabilities [B, W] of examples."""
        # The heads are trained in float32 (under autocast), whatever the target's dtype.
        hidden, path = inputs["hidden"].float(), inputs["tokens"][:, : head + 1]
        # A target may be spread over devices: its first layer's is not always its last one's.
        path = self._embedding[path.to(self._embedding.device)].to(hidden)
        guess = self.heads(head, hidden[:, 0], path)
        logq = (guess.to(self._output.dtype) @ self._output.T).float().log_softmax(-1)
        with torch.no_grad():
            teacher = hidden[:, head + 1].to(self._output.dtype)
            logp = (teacher @ self._output.T).float().log_softmax(-1)
        return logp, logq

    def loss(self, inputs: dict[str, Tensor], chance: Chance) -> dict[str, Tensor]:
        """Weighted divergence, and how often the first head's best guess is the target's."""
        loss = right = torch.zeros((), device=self.device)
        for head in range(self.heads.num_heads):
            logp, logq = self.laws(head, inputs)
            weight = self.training_settings.decay**head
            loss = loss + weight * divergence(self.training_settings.divergence, logp, logq).mean()
            if head == 0:
                right = (logp.argmax(-1) == logq.argmax(-1)).float().mean()
        return {"loss": loss, "agreement": right}

    @torch.no_grad()
    def agreement(self, indices: Tensor, batch_size: int = 512) -> list[float]:
        """For each head, how often its best guess is the target's; `batch_size` examples at a time."""
        right = torch.zeros(self.heads.num_heads, device=self.device)
        for part in indices.split(batch_size):
            inputs = {k: v.to(self.device) for k, v in self._examples.rows(part).items()}
            for head in range(self.heads.num_heads):
                logp, logq = self.laws(head, inputs)
                right[head] += (logp.argmax(-1) == logq.argmax(-1)).sum()
        return [round(num / len(indices), 4) for num in right.tolist()]


def train_heads(
    network: Any,
    answers: Answers,
    out: Path,
    training: HeadTraining | None = None,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Fit heads on a frozen target and save them in `out`; resumes what lies there.

    Args:
        network: the target, a causal language model of transformers.
        answers: its own answers.
        out: folder for checkpoints and the heads.
        training: settings.
        progress: show bars on stderr.

    Returns:
        Figures: "agreement" of each head on examples held out, "examples", "parameters", "seconds".

    Raises:
        InputError: bad settings, or answers that are too short.
    """
    training = training or HeadTraining()
    torch.manual_seed(training.fit.seed)
    embedding = network.get_input_embeddings().weight.detach()
    output = network.get_output_embeddings().weight.detach()
    heads = make_heads(training.kind, embedding.shape[1], training.num_heads)
    heads.to(output.device)
    vocabulary = frequent_tokens(answers, training.num_vocabulary).to(output.device)
    examples = head_examples(network, answers, training.num_heads, progress=progress)
    num_examples = len(examples.places)
    num_held = num_held_out(num_examples)
    if num_held == num_examples:
        raise InputError(f"{num_examples} examples: expected more answers, or longer ones")
    learn = replace(examples, places=examples.places[num_held:])
    held = replace(examples, places=examples.places[:num_held])
    objective = HeadObjective(heads, learn, embedding, output[vocabulary], training)
    log = fit(objective, training.fit, out / "fit", device=output.device, progress=progress)
    judge = HeadObjective(heads.eval(), held, embedding, output[vocabulary], training)
    figures = {
        "agreement": judge.agreement(torch.arange(num_held)),
        "examples": len(learn.places),
        "parameters": sum(parameter.numel() for parameter in heads.parameters()),
        "vocabulary": len(vocabulary),
        "seconds": log[-1]["seconds"],
    }
    save_heads(heads, vocabulary, out, divergence=training.divergence, figures=figures)
    return figures
