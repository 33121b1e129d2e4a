"""What draft heads learn from: a target's own answers, and what its layers made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...decoding.logits import Shaping
from ...decoding.loop import FixedWindow, NoDrafter, decode_tokens
from ...decoding.run import Run
from ...decoding.verify import gumbel_coupling
from ...errors import InputError
from .. import HFCausalLM
from ..chat import chat_ids
from ..stop import TextEnd


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
        network: a causal language model of transformers.
        prompts: ids.
        num_tokens: of an answer at most.
        batch_size: prompts at a time; sorted by length, so that little is padded.
        temperature: of the draws; 0 is greedy.
        seed: of the draws.
        progress: show a bar on stderr.
    """
    model = HFCausalLM(network, num_tokens)
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
    """Places in answers, M of them.

    Attributes:
        hidden: [M, K + 1, C], hidden states at a place and at the K behind it (the teacher's).
        tokens: [M, K + 2], what follows each place: the token drawn there and K + 1 more.
    """

    hidden: Tensor
    tokens: Tensor


def head_examples(
    network: Any, answers: Answers, num_heads: int, *, progress: bool = True
) -> HeadExamples:
    """Every place of the answers that has enough behind it.

    Raises:
        InputError: answers that are all too short.
    """
    hidden, tokens = [], []
    texts = zip(answers.texts, answers.starts, strict=True)
    for text, start in tqdm(list(texts), disable=not progress, desc="hidden states"):
        last = len(text) - num_heads - 2
        if last < start - 1:
            continue
        states = hidden_states(network, text).to(torch.float16).cpu()
        ids = torch.tensor(text)
        places = torch.arange(start - 1, last + 1)
        offsets = torch.arange(num_heads + 1)
        hidden.append(states[places[:, None] + offsets])
        tokens.append(ids[places[:, None] + 1 + torch.arange(num_heads + 1)])
    if not hidden:
        raise InputError(f"answers of fewer than {num_heads + 2} tokens: nothing to learn from")
    return HeadExamples(torch.cat(hidden), torch.cat(tokens))


def frequent_tokens(answers: Answers, num: int) -> Tensor:
    """The `num` most frequent tokens of some texts, ascending, [W]."""
    counts = torch.bincount(torch.tensor([token for text in answers.texts for token in text]))
    best = counts.argsort(descending=True)[:num]
    return best[counts[best] > 0].sort().values
