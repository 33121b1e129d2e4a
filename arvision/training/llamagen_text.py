"""The small text encoder of the embedded text-conditional model: a tiny T5 with a word list."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from .captions import vocabulary


def build_text_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the captions' vocabulary that ends each text with `</s>`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = ["<pad>", "</s>", "<unk>", *vocabulary()]
    core = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
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
