"""A model drafts on the parts of a long prompt that matter to its end (RAPID)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....errors import InputError
from ...loading import load_text_model
from ...model import as_text_model
from ..base import register
from ..draft_tree import DraftTree

Embed = Callable[[Sequence[str]], Tensor]
"""Texts to vectors [N, C]."""


class TextEncoder:
    """Texts as unit vectors: the mean of what an encoder's last layer makes of their tokens.

    Args:
        name: a folder or hub id of an encoder of transformers that was trained for it (MiniLM, E5, BGE, ...).
        device: where it runs.

    Raises:
        InputError: nothing of that name.
        CheckpointError: what is there cannot be read.
    """

    def __init__(self, name: str | Path, device: str = "cpu") -> None:
        self._network, self._tokenizer = load_text_model(name, device=device, auto="AutoModel")
        positions = getattr(self._network.config, "max_position_embeddings", None) or 512
        self._options: dict[str, Any] = {
            "return_tensors": "pt", "padding": True, "truncation": True, "max_length": positions,
        }  # fmt: skip

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], batch_size: int = 32) -> Tensor:
        """Unit vectors [N, C]; the cosine of two texts is their product."""
        found = []
        for first in range(0, len(texts), batch_size):
            part = self._tokenizer(list(texts[first : first + batch_size]), **self._options)
            part = part.to(self._network.device)
            states = self._network(**part).last_hidden_state.float()
            weights = part["attention_mask"][..., None]
            mean = (states * weights).sum(1) / weights.sum(1).clamp(min=1)
            found.append(torch.nn.functional.normalize(mean, dim=-1))
        return torch.cat(found)


_encoder = lru_cache(maxsize=2)(TextEncoder)


class RetrievedContext:
    """The parts of a long prompt that have most to do with its question, for a draft to read.

    The prompt is cut into parts; the best are kept in their order, with the first part and those
    at the end, where the question stands. With an encoder, parts are ranked by the cosine of their
    vector and the question's; without, by the tokens that they share with the question, weighted by rarity
    (BM25's inverse document frequency).

    Args:
        num_tokens: length of what is kept; shorter prompts are kept whole.
        chunk: tokens of a part.
        query: tokens at the end that say what is asked.
        embed: the encoder; None for none.
        decode: token ids to text, for the encoder.
        question: what is asked, for the encoder; None for the text of the last `query` tokens.
        threshold: cosine below which a part is left out.

    Raises:
        InputError: a value out of range, or an encoder and nothing that makes text of ids.

    Paper: Chen et al., "Long-Context Inference with Retrieval-Augmented Speculative Decoding", 2025
    (RAPID), section 3.1 (parts of 512 tokens, threshold 0.3 of the vectors of BGE-M3).
    """

    def __init__(
        self,
        num_tokens: int = 512,
        chunk: int = 64,
        query: int = 64,
        *,
        embed: Embed | None = None,
        decode: Callable[[list[int]], str] | None = None,
        question: str | None = None,
        threshold: float = -1.0,
    ) -> None:
        if chunk < 1 or query < 1 or num_tokens < 2 * chunk:
            raise InputError(
                f"num_tokens {num_tokens}, chunk {chunk}, query {query}: expected num_tokens of at "
                "least two chunks"
            )
        if embed is not None and decode is None:
            raise InputError("an encoder reads text: expected the model's tokenizer")
        self.num_tokens, self.chunk, self.query = num_tokens, chunk, query
        self._embed, self._decode = embed, decode
        self._question, self._threshold = question, threshold

    def __call__(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """The shorter prompts."""
        return [self._shorten(list(prompt)) for prompt in prompts]

    def _shorten(self, prompt: list[int]) -> list[int]:
        if len(prompt) <= self.num_tokens:
            return prompt
        starts = range(0, len(prompt), self.chunk)
        parts = [prompt[start : start + self.chunk] for start in starts]
        room = self.num_tokens // self.chunk
        at_end = max(1, min(room - 1, -(-self.query // self.chunk)))
        kept = {0, *range(len(parts) - at_end, len(parts))}
        scores = self._scores(parts, prompt[-self.query :])
        for place in sorted(range(len(parts)), key=lambda place: -scores[place]):
            if len(kept) >= room or scores[place] < self._threshold:
                break
            kept.add(place)
        return [token for place in sorted(kept) for token in parts[place]]

    def _scores(self, parts: list[list[int]], asked: list[int]) -> list[float]:
        if self._embed is not None and self._decode is not None:
            question = self._decode(asked) if self._question is None else self._question
            vectors = self._embed([*map(self._decode, parts), question])
            return (vectors[:-1] @ vectors[-1]).tolist()
        frequency = Counter(token for part in parts for token in set(part))
        rare = {token: math.log(len(parts) / frequency[token]) for token in set(asked)}
        return [sum(rare.get(token, 0.0) for token in set(part)) for part in parts]


class _TheTarget:
    """Stands for the target until it is known."""

    vocab_size = None


@register("retrieved", summary="a model, or the target, on a prompt's relevant parts (RAPID)")
class Retrieved(DraftTree):
    """A chain drafted on a shortened context, for prompts of thousands of tokens.

    The drafter may be the target itself: with a fraction of the keys and values its passes cost
    less. Drawn tokens come with their laws, so every rule for chains judges them; "transfer" is
    RAPID's own.

    Args:
        encoder: folder or hub id of an encoder of transformers, or a function from texts to vectors;
            None ranks by shared tokens.
        draft: a draft model; None for the target.
        context_tokens: length of the context that the draft reads.
        chunk: tokens of a part.
        query: tokens at the prompt's end that say what is asked.
        question: what is asked, in words; see `RetrievedContext`.
        threshold: cosine below which a part is left out.
        num_draft: length of the chain.
        **options: of `DraftTree`.

    Raises:
        InputError: a value out of range; at use, an encoder and no tokenizer.

    Paper: see `RetrievedContext`.
    """

    def __init__(
        self,
        encoder: str | Path | Embed | None = None,
        draft: Any = None,
        context_tokens: int = 1024,
        chunk: int = 128,
        query: int = 64,
        question: str | None = None,
        threshold: float = -1.0,
        num_draft: int = 6,
        **options: Any,
    ) -> None:
        chain = {"expansion": "independent", "branching": (1,) * max(1, num_draft)}
        super().__init__(draft or _TheTarget(), **chain | options)
        self._is_target = draft is None
        self._encoder = encoder
        self._settings: dict[str, Any] = {"question": question, "threshold": threshold}
        self._sizes = context_tokens, chunk, query
        self._context = RetrievedContext(*self._sizes)

    def begin(self, state: Any) -> None:
        """Choose the parts of each prompt, and read them."""
        if self._is_target:
            self.draft: Any = as_text_model(state.model, self.num_tokens)
        if self._encoder is not None:
            embed = self._encoder
            if isinstance(embed, str | Path):
                embed = _encoder(str(embed))
            decode = None if self.text_tokenizer is None else self.text_tokenizer.decode
            self._context = RetrievedContext(
                *self._sizes, embed=embed, decode=decode, **self._settings
            )
        super().begin(state)
