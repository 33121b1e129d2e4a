"""A draft model with a tokenizer of its own, for `benchmarks.text_systems`: trained on a target's answers.

No small model of another vocabulary is at hand for SmolLM2, so one is made: a byte-level tokenizer of 2,048 tokens and
a Llama of three layers, which learn the texts of the target's answers by the next token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from arvision.text.fitting.data import Answers
from arvision.text.fitting.pretrain import PretrainObjective, text_blocks
from arvision.training.loop import FitConfig, fit

FIT = FitConfig(
    steps=250, batch_size=16, learning_rate=3e-3, warmup=20, mixed_precision="bf16", log_every=10
)


def other_tokenizer(texts: list[str], target: Any, num_tokens: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer fitted on texts; the target's special tokens are special in it too."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = sorted(set(target.all_special_tokens))
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=target.eos_token, additional_special_tokens=special
    )


def train_other_vocabulary(
    answers: Answers, target: Any, out: Path, num_tokens: int = 2048
) -> dict[str, Any]:
    """Train such a draft and save it in `out`, with its tokenizer.

    Args:
        answers: of the target.
        target: its tokenizer.
        out: a folder.
        num_tokens: of the draft's vocabulary.

    Returns:
        Figures: "loss" (nats per token of its own), "parameters", "seconds".
    """
    torch.manual_seed(0)
    texts = [target.decode(ids, clean_up_tokenization_spaces=False) for ids in answers.texts]
    tokenizer: Any = other_tokenizer(texts, target, num_tokens)
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    log = fit(
        PretrainObjective(network, text_blocks(texts, tokenizer)), FIT, out / "fit", progress=False
    )
    network.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {
        "loss": log[-1]["loss"],
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "seconds": log[-1]["seconds"],
    }
