"""Draft heads fitted on a frozen target: its own answers, its own laws as the teacher."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError, unknown_name
from ...training.llamagen_draft import DIVERGENCES, divergence
from ...training.loop import Chance, FitConfig, Objective, fit
from ..drafters.heads import KINDS, DraftHeads, PrefixHeads, make_heads, save_heads
from .data import (
    Answers,
    HeadExamples,
    TextExamples,
    frequent_tokens,
    head_examples,
    num_held_out,
    read_texts,
    split_answers,
)

HEAD_FIT = FitConfig(
    steps=400, batch_size=192, learning_rate=2e-3, warmup=20, mixed_precision="bf16"
)
"""Of heads that see a hidden state; a step takes places of answers."""

PREFIX_FIT = replace(HEAD_FIT, batch_size=4)
"""Of heads that see the whole prefix; a step takes whole texts."""

NUM_RANKS = 10
"""Guesses of a head whose accuracies are measured."""


@dataclass(frozen=True, kw_only=True)
class HeadTraining:
    """Settings of `train_heads`.

    Attributes:
        kind: a name in `arvision.text.drafters.heads.KINDS`.
        num_heads: K.
        num_vocabulary: tokens that the heads may guess, the most frequent ones of the answers.
        divergence: from the target's laws, a name in `arvision.training.llamagen_draft.DIVERGENCES`.
        decay: weight of each head against the one before.
        length: tokens of a text that heads with a prefix layer read, from its start.
        fit: settings of the loop; None for `HEAD_FIT` or `PREFIX_FIT`.

    Raises:
        InputError: an unknown divergence, or numbers below 1.
    """

    kind: str = "hydra"
    num_heads: int = 3
    num_vocabulary: int = 8192
    divergence: str = "forward_kl"
    decay: float = 0.8
    length: int = 192
    fit: FitConfig | None = None

    @property
    def config(self) -> FitConfig:
        """`fit`, or what the kind takes."""
        reads = issubclass(KINDS.get(self.kind, DraftHeads), PrefixHeads)
        return self.fit or (PREFIX_FIT if reads else HEAD_FIT)

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise unknown_name("divergence", self.divergence, DIVERGENCES)
        if self.num_vocabulary < 2 or self.num_heads < 1:
            raise InputError(
                f"num_vocabulary {self.num_vocabulary}, num_heads {self.num_heads}: expected at "
                "least 2 and 1"
            )
        if self.length < self.num_heads + 2:
            raise InputError(f"length {self.length}: expected at least {self.num_heads + 2}")


class HeadObjective(Objective):
    """Divergence of the heads from the target along its answers.

    Args:
        heads: what is trained.
        examples: places of answers, or whole texts for heads with a prefix layer.
        embedding: [V, C] of the target.
        output: [W, C], rows of the target's output layer.
        training: settings.
    """

    def __init__(
        self,
        heads: DraftHeads,
        examples: HeadExamples | TextExamples,
        embedding: Tensor,
        output: Tensor,
        training: HeadTraining,
    ) -> None:
        super().__init__()
        self.heads, self.training_settings = heads, training
        self._examples, self._embedding, self._output = examples, embedding, output
        is_whole = isinstance(examples, TextExamples)
        self.num_items = len(examples.texts if is_whole else examples.places)

    def inputs(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """See `HeadExamples.rows` and `TextExamples.rows`."""
        return self._examples.rows(indices)

    def _embed(self, tokens: Tensor, like: Tensor) -> Tensor:
        # A target may be spread over devices: its first layer's is not always its last one's.
        return self._embedding[tokens.to(self._embedding.device)].to(like)

    def places(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Places of answers: "seen" [M, C], what heads draft from, "path" [M, R + K + 1], the R
        tokens before the one drawn there, that one, and K behind; "teacher" [M, K + 1, C], the
        target's hidden states at the place and behind it."""
        # The heads are trained in float32 (under autocast), whatever the target's dtype.
        hidden, num = inputs["hidden"].float(), self.heads.num_heads
        if "texts" not in inputs:
            return {"seen": hidden[:, 0], "path": inputs["tokens"], "teacher": hidden}
        texts, reach = inputs["texts"], self.heads.reach
        first = torch.arange(texts.shape[1] - 1, device=texts.device)
        seen = self.read(texts, hidden)
        # Place i holds the pair of token i + 1 and the hidden state of place i.
        told = first + 1 >= inputs["starts"][:, None]
        told &= first + 1 + num < inputs["lengths"][:, None]
        rows, place = told.nonzero(as_tuple=True)
        behind = place[:, None] + torch.arange(num + 1, device=texts.device)
        path = place[:, None] + torch.arange(1 - reach, num + 2, device=texts.device)
        return {
            "seen": seen[rows, place],
            "path": texts[rows[:, None], path.clamp(min=0)],
            "teacher": hidden[rows[:, None], behind],
        }

    def read(self, texts: Tensor, hidden: Tensor) -> Tensor:
        """What heads draft from, [B, L - 1, C]: what their prefix layer makes of pairs of tokens and
        hidden states, or without one the hidden states themselves.

        Args:
            texts: [B, L].
            hidden: [B, L, C].
        """
        if not isinstance(self.heads, PrefixHeads):
            return hidden[:, :-1]
        num, reach = texts.shape[1] - 1, self.heads.reach
        place = torch.arange(num, device=texts.device)
        window = place[:, None] + torch.arange(1 - reach, 2, device=texts.device)
        embedded = self._embed(texts[:, window.clamp(min=0)], hidden).flatten(-2)
        mask = hidden.new_full((num, num), float("-inf")).triu(1)[None, None]
        positions = place.expand(len(texts), -1)
        return self.heads.step(embedded, hidden[:, :-1], mask, positions, None)

    def laws(self, head: int, places: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The target's and a head's log-probabilities [M, W] at places."""
        path = places["path"][:, : self.heads.reach + head + 1]
        guess = self.heads(head, places["seen"], self._embed(path, places["seen"]))
        logq = (guess.to(self._output.dtype) @ self._output.T).float().log_softmax(-1)
        with torch.no_grad():
            teacher = places["teacher"][:, head + 1].to(self._output.dtype)
            logp = (teacher @ self._output.T).float().log_softmax(-1)
        return logp, logq

    def loss(self, inputs: dict[str, Tensor], chance: Chance) -> dict[str, Tensor]:
        """Weighted divergence, and how often the first head's best guess is the target's."""
        return self.loss_at(self.places(inputs))

    def loss_at(self, places: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same of `places`."""
        loss = right = torch.zeros((), device=self.device)
        for head in range(self.heads.num_heads):
            logp, logq = self.laws(head, places)
            weight = self.training_settings.decay**head
            loss = loss + weight * divergence(self.training_settings.divergence, logp, logq).mean()
            if head == 0:
                right = (logp.argmax(-1) == logq.argmax(-1)).float().mean()
        return {"loss": loss, "agreement": right}

    @torch.no_grad()
    def accuracies(self, indices: Tensor, batch_size: int = 512) -> list[list[float]]:
        """For each head, how often the guess of each rank is the target's best token.

        Args:
            indices: of examples.
            batch_size: places at a time; of whole texts the hundredth part.
        """
        batch_size = max(1, batch_size // (100 if isinstance(self._examples, TextExamples) else 1))
        hits, total = [torch.zeros(0)] * self.heads.num_heads, 0
        for part in indices.split(batch_size):
            inputs = {k: v.to(self.device) for k, v in self._examples.rows(part).items()}
            places = self.places(inputs)
            total += len(places["seen"])
            for head in range(self.heads.num_heads):
                logp, logq = self.laws(head, places)
                best = logq.topk(min(NUM_RANKS, logq.shape[-1]), dim=-1).indices
                right = (best == logp.argmax(-1)[:, None]).sum(0).cpu()
                hits[head] = hits[head] + right if len(hits[head]) else right
        return [[round(num / max(1, total), 4) for num in row.tolist()] for row in hits]


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
        The heads are saved with their accuracies by rank on the same examples.

    Raises:
        InputError: bad settings, or answers that are too short.
    """
    training = training or HeadTraining()
    torch.manual_seed(training.config.seed)
    embedding = network.get_input_embeddings().weight.detach()
    output = network.get_output_embeddings().weight.detach()
    heads = make_heads(training.kind, embedding.shape[1], training.num_heads)
    heads.to(output.device)
    vocabulary = frequent_tokens(answers, training.num_vocabulary).to(output.device)
    learn, held = _examples(heads, network, answers, training, progress)
    given = embedding, output[vocabulary], training
    objective = HeadObjective(heads, learn, *given)
    log = fit(objective, training.config, out / "fit", device=output.device, progress=progress)
    judge = HeadObjective(heads.eval(), held, *given)
    heads.accuracies = tuple(map(tuple, judge.accuracies(torch.arange(judge.num_items))))
    figures = {
        "agreement": [row[0] for row in heads.accuracies],
        "examples": objective.num_items,
        "parameters": sum(parameter.numel() for parameter in heads.parameters()),
        "vocabulary": len(vocabulary),
        "seconds": log[-1]["seconds"],
    }
    save_heads(heads, vocabulary, out, divergence=training.divergence, figures=figures)
    return figures


def _examples(
    heads: DraftHeads, network: Any, answers: Answers, training: HeadTraining, progress: bool
) -> tuple[HeadExamples | TextExamples, HeadExamples | TextExamples]:
    """What heads learn from, and what they are measured on.

    Raises:
        InputError: too few answers, or too short ones.
    """
    num = training.num_heads
    if isinstance(heads, PrefixHeads):
        options = {"least": num + 1, "progress": progress}
        learn, held = split_answers(answers)
        read = (read_texts(network, part, training.length, **options) for part in (learn, held))
        return next(read), next(read)
    examples = head_examples(network, answers, num, progress=progress)
    num_held = num_held_out(len(examples.places))
    if num_held == len(examples.places):
        raise InputError(f"{num_held} examples: expected more answers, or longer ones")
    return (
        replace(examples, places=examples.places[num_held:]),
        replace(examples, places=examples.places[:num_held]),
    )
