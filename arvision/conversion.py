"""Published checkpoints as folders of pipelines, which `arvision.load` opens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .checkpoint import read_state_dict
from .errors import CheckpointError, InputError, unknown_name
from .files import check_out, making_folder
from .folders import parse_device, parse_dtype
from .known import known_models
from .models import MAR, VAR, Infinity, LlamaGen, LlamaGenStudent, NextStep, VARStudent
from .models.var.student import STUDENT_WRAPPERS
from .pipeline import ARPipeline
from .samplers import get_sampler

Sizes = Mapping[str, Any]


def convert(
    family: str,
    transformer: str | Path,
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    text_encoder: str | Path | None = None,
    sizes: Sizes | None = None,
    dtype: Any = None,
) -> ARPipeline:
    """Read a published checkpoint strictly and write the folder of a pipeline.

    Args:
        family: a name in `READERS`.
        transformer: the authors' file, or folder where they publish one.
        out: folder to write, new or empty.
        tokenizer: the file or folder of the image tokenizer; without one a pipeline gives tokens but
            no pictures.
        text_encoder: folder or hub id of the T5 encoder of a model that takes captions; without one
            prompts are its features.
        sizes: what the files do not tell, see the family's `from_official`.
        dtype: of the weights; None for float32.

    Returns:
        The pipeline. Its recommended settings are the authors' where the file's name is known.

    Raises:
        InputError: an unknown family, a size that there is not, or a folder that is not empty.
        CheckpointError: a file that cannot be read or does not fit, naming the key.
    """
    check_out(out, is_folder=True)
    pipe = read_published(
        family,
        transformer,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        sizes=sizes,
        dtype=dtype,
    )
    with making_folder(out) as folder:
        pipe.save_pretrained(folder)
    return pipe


def read_published(
    family: str,
    transformer: str | Path,
    *,
    tokenizer: str | Path | None = None,
    text_encoder: str | Path | None = None,
    sizes: Sizes | None = None,
    dtype: Any = None,
) -> ARPipeline:
    """The pipeline of a published checkpoint; arguments and errors as of `convert`."""
    if family not in READERS:
        raise unknown_name("family", family, READERS)
    given = dict(sizes or {})
    if isinstance(given.get("grid"), int):
        given["grid"] = (given["grid"], given["grid"])
    if dtype is not None:
        given["dtype"] = parse_dtype(dtype, parse_device("cpu"))
    captions = _captions(text_encoder, given.get("dtype"))
    model = READERS[family](transformer, tokenizer, given)
    config = _settings(family, transformer)
    if family == "dd":
        config["sampler"] = get_sampler("dd")
    return ARPipeline.from_model(model, **{**captions, **config})


def _needs(tokenizer: Any, family: str) -> Any:
    if tokenizer is None:
        raise InputError(f"no tokenizer: {family} is read with one, expected its file")
    return tokenizer


def _var(transformer: Any, tokenizer: Any, sizes: dict[str, Any]) -> Any:
    return VAR.from_official(transformer, _needs(tokenizer, "var"), **sizes)


def _student(transformer: Any, tokenizer: Any, sizes: dict[str, Any]) -> Any:
    tensors = read_state_dict(transformer, STUDENT_WRAPPERS)
    family = LlamaGenStudent if "tok_embeddings.weight" in tensors else VARStudent
    if family is VARStudent and "word_embed.weight" not in tensors:
        raise CheckpointError(
            f"{transformer}: neither tok_embeddings.weight (LlamaGen-DD) nor word_embed.weight "
            "(VAR-DD) is among its keys: no student of Distilled Decoding"
        )
    del tensors
    return family.from_official(transformer, _needs(tokenizer, "dd"), **sizes)


def _nextstep(transformer: Any, tokenizer: Any, sizes: dict[str, Any]) -> Any:
    if "release" in sizes:
        sizes["release"] = str(sizes["release"])
    return NextStep.from_official(transformer, tokenizer, **sizes)


READERS: dict[str, Callable[[Any, Any, dict[str, Any]], Any]] = {
    "llamagen": lambda t, k, sizes: LlamaGen.from_official(t, k, **sizes),
    "var": _var,
    "mar": lambda t, k, sizes: MAR.from_official(t, k, **sizes),
    "dd": _student,
    "infinity": lambda t, k, sizes: Infinity.from_official(t, k, **sizes),
    "nextstep": _nextstep,
}
"""How a family's files are read: transformer, tokenizer and sizes to a family object."""

NAMES = {
    "llamagen": ("LlamaGen",),
    "var": ("VAR",),
    "mar": ("MAR",),
    "dd": ("LlamaGen-DD", "VAR-DD"),
    "infinity": ("Infinity",),
    "nextstep": ("NextStep",),
}
"""Families as the list of known models calls them."""


def _settings(family: str, transformer: str | Path) -> dict[str, Any]:
    """What the authors draw with, if a file of this name is known, else of the family's first."""
    own = [one for one in known_models() if one.family in NAMES[family]]
    path = str(transformer).replace("\\", "/").rstrip("/")
    for one in own:
        file = one.files["transformer"]
        if path.endswith(file) or path.split("/")[-1] == file.split("/")[-1]:
            return dict(one.settings)
    return dict(own[0].settings)


def _captions(text_encoder: str | Path | None, dtype: Any) -> dict[str, Any]:
    """Encoder and tokenizer of captions."""
    if text_encoder is None:
        return {}
    from transformers import AutoTokenizer, T5EncoderModel

    try:
        encoder = T5EncoderModel.from_pretrained(text_encoder, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(text_encoder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"text encoder {str(text_encoder)!r}: {reason}") from error
    return {"text_encoder": encoder, "text_tokenizer": tokenizer}
