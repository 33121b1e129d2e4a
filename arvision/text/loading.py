"""Language models and their tokenizers by name."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, InputError, optional
from ..files import user_path
from ..foreign import check_regular, few_modules
from ..schema import read_json
from ..stored import check_kernels, check_layers, check_report


def load_text_model(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    auto: str | None = None,
) -> tuple[Any, Any]:
    """A language model, causal or with an encoder, and its tokenizer.

    Args:
        name: a folder in transformers' layout, a GGUF file (or a folder that holds one and no
            `config.json`), or a hub id.
        device: where the model goes; the CPU by default.
        dtype: of the weights; None keeps the checkpoint's.
        auto: the class of transformers that loads it; None for what its configuration asks for.

    Returns:
        The network, in evaluation mode, and the tokenizer.

    Raises:
        InputError: nothing of that name.
        CheckpointError: what is there cannot be read.
        MissingDependencyError: a GGUF file, and no `gguf` package.
    """
    import transformers

    path = user_path(name)
    options: dict[str, Any] = {}
    unpacked: dict[str, Any] = {}
    source = str(path) if path.is_dir() else str(name)
    if path.suffix == ".gguf" or (path.is_dir() and not (path / "config.json").exists()):
        files = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
        if not files or not files[0].is_file():
            raise InputError(f"model {str(name)!r}: expected a folder with config.json, or a GGUF")
        with optional("text", "a GGUF file"):
            import gguf  # noqa: F401
        source, options = str(files[0].parent), {"gguf_file": files[0].name}
        # Drafts are cut from weights, and fits train them: packed ones are neither to be read nor cast.
        unpacked = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    elif not path.is_dir() and (path.is_absolute() or str(name).startswith(".")):
        raise InputError(f"model {str(name)!r}: no such folder")
    try:
        counted: Any = contextlib.nullcontext()
        if path.is_dir():
            check_regular(path)
            if (path / "config.json").exists():
                check_kernels(read_json(path / "config.json"), str(path / "config.json"))
            if any(path.glob("*.safetensors")):
                counted = few_modules(len(check_layers(path)), str(path / "config.json"))
        # transformers would ask at the terminal whether it may run a stranger's code.
        options["trust_remote_code"] = False
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        if auto is None:
            auto = "AutoModelForCausalLM"
            if "gguf_file" not in options:
                config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
                if getattr(config, "is_encoder_decoder", False):
                    auto = "AutoModelForSeq2SeqLM"
        with counted:
            loaded: Any = getattr(transformers, auto).from_pretrained(
                source, dtype=dtype or "auto", output_loading_info=True, **options, **unpacked
            )
        network, report = loaded
        if "gguf_file" not in options:
            check_report(report, f"model {str(name)!r}", may_hold_more=True)
    except CheckpointError:
        raise
    except Exception as error:  # its libraries raise whatever they like
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"model {str(name)!r} cannot be loaded: {first}") from error
    return network.to(device or "cpu").eval(), tokenizer
