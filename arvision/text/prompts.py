"""Prompts in all forms that they come in, as ids; what belongs to a row besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..decoding.noise import parse_seeds
from ..errors import InputError
from .chat import chat_ids


def encode(
    prompts: Any, tokenizer: Any, chat: bool = False, attention_mask: Any = None
) -> list[Tensor]:
    """Prompts as id tensors [L]; see `generate`.

    Raises:
        InputError: no prompt, strings without a tokenizer, a mask that does not fit, or something
            else than text or ids.
    """
    if isinstance(prompts, Mapping) and "input_ids" in prompts:
        found = prompts.get("attention_mask")
        attention_mask = found if attention_mask is None else attention_mask
        prompts = prompts["input_ids"]
    if isinstance(prompts, np.ndarray | Tensor):
        prompts = prompts.tolist()
    if isinstance(prompts, list | tuple) and prompts and not _is_text(prompts[0]):
        rows = [prompts] if isinstance(prompts[0], int | np.integer) else prompts
        try:
            ids = [torch.as_tensor(np.asarray(row)) for row in rows]
        except (TypeError, ValueError) as error:
            raise InputError("prompts: expected ids [B, L] or a list of id lists") from error
        if any(row.dim() != 1 or (len(row) and row.is_floating_point()) for row in ids):
            raise InputError("prompts: expected ids [B, L] or a list of id lists")
        return _without_padding([row.to(torch.int64) for row in ids], attention_mask)
    if attention_mask is not None:
        raise InputError("attention_mask with prompts that are text: expected ids [B, L]")
    single = isinstance(prompts, str) or (
        isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], dict)
    )
    rows = [prompts] if single else list(prompts)
    if not rows:
        raise InputError("no prompt: expected at least one")
    if tokenizer is None:
        raise InputError("prompts are text: pass tokenizer=..., or ids [B, L]")
    return [torch.tensor(_encode_one(row, tokenizer, chat), dtype=torch.int64) for row in rows]


def _is_text(entry: Any) -> bool:
    """Whether an entry of a list of prompts is a string, a message, or a list of messages."""
    return isinstance(entry, str | dict) or (
        isinstance(entry, list | tuple) and len(entry) > 0 and isinstance(entry[0], dict)
    )


def _without_padding(ids: list[Tensor], attention_mask: Any) -> list[Tensor]:
    """Prompts [L] without the places where the mask is 0."""
    if attention_mask is None:
        return ids
    mask = torch.as_tensor(np.asarray(attention_mask))
    mask = mask[None] if mask.dim() == 1 else mask
    if mask.dim() != 2 or [mask.shape[1]] * len(mask) != [len(row) for row in ids]:
        raise InputError(
            f"attention_mask {tuple(mask.shape)}: expected [{len(ids)}, {len(ids[0])}], as the ids"
        )
    return [row[own.bool()] for row, own in zip(ids, mask, strict=True)]


def _encode_one(prompt: Any, tokenizer: Any, chat: bool) -> list[int]:
    if isinstance(prompt, str) and not chat:
        return tokenizer(prompt)["input_ids"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list) or not all(isinstance(part, dict) for part in messages):
        raise InputError(f"prompt {prompt!r}: expected a string, messages, or ids")
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("chat: the tokenizer has no chat template")
    return chat_ids(messages, tokenizer)


def row_seeds(seed: Any, num: int) -> list[Any]:
    """A seed or pair (seed, image) for each of `num` rows.

    Raises:
        InputError: another number of seeds than of rows; or entries that are no seeds.
    """
    if isinstance(seed, Sequence | Tensor | np.ndarray) and np.ndim(seed) > 0:
        seeds = [tuple(one) if np.ndim(one) else one for one in np.asarray(seed).tolist()]
        if len(seeds) != num:
            raise InputError(f"{len(seeds)} seeds for {num} prompts: expected one each")
        return list(parse_seeds(seeds))
    value = seed.item() if isinstance(seed, np.generic | np.ndarray | Tensor) else seed
    parse_seeds([value])
    return [(value, row) for row in range(num)]


def check_token_ids(ids: Sequence[int], vocab_size: int) -> list[int]:
    """Tokens that end a text, as integers.

    Raises:
        InputError: an entry that is no token of the model.
    """
    found = torch.as_tensor(ids).flatten().tolist()
    for token in found:
        if not isinstance(token, int) or not 0 <= token < vocab_size:
            raise InputError(f"stop_token_ids {token!r}: expected integers in 0..{vocab_size - 1}")
    return found
