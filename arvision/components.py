"""A pipeline's folder, looked at before diffusers reads it: which classes it names, and all its parts."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from .errors import ArvisionError, CheckpointError, InputError, unknown_name
from .folders import ASSETS, embedded_models
from .models import FAMILIES
from .models.network import Network
from .samplers import SAMPLERS
from .schema import check_fields, read_json, short
from .stored import check_layers, check_network, check_plain, check_report, read_object

_LOADING = threading.RLock()
"""Held while a pipeline is loaded: the libraries' progress bars are switches of the process."""

PARTS = ("transformer", "tokenizer", "sampler", "text_encoder", "text_tokenizer")

INDEX = "model_index.json"


class Card(TypedDict, total=False):
    """What `card.json` says of a model."""

    kind: str
    conditions: str
    summary: str
    shared: dict[str, str]
    draft_for: str
    student_of: str


def read_card(folder: Path) -> Card:
    """A model's card; an empty one where there is none.

    Raises:
        CheckpointError: something else stands there.
    """
    path = folder / "card.json"
    try:
        content: Any = check_fields(read_json(path, 1 << 20), Card, str(path), only=True)
    except FileNotFoundError:
        return {}
    except (OSError, InputError) as error:
        raise CheckpointError(str(error)) from error
    for part, owner in content.get("shared", {}).items():
        if part not in PARTS[1:]:
            raise CheckpointError(f"{path}: {unknown_name('shared part', part, PARTS[1:])}")
        if owner not in embedded_models():
            known = ", ".join(embedded_models())
            raise CheckpointError(
                f"{path}: {part} shared with {short(owner)}, expected an embedded model: {known}"
            )
    return content


