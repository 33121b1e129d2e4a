"""LoRA adapters in peft's layout: put beside the layers of a network, saved, and merged into it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import CheckpointError, InputError, optional
from .files import making_folder, user_path
from .stored import read_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""Files of an adapter."""

CLASSES = "classes.json"
"""The file beside an adapter that says what the model's classes are called with it."""


def add_adapter(network: nn.Module, layers: Sequence[str], rank: int, alpha: int) -> Any:
    """Put LoRA beside layers of a network, which stays what it is but for these; all else is frozen.

    Args:
        network: changed in place.
        layers: names of linear layers and embeddings.
        rank: of the updates.
        alpha: the updates count alpha / rank.

    Returns:
        peft's wrapper around the network.

    Raises:
        MissingDependencyError: peft is not installed.

    Paper: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2022.
    """
    with optional("peft", "LoRA"):
        from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(layers))
    return get_peft_model(network, config)


def save_adapter(wrapped: Any, folder: Path, class_names: Sequence[str] | None = None) -> None:
    """Write an adapter in peft's layout.

    Args:
        wrapped: of `add_adapter`.
        folder: to write; an older one is replaced.
        class_names: of the model with it, None where they are the model's own.
    """
    with making_folder(folder, is_ours=lambda path: (path / CONFIG).exists()) as place:
        wrapped.save_pretrained(str(place), safe_serialization=True, save_embedding_layers=False)
        if class_names is not None:
            (place / CLASSES).write_text(json.dumps({"class_names": list(class_names)}) + "\n")


def merge_adapter(pipe: Any, folder: str | Path) -> None:
    """Add an adapter's updates to the weights of a pipeline's transformer, whose layers stay as they are.

    Raises:
        CheckpointError: no adapter, or one that does not fit, naming the key.
        InputError: an adapter of another kind than LoRA.
        MissingDependencyError: peft is not installed.
    """
    path = user_path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise CheckpointError(
                f"{path}: expected an adapter in peft's layout, {name} is missing"
            )
    kind = read_object(path / CONFIG).get("peft_type")
    if kind != "LORA":
        raise InputError(f"{path}: an adapter of kind {kind!r}, expected LORA")
    with optional("peft", "an adapter"):
        from peft import (  # pyright: ignore[reportMissingImports]
            PeftConfig,
            get_peft_model,
            get_peft_model_state_dict,
            set_peft_model_state_dict,
        )
    from safetensors.torch import load_file

    try:
        wrapped: Any = get_peft_model(pipe.transformer, PeftConfig.from_pretrained(str(path)))
        tensors = load_file(path / WEIGHTS)
    except Exception as error:  # strangers' values in others' code
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(f"{path}: does not fit this model ({reason})") from error
    wanted = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    for key in sorted(set(wanted) ^ set(tensors)):
        what = "missing" if key in wanted else "unexpected"
        raise CheckpointError(f"{path}: key {key!r} is {what}")
    for key, value in tensors.items():
        if value.shape != wanted[key].shape:
            raise CheckpointError(
                f"{path}: key {key!r} has shape {list(value.shape)}, expected "
                f"{list(wanted[key].shape)}"
            )
    set_peft_model_state_dict(wrapped, tensors)
    with torch.no_grad():
        pipe.transformer = wrapped.merge_and_unload()
    if (path / CLASSES).is_file():
        pipe.register_to_config(class_names=read_object(path / CLASSES).get("class_names"))
