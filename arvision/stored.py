"""A saved network, looked at before anything is built: its configuration, and the headers of its files.

Files that somebody else wrote may name a million layers, or weights of another network: the
configuration must hold to the annotations of the class (see `arvision.schema`), must not ask for
more modules than the files hold tensors, and the network that it describes, laid out without
storage, must have just the tensors of the files.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn

from .checkpoint import Held, Module, check_counts, check_fit, check_is_weights
from .errors import ArvisionError, CheckpointError, InputError, unknown_name
from .headers import read_header
from .needed import SHARDS, weight_files
from .schema import Layers, check_fields, check_value, hints_of, read_json, short

CODE = ("auto_map", "custom_pipeline", "custom_components", "trust_remote_code")
"""Names by which a configuration asks for code of its folder."""

IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
"""Names by which a configuration of transformers may choose a kernel of the hub, "owner/name"."""

NUMBERED = re.compile(r"\.\d+\.")
"""In the key of a layer's weight."""

UNREAD = ("tokenizer.json", "vocab.json", "merges.txt")
"""Long tables of text tokenizers, which their own readers check."""


def read_object(path: Path) -> dict[str, Any]:
    """A configuration: strict JSON that holds an object and asks for no code.

    Raises:
        CheckpointError: anything else, or no such file.
    """
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, InputError) as error:
        raise CheckpointError(
            str(error) if str(path) in str(error) else f"{path}: {error}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: {short(content)}, expected an object")
    for name in CODE:
        if content.get(name):
            raise CheckpointError(
                f"{path}: {name!r} asks for code of the folder, which is never run"
            )
    check_kernels(content, str(path))
    return content


def check_kernels(content: Any, name: str) -> None:
    """Refuse a configuration that asks for kernels of a repository, which would be fetched and run.

    Args:
        content: of the file.
        name: of the file, for messages.

    Raises:
        CheckpointError: see above, at any depth.
    """
    for key, value in content.items() if isinstance(content, Mapping) else ():
        if key.removeprefix("_").removesuffix("_internal") in IMPLEMENTATIONS:
            chosen = list(value.values()) if isinstance(value, Mapping) else [value]
            if any(isinstance(each, str) and "/" in each for each in chosen):
                raise CheckpointError(
                    f"{name}: {key} {short(value)} asks for code of a repository, which is never run"
                )
        check_kernels(value, name)


