"""Tiny NextStep models and folders, made from the recorded checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from arvision.models import NextStep

FOLDER = Path(__file__).resolve().parent / "goldens" / "nextstep" / "nextstep"
SIZES: dict[str, Any] = {"grid": (3, 4), "num_sampling_steps": 4}


def load(**sizes) -> NextStep:
    return NextStep.from_official(FOLDER, **SIZES | sizes)


def load_calm(strength: float = 0.02, **sizes) -> NextStep:
    """The same model with latents that matter less to each other.

    The recorded weights multiply a difference by 2.5 from latent to latent, rounding included.
    """
    model = load(**sizes)
    model.transformer.image_in_projector.weight.data.mul_(strength)
    return NextStep(model.transformer, model.tokenizer, text_tokenizer=text_tokenizer())


def text_tokenizer():
    """One token per character of a few, and the special tokens of the recorded checkpoint."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789* "
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)} | {"?": 48}, "?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    names = ["<|image_area|>", "<|boi|>", "<|eoi|>", "<|image|>", "<|pad|>"]
    # Ids 49 to 53, as the recorded configuration has them.
    inner.add_special_tokens([f"<|unused{i}|>" for i in range(39, 49)])
    inner.add_special_tokens(names)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<|pad|>")


def official_folder(path: Path, *, shards: int = 1, with_text: bool = True) -> Path:
    """A folder laid out like the hub's."""
    shutil.copytree(FOLDER, path)
    if with_text:
        text_tokenizer().save_pretrained(path)
    if shards > 1:
        tensors = load_file(path / "model.safetensors")
        (path / "model.safetensors").unlink()
        places = {}
        for number in range(shards):
            name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = {
                k: v for i, (k, v) in enumerate(sorted(tensors.items())) if i % shards == number
            }
            save_file(part, path / name)
            places |= dict.fromkeys(part, name)
        index = {"metadata": {}, "weight_map": places}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path
