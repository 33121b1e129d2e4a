"""Small language models from nothing, and what they learn from plain text before they are aligned."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...decoding.transformers_cache import TextSizes
from ...errors import InputError
from ...files import user_path
from ...schema import read_text
from ...training.loop import Chance, Objective

MOST_TEXT = 1 << 30
"""Bytes of one file of texts."""

BLOCK = 128
"""Tokens of a text that one example holds."""


def own_texts(path: Path) -> list[str]:
    """The texts in a file, or in all files of a folder and its folders, in the order of their names.

    Raises:
        InputError: nothing there, or something else than UTF-8 text.
    """
    path = user_path(path)
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    if not files:
        raise InputError(f"{path}: expected a file of text or a folder with some")
    return [read_text(file, MOST_TEXT) for file in files]


def text_blocks(texts: Sequence[str], tokenizer: Any, length: int = BLOCK) -> Tensor:
    """All texts one behind the other, an end token between them, in blocks [M, length].

    Raises:
        InputError: texts that do not fill one block.
    """
    ids: list[int] = []
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False)["input_ids"] + ends
    num = len(ids) // length
    if num == 0:
        raise InputError(f"texts of {len(ids)} tokens: expected at least {length}")
    return torch.tensor(ids[: num * length]).view(num, length)


def fresh_copy(network: Any, share: float, width: float) -> Any:
    """A network of the same class and vocabulary with fewer and narrower layers, drawn at random.

    Args:
        network: a causal language model of transformers.
        share: of the layers, at least two.
        width: share of the key/value heads, at least one; all widths follow it.
    """
    config = copy.deepcopy(network.config)
    sizes = TextSizes.of(network)
    config.num_hidden_layers = max(2, round(share * sizes.num_layers))
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    heads = config.num_attention_heads
    kept = max(1, round(width * sizes.num_kv_heads))
    kept_heads = heads // sizes.num_kv_heads * kept
    head_width = config.hidden_size // heads
    if getattr(config, "intermediate_size", None):
        config.intermediate_size = max(8, config.intermediate_size * kept_heads // heads)
    config.hidden_size = head_width * kept_heads
    config.num_attention_heads = kept_heads
    if getattr(config, "num_key_value_heads", None):
        config.num_key_value_heads = kept
    for field in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, field):
            delattr(config, field)
    draft = type(network)(config)
    draft.generation_config = copy.deepcopy(network.generation_config)
    return draft.float()


class PretrainObjective(Objective):
    """Cross entropy of the next token along blocks of text.

    Args:
        draft: what is trained, all of it.
        blocks: [M, L] ids.
    """

    def __init__(self, draft: Any, blocks: Tensor) -> None:
        super().__init__()
        self.draft, self._blocks = draft, blocks
        self.num_items = len(blocks)

    def inputs(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Blocks [B, L]."""
        return {"blocks": self._blocks[indices]}

    def loss(self, inputs: dict[str, Tensor], chance: Chance) -> dict[str, Tensor]:
        """Mean cross entropy per token, in nats."""
        blocks = inputs["blocks"]
        logits = self.draft(blocks, use_cache=False).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
        return {"loss": loss}