def read_sizes(
    path: Path, kinds: Mapping[str, type[Module]], what: str
) -> tuple[type[Module], dict[str, Any]]:
    """The class that a small file names by its "kind", and the constructor's arguments beside it.

    Args:
        path: of the file.
        kinds: names to classes.
        what: the file stands for, as messages call it.

    Raises:
        CheckpointError: no such file, an unknown kind, or an argument that is missing or something
            else than the class says.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no {what} of `arvision train-draft`")
    content = read_object(path)
    try:
        check_value(content.get("kind"), str, f"{path}: kind")
        if content["kind"] not in kinds:
            raise unknown_name(f"kind in {path}", content["kind"], kinds)
        cls = kinds[content["kind"]]
        check_fields(content, cls, str(path))
    except InputError as error:
        raise CheckpointError(str(error)) from error
    sizes = {name: content[name] for name in hints_of(cls) if name in content}
    if missing := sorted(set(hints_of(cls)) - set(sizes)):
        raise CheckpointError(f"{path}: {missing[0]!r} is missing")
    return cls, sizes


def check_plain(folder: Path) -> None:
    """Refuse a folder with code, pipes or devices in it, or with a configuration that is none.

    Raises:
        CheckpointError: see above.
    """
    for path in sorted(folder.iterdir()):
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise CheckpointError(f"{path}: a pipe or a device, expected a regular file")
        if path.suffix == ".py":
            raise CheckpointError(f"{path}: code of a stranger, expected a folder without any")
        if path.suffix == ".json" and path.name not in UNREAD and SHARDS not in path.name:
            read_object(path)


def check_network(cls: type[nn.Module], folder: Path, variant: str | None = None) -> None:
    """Refuse a saved network whose configuration or weights are not those of its class.

    Args:
        cls: a class whose constructor arguments are its saved configuration.
        folder: with `config.json` and safetensors.
        variant: of the weight files.

    Raises:
        CheckpointError: names the first value, or the first missing, unexpected or misshapen key.
    """
    check_plain(folder)
    path = folder / "config.json"
    config = read_object(path)
    saved = config.get("_class_name", cls.__name__)
    if saved != cls.__name__:
        raise CheckpointError(f"{path}: a saved {short(saved)}, expected {cls.__name__!r}")
    own = {name: value for name, value in config.items() if not name.startswith("_")}
    found, name = read_headers(folder, variant)
    try:
        check_fields(own, cls, str(path), only=True)
        check_counts(own, cls, str(path), len(found))
        with torch.device("meta"):
            network = cls(**own)
    except CheckpointError:
        raise
    except ArvisionError as error:
        said = str(error)
        raise CheckpointError(said if str(path) in said else f"{path}: {said}") from error
    except (ValueError, TypeError, RuntimeError, IndexError, ArithmeticError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: no network has these sizes ({reason})") from error
    check_fit(network, found, name)


class Counts(TypedDict, total=False):
    """Numbers of modules, by the names that configurations of transformers have for them."""

    num_layers: Layers | None
    num_decoder_layers: Layers | None
    num_hidden_layers: Layers | None
    n_layer: Layers | None
    n_layers: Layers | None
    encoder_layers: Layers | None
    decoder_layers: Layers | None


def check_layers(folder: Path, variant: str | None = None) -> dict[str, Held]:
    """Refuse a network of transformers that asks for more layers than its files hold tensors.

    Returns:
        What the headers of its safetensors say, by key.

    Raises:
        CheckpointError: see above, or files that are none.
    """
    path = folder / "config.json"
    try:
        config = read_json(path)
        check_value(config, dict, str(path))
        check_kernels(config, str(path))
        tensors, _ = read_headers(folder, variant)
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            check_fields(part, Counts, str(path))
            check_counts(part, Counts, str(path), len(tensors))
    except (OSError, InputError) as error:
        raise CheckpointError(str(error)) from error
    return tensors


def check_report(report: Mapping[str, Any], name: str, *, may_hold_more: bool = False) -> None:
    """Refuse what transformers reports of a network whose weights are not all its own.

    Args:
        report: what `from_pretrained(output_loading_info=True)` gives beside the network.
        name: of folder and network, for messages.
        may_hold_more: let further keys pass, as of other heads, but not those of further layers.

    Raises:
        CheckpointError: names the first missing, misshapen or unexpected key.
    """
    for what in ("missing", "mismatched", "unexpected"):
        keys = [str(key[0] if isinstance(key, tuple) else key) for key in report[f"{what}_keys"]]
        if what == "unexpected" and may_hold_more:
            keys = [key for key in keys if NUMBERED.search(key)]
        if keys:
            raise CheckpointError(f"{name}: key {min(keys)!r} is {what} ({len(keys)} in all)")


def read_headers(folder: Path, variant: str | None = None) -> tuple[dict[str, Held], str]:
    """Shapes and kinds of the tensors of a folder's safetensors, by key; and what to call them.

    Raises:
        CheckpointError: no such files, or files that are cut off, something else, or not what
            their index says.
    """
    inside = {path.name for path in folder.iterdir()}
    files, _ = weight_files(
        str(folder), "", inside, lambda file: read_object(folder / file), variant
    )
    if not files:
        raise CheckpointError(f"{folder}: expected config.json and *.safetensors")
    found: dict[str, Held] = {}
    for file in (file for file in files if file.endswith(".safetensors")):
        check_is_weights(folder / file)
        header = read_header(folder / file)
        if twice := set(header.shapes) & set(found):
            raise CheckpointError(f"{folder / file}: key {min(twice)!r} is in two files")
        for key, shape in header.shapes.items():
            found[key] = Held(shape, header.dtypes[key])
    if SHARDS in files[0]:
        listed = set(read_object(folder / files[0])["weight_map"])
        if off := listed ^ set(found):
            raise CheckpointError(f"{folder / files[0]}: key {min(off)!r} is not where it says")
    return found, str(folder / files[0])
