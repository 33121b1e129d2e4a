"""The small text encoder of text-conditional models trained here: a tiny T5 with a word list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from ..models.llamagen.text import clean_caption
from .captions import vocabulary

MOST_WORDS = 20_000
"""Of a vocabulary; the rarer ones are unknown."""


def words_of(captions: Iterable[str]) -> list[str]:
    """The words of captions and their punctuation marks, most frequent first."""
    splitter, found = _splitter(), Counter[str]()
    for caption in captions:
        found.update(word for word, _ in splitter.pre_tokenize_str(clean_caption(caption)))
    return [word for word, _ in sorted(found.items(), key=lambda item: (-item[1], item[0]))][
        :MOST_WORDS
    ]


def _splitter() -> Any:
    """Cuts texts at spaces, and punctuation marks off."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )


def build_text_tokenizer(words: Sequence[str] | None = None) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that ends each text with `</s>`.

    Args:
        words: of `words_of`; None for those of the captions of Fashion-MNIST, where a hyphen is part
            of its word.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    is_own = words is not None
    words = ["<pad>", "</s>", "<unk>", *(words if words is not None else vocabulary())]
    core = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = _splitter() if is_own else pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def build_text_encoder(vocab_size: int, width: int, seed: int) -> T5EncoderModel:
    """A two-layer T5 encoder of the given width, randomly initialised from `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return T5EncoderModel(
            T5Config(
                vocab_size=vocab_size,
                d_model=width,
                d_kv=width // 4,
                d_ff=2 * width,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
                pad_token_id=0,
                eos_token_id=1,
            )
        )
