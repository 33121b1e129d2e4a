"""Several continuations of one prompt at the price of one: `arvision.complete`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contracts import Stats
from ..errors import InputError, check_count
from .drafters.papers.superposed import Draft, longer, superposed
from .generation import check_room, end_ids, open_model
from .model import as_text_model
from .ngrams import NGrams, as_ngrams
from .prompts import encode

MOST_DRAFTS = 64
"""Continuations at a time."""


@dataclass
class Completions:
    """What `complete` returns, the best first.

    Attributes:
        tokens: new ids of each continuation, an end token included.
        texts: the continuations; None without a tokenizer.
        scores: sums of the logarithms that they were ranked by.
        stats: `forward_passes` (after the one that reads the prompt), `tokens` (of all
            continuations), `seconds`, `rule` ("superposed"), `lossless` (false).
    """

    tokens: list[list[int]]
    texts: list[str] | None
    scores: list[float]
    stats: Stats


@torch.no_grad()
def complete(
    model: Any,
    prompt: Any,
    *,
    k: int = 3,
    max_new_tokens: int = 16,
    tokenizer: Any = None,
    ngrams: Any = None,
    alpha: float = 0.5,
    delta: float = 1e-4,
    chat: bool = False,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> Completions:
    """k continuations of a prompt from one pass per token: suggestions, as an editor shows them.

    Lossy: every continuation after the first token reads a mixture of all k, so that none follows
    the model's law. A pass is fed the embeddings of the continuations' last tokens, added up with
    the continuations' probabilities for weights; its k likeliest tokens are put behind each of them,
    n-grams of your own texts say which suit, and the best k stay. The first tokens are the model's
    k likeliest.

    Args:
        model: a causal language model of transformers, an `HFCausalLM`, or the name of one.
        prompt: a string, messages, or ids [L].
        k: continuations.
        max_new_tokens: of each.
        tokenizer: for strings; a model given by name brings its own.
        ngrams: texts like those that are written: a file, a list of strings or of id lists, or
            `arvision.text.ngrams.NGrams` that were made before. Without them the continuations soon
            differ in their first tokens alone, since nothing tells them apart.
        alpha: weight of the n-grams, 0 to 1.
        delta: probability of an n-gram that the texts do not hold.
        chat: take a string for a user's message and wrap it in the model's chat template.
        device: for a model given by name.
        dtype: for a model given by name.

    Raises:
        InputError: bad options or prompts, before any model call.

    Paper: Shen et al., "Superposed Decoding: Multiple Generations from a Single Autoregressive
    Inference Pass", 2024, section 3.
    """
    started = time.perf_counter()
    check_count("k", k, MOST_DRAFTS)
    check_count("max_new_tokens", max_new_tokens)
    for name, value in (("alpha", alpha), ("delta", delta)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise InputError(f"{name} {value!r}: expected a number from 0 to 1")
    if delta == 0:
        raise InputError("delta 0: expected a probability above 0")
    network, own = open_model(model, device, dtype)
    tokenizer = tokenizer or own
    lm = as_text_model(network, max_new_tokens)
    ids = encode(prompt, tokenizer, chat)
    if len(ids) != 1:
        raise InputError(f"{len(ids)} prompts: expected one, which gets {k} continuations")
    if k > lm.vocab_size:
        raise InputError(f"k {k}: the model has {lm.vocab_size} tokens")
    check_room(lm, ids, max_new_tokens)
    known = as_ngrams(ngrams, tokenizer)
    drafts, passes = _drafts(lm, ids[0], k, max_new_tokens, known, alpha, delta)
    seconds = time.perf_counter() - started
    tokens = [list(draft.tokens) for draft in drafts]
    texts = None
    if tokenizer is not None:
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
    total = sum(map(len, tokens))
    stats = Stats(
        forward_passes=passes,
        tokens=total,
        tokens_per_pass=(total - len(drafts)) / max(1, passes),
        seconds=seconds,
        seconds_per_token=seconds / max(1, total),
        rule="superposed",
        lossless=False,
    )
    return Completions(tokens, texts, [draft.score for draft in drafts], stats)


def _drafts(
    lm: Any, ids: Tensor, k: int, num: int, known: NGrams | None, alpha: float, delta: float
) -> tuple[list[Draft], int]:
    """The k drafts, and passes after the one that read the prompt."""
    embed, ends = lm.network.get_input_embeddings(), end_ids(lm.network)
    sources = [] if known is None or alpha == 0 else [known]
    lm.prefixes, lm.watched = None, ()
    state, logits = lm.start([ids])
    context, drafts = ids.tolist(), [Draft()]
    one = torch.ones_like(state.lengths)
    for place in range(num):
        best = logits[0].float().log_softmax(-1).topk(k)
        # The first tokens are the model's own likeliest.
        drafts = longer(
            drafts,
            best.indices.tolist(),
            best.values.tolist(),
            sources if place else (),
            context,
            num=k,
            alpha=alpha,
            delta=delta,
            ends=ends,
        )
        going = [draft for draft in drafts if not draft.is_finished]
        if place + 1 == num or not going:
            return drafts, place
        logits = state.extend_vectors(superposed([going], embed))[:, -1]
        state.advance(one, [1])
    return drafts, num
