"""What draft heads learn from: a target's own answers, and what its layers made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...decoding.drafter import NoDrafter
from ...decoding.logits import Shaping
from ...decoding.loop import FixedWindow, decode_tokens
from ...decoding.run import Run
from ...decoding.verify import gumbel_coupling
from ...errors import InputError
from ..chat import chat_ids
from ..layers import find_layers, watching
from ..seq2seq import as_generator
from ..stop import TextEnd

HELD_OUT = 0.1
"""Share of the answers or examples that a fit never sees."""


@dataclass(frozen=True)
class Answers:
    """Texts of a target.

    Attributes:
        texts: ids of each prompt and its answer.
        starts: where each answer begins.
    """

    texts: list[list[int]]
    starts: list[int]


def question_ids(text: str, tokenizer: Any) -> list[int]:
    """Ids of a user's question, in the tokenizer's chat template where it has one."""
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer(text)["input_ids"]
    return chat_ids([{"role": "user", "content": text}], tokenizer)


def answer(
    network: Any,
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int = 96,
    batch_size: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
    progress: bool = True,
) -> Answers:
    """Let a target answer prompts (self-distillation: a draft learns what the target says).

    Args:
        network: a language model of transformers, causal or with an encoder.
        prompts: ids.
        num_tokens: of an answer at most.
        batch_size: prompts at a time; sorted by length, so that little is padded.
        temperature: of the draws; 0 is greedy.
        seed: of the draws.
        progress: show a bar on stderr.
    """
    model = as_generator(network, num_tokens)
    config = getattr(network, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    end_ids = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    texts: dict[int, list[int]] = {}
    for first in tqdm(range(0, len(order), batch_size), disable=not progress, desc="answers"):
        rows = order[first : first + batch_size]
        samples = decode_tokens(
            model,
            [list(prompts[row]) for row in rows],
            Run(len(rows), num_tokens, [(seed, row) for row in rows]),
            drafter=NoDrafter(),
            rule=gumbel_coupling,
            shape=Shaping(temperature=temperature),
            policy=FixedWindow(1),
            stop=TextEnd(len(rows), end_ids) if end_ids else None,
        )
        for place, row in enumerate(rows):
            num = samples.stats["lengths"][place]
            texts[row] = [*prompts[row], *samples.tokens[place, :num].tolist()]
    return Answers([texts[row] for row in range(len(prompts))], [len(ids) for ids in prompts])


@torch.no_grad()
def hidden_states(network: Any, text: Sequence[int]) -> Tensor:
    """Input of the output layer along a text, [L, C]."""
    seen: list[Tensor] = []
    hook = network.get_output_embeddings().register_forward_pre_hook(
        lambda _, arguments: seen.append(arguments[0])
    )
    device = network.get_input_embeddings().weight.device
    try:
        network(torch.tensor([list(text)], device=device), use_cache=False)
    finally:
        hook.remove()
    return seen[0][0]


@dataclass(frozen=True)
class HeadExamples:
    """Places in answers, M of them, and what is known about the S tokens of all answers.

    A place is an example together with the K places behind it, which are the next rows: every
    hidden state is stored once.

    Attributes:
        hidden: [S, C] float16, hidden states at the place before each token.
        tokens: [S] int64, the tokens.
        places: [M] int64, rows that have K more of their answer behind them.
        num_heads: K.
    """

    hidden: Tensor
    tokens: Tensor
    places: Tensor
    num_heads: int

    def rows(self, indices: Tensor) -> dict[str, Tensor]:
        """Examples `indices` [B]: "hidden" [B, K + 1, C], at a place and the K behind it (the
        teacher's), and "tokens" [B, K + 1], what follows each of these."""
        rows = self.places[indices][:, None] + torch.arange(self.num_heads + 1)
        return {"hidden": self.hidden[rows], "tokens": self.tokens[rows]}


def head_examples(
    network: Any, answers: Answers, num_heads: int, *, progress: bool = True
) -> HeadExamples:
    """Every place of the answers that has enough behind it.

    Raises:
        InputError: answers that are all too short.
    """
    texts = [
        (text, start)
        for text, start in zip(answers.texts, answers.starts, strict=True)
        if len(text) - start > num_heads
    ]
    if not texts:
        raise InputError(f"answers of fewer than {num_heads + 1} tokens: nothing to learn from")
    total = sum(len(text) - start for text, start in texts)
    hidden, places, begin = torch.empty(0), [], 0
    for text, start in tqdm(texts, disable=not progress, desc="hidden states"):
        states = hidden_states(network, text)[start - 1 : -1].to(torch.float16)
        if begin == 0:  # room for all at once: lists that are joined would need twice as much
            hidden = torch.empty(total, states.shape[1], dtype=torch.float16)
        end = begin + len(states)
        hidden[begin:end] = states
        places.append(torch.arange(begin, end - num_heads))
        begin = end
    tokens = torch.tensor([token for text, start in texts for token in text[start:]])
    return HeadExamples(hidden, tokens, torch.cat(places), num_heads)


@dataclass(frozen=True)
class TextExamples:
    """Texts of a target from their beginnings, and what its layers made of them.

    Attributes:
        texts: ids [L] of each.
        features: [L, F C] float16 of each, what went into some layers.
        hidden: [L, C] float16 of each, what went into the output layer.
        starts: where each answer begins.
    """

    texts: list[Tensor]
    features: list[Tensor]
    hidden: list[Tensor]
    starts: list[int]

    def rows(self, indices: Tensor) -> dict[str, Tensor]:
        """Texts `indices` [B], padded: "texts" [B, L], "features" [B, L, F C], "hidden" [B, L, C],
        "starts" [B], "lengths" [B]."""
        chosen = indices.tolist()

        def pad(tensors: list[Tensor]) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence(
                [tensors[index] for index in chosen], batch_first=True
            )

        return {
            "texts": pad(self.texts),
            "features": pad(self.features),
            "hidden": pad(self.hidden),
            "starts": torch.tensor([self.starts[index] for index in chosen]),
            "lengths": torch.tensor([len(self.texts[index]) for index in chosen]),
        }


@torch.no_grad()
def read_texts(
    network: Any,
    answers: Answers,
    length: int,
    *,
    layers: Sequence[int] = (),
    least: int = 2,
    progress: bool = True,
) -> TextExamples:
    """Let a target read its answers once.

    Args:
        network: the target.
        answers: its answers.
        length: tokens of a text that are read, from its start.
        layers: whose inputs are features; none for none.
        least: tokens of an answer among those; shorter ones are left out.
        progress: show a bar on stderr.

    Raises:
        InputError: answers that are all too short.
    """
    found = TextExamples([], [], [], [])
    last = len(getattr(*find_layers(network)))
    device = network.get_input_embeddings().weight.device
    pairs = list(zip(answers.texts, answers.starts, strict=True))
    for whole, start in tqdm(pairs, disable=not progress, desc="features"):
        text = whole[:length]
        if len(text) - start < least:
            continue
        seen: dict[int, Tensor] = {}
        with watching(network, (*layers, last), seen):
            network(torch.tensor([text], device=device), use_cache=False)
        features = [seen[layer][0].to(torch.float16) for layer in layers]
        found.texts.append(torch.tensor(text))
        found.hidden.append(seen[last][0].to(torch.float16).cpu())
        found.features.append(
            torch.cat(features, dim=-1).cpu() if layers else found.hidden[-1][:, :0]
        )
        found.starts.append(start)
    if not found.texts:
        raise InputError(
            f"no answer has {least} tokens among the first {length} of its text: expected shorter "
            "prompts or longer answers"
        )
    return found


def split_answers(answers: Answers) -> tuple[Answers, Answers]:
    """Answers to learn from, and those that the fit never sees.

    Raises:
        InputError: a single answer.
    """
    num = num_held_out(len(answers.texts))
    if num >= len(answers.texts):
        raise InputError(f"{len(answers.texts)} answers: expected at least 2")
    parts = (slice(num, None), slice(num))
    learn, held = (Answers(answers.texts[part], answers.starts[part]) for part in parts)
    return learn, held


def num_held_out(num: int) -> int:
    """How many of `num` answers or examples a fit never sees, at least one."""
    return max(1, int(HELD_OUT * num))


def frequent_tokens(answers: Answers, num: int) -> Tensor:
    """The `num` most frequent tokens of some texts, ascending, [W]."""
    counts = torch.bincount(torch.tensor([token for text in answers.texts for token in text]))
    best = counts.argsort(descending=True)[:num]
    return best[counts[best] > 0].sort().values