def checked_parts(folder: Path, pipeline: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a caller gives to load a pipeline with, and the parts that diffusers shall not read.

    Args:
        folder: of a saved pipeline.
        pipeline: its class.
        given: arguments of its `from_pretrained`.

    Raises:
        CheckpointError: a folder that `check_pipeline` refuses.
    """
    shared = {
        part: pipeline.from_pretrained(ASSETS / owner, **given).components[part]
        for part, owner in read_card(folder).get("shared", {}).items()
        if part not in given and not (folder / part).exists()
    }
    found, variant = shared | dict(given), given.get("variant")
    parts = check_pipeline(folder, pipeline, found, variant)
    if "text_encoder" in parts:
        dtype = given.get("dtype", given.get("torch_dtype"))
        encoder = folder / "text_encoder"
        found["text_encoder"] = load_text_encoder(parts["text_encoder"], encoder, dtype, variant)
    return found


def check_pipeline(
    folder: Path, pipeline: type, given: Mapping[str, Any], variant: str | None = None
) -> dict[str, type]:
    """Refuse a folder that names other classes than we know, or parts that do not fit theirs.

    Nothing of the folder is imported or run: a class must be one of ours, of transformers' text
    encoders and tokenizers, or of a package that is loaded already and registered its family.

    Args:
        folder: of a saved pipeline.
        pipeline: its class.
        given: parts that the caller brings along.
        variant: of the weight files.

    Returns:
        The classes of the parts that the folder holds.

    Raises:
        CheckpointError: see above.
    """
    path = folder / INDEX
    if not path.exists():
        raise CheckpointError(f"{folder}: expected a pipeline folder, {INDEX} is missing")
    check_plain(folder)
    index = read_object(path)
    saved = index.get("_class_name", pipeline.__name__)
    if saved != pipeline.__name__:
        raise CheckpointError(f"{path}: a saved {short(saved)}, expected {pipeline.__name__!r}")
    own = {name: value for name, value in index.items() if not name.startswith("_")}
    try:
        check_fields(own, pipeline, str(path), only=True)
    except InputError as error:
        raise CheckpointError(str(error)) from error
    found = {}
    for part in PARTS:
        if part in given or part not in index:
            continue
        cls = _class_of(part, index[part], f"{path}: {part}")
        if cls is not None:
            _check_part(cls, folder / part, variant)
            found[part] = cls
    if "transformer" not in found and "transformer" not in given:
        raise CheckpointError(f"{path}: names no transformer")
    return found


def _class_of(part: str, entry: Any, name: str) -> type | None:
    """The class that an entry [library, class] of an index names; None for [null, null].

    Raises:
        CheckpointError: it is none that we know.
    """
    if not isinstance(entry, list) or len(entry) != 2:
        raise CheckpointError(f"{name} {short(entry)}: expected [library, class]")
    if entry == [None, None] and part != "transformer":
        return None
    library, cls = entry
    if isinstance(library, str) and isinstance(cls, str):
        found = _known_class(part, library, cls)
        if found is not None:
            return found
    what = {"sampler": "a registered sampler", "transformer": "a registered network"}.get(
        part, "a network of this package" if part == "tokenizer" else f"{part} of transformers"
    )
    raise CheckpointError(f"{name} {short(entry)} is no class that arvision loads: expected {what}")


def sampler_class(entry: Any, name: str) -> Any:
    """The sampler that an entry [library, class] of an index names.

    Raises:
        CheckpointError: it is none that we know; `name` is the index's in messages.
    """
    found = _class_of("sampler", entry, f"{name}: sampler")
    if found is None:
        raise CheckpointError(f"{name}: names no sampler, but the folder holds one")
    return found


def _known_class(part: str, library: str, name: str) -> type | None:
    if part.startswith("text_"):
        return _text_class(part, name) if library == "transformers" else None
    if part == "sampler":
        known = {entry.value.__name__: entry.value for entry in SAMPLERS}
        found = known.get(name)
        return found if found is not None and found.__module__ == library else None
    # Ours are loaded with this package, those of plug-ins with what registered them.
    found = vars(sys.modules[library]).get(name) if library in sys.modules else None
    if not isinstance(found, type) or found.__module__.split(".")[0] in (
        "diffusers",
        "transformers",
    ):
        return None
    from diffusers.models.modeling_utils import ModelMixin

    is_known = issubclass(found, ModelMixin) and (part == "tokenizer" or name in FAMILIES)
    return found if is_known else None


def _text_class(part: str, name: str) -> type | None:
    import transformers
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    base = PreTrainedModel if part == "text_encoder" else PreTrainedTokenizerBase
    found = getattr(transformers, name, None) if name.isidentifier() else None
    return found if isinstance(found, type) and issubclass(found, base) else None


def _check_part(cls: type, folder: Path, variant: str | None) -> None:
    """Refuse a part's folder that is missing, or whose files are not those of its class."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder, which {INDEX} names")
    if issubclass(cls, Network):
        check_network(cls, folder, variant)
        return
    check_plain(folder)
    if not hasattr(cls, "state_dict"):
        return
    for key, held in check_layers(folder, variant).items():
        if not held.is_floating:
            raise CheckpointError(
                f"{folder}: key {key!r} holds {held.dtype}, expected floating-point numbers"
            )


def load_text_encoder(cls: Any, folder: Path, dtype: Any = None, variant: str | None = None) -> Any:
    """A text encoder of transformers whose weights are just its own.

    Args:
        cls: its class.
        folder: of the encoder.
        dtype: of torch, one for each part by name, or None for the file's.
        variant: of the weight files, where this part has it.

    Raises:
        CheckpointError: names the first missing, misshapen or unexpected key.
    """
    if isinstance(dtype, Mapping):
        dtype = dtype.get("text_encoder", dtype.get("default"))
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if variant is not None and any(folder.glob(f"*.{variant}.*")):
        options["variant"] = variant
    loaded = cls.from_pretrained(
        str(folder), use_safetensors=True, output_loading_info=True, **options
    )
    encoder, report = loaded
    check_report(report, f"{folder}: {cls.__name__}")
    return encoder


@contextlib.contextmanager
def told(source: Path) -> Iterator[None]:
    """Turn what libraries say of a folder into one line; they raise whatever they like."""
    try:
        yield
    except ArvisionError as error:
        said = str(error)
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(said if str(source) in said else f"{source}: {said}") from error
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{source}: cannot be loaded as a pipeline ({reason})") from error


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the libraries' bars over two or three small components."""
    with _LOADING:
        switches = [(diffusers_logging, diffusers_logging.is_progress_bar_enabled())]
        switches.append((transformers_logging, transformers_logging.is_progress_bar_enabled()))
        for switch, _ in switches:
            switch.disable_progress_bar()
        try:
            yield
        finally:
            for switch, was_shown in switches:
                if was_shown:
                    switch.enable_progress_bar()
