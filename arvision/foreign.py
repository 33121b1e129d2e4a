"""Folders in the layouts of transformers and diffusers, looked at before these libraries read them.

Their networks have configurations of their own, whose names for a number of blocks are countless:
what is built is therefore counted while it is built.
"""

from __future__ import annotations

import contextlib
import stat
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .checkpoint import Held, check_fit
from .errors import ArvisionError, CheckpointError, InputError
from .files import KINDS
from .schema import Between, check_fields, short
from .stored import NUMBERED, read_headers, read_object

MODULES_OF_A_TENSOR = 8
"""More modules than that for each tensor of the files (activations, lists, dropouts) are refused."""

MODULES_AT_LEAST = 500


class Scheduler(TypedDict, total=False):
    """Numbers of a diffusion scheduler, which lays a table of them out."""

    num_train_timesteps: Annotated[int, Between(1, 1_000_000)]


def check_regular(folder: Path) -> None:
    """Refuse a folder with pipes or devices anywhere in it, which readers would wait for.

    Raises:
        CheckpointError: see above.
    """
    for path in sorted(folder.rglob("*")):
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            kind = KINDS.get(stat.S_IFMT(mode), "no regular file")
            raise CheckpointError(f"{path} is {kind}: expected a regular file")


@contextlib.contextmanager
def few_modules(num_tensors: int, name: str) -> Iterator[None]:
    """Stop whoever builds more modules in this thread than that many tensors could fill.

    Raises:
        CheckpointError: see above; `name` is what the message calls the folder.
    """
    most = MODULES_AT_LEAST + MODULES_OF_A_TENSOR * num_tensors
    mine, built = threading.get_ident(), 0

    def count(*_: Any) -> None:
        nonlocal built
        built += threading.get_ident() == mine
        if built > most:
            raise CheckpointError(
                f"{name}: its configuration asks for more than {most} modules, but the weights are "
                f"{num_tensors} tensors"
            )

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def check_parts(
    folder: Path, index: Mapping[str, Any], bases: Mapping[str, Any], variant: str | None = None
) -> None:
    """Refuse a pipeline of diffusers' that names other classes than its parts may have, or misfits.

    Args:
        folder: of the pipeline.
        index: content of its `model_index.json`.
        bases: what each part's class must be derived from; all must be there.
        variant: of the weight files.

    Raises:
        CheckpointError: names the first part, value or key.
    """
    path = folder / "model_index.json"
    for part, value in index.items():
        if part not in bases and not part.startswith("_") and isinstance(value, list):
            raise CheckpointError(f"{path}: unknown part {short(part)}")
    for part, base in bases.items():
        cls = _library_class(index.get(part))
        if cls is None or not issubclass(cls, base):
            raise CheckpointError(
                f"{path}: {part} {short(index.get(part))}: expected a {base.__name__} of diffusers "
                "or transformers"
            )
        for code in (folder / part).glob("*.py"):
            raise CheckpointError(f"{code}: code of a stranger, expected a folder without any")
        if part == "scheduler":
            config = folder / part / "scheduler_config.json"
            try:
                check_fields(read_object(config), Scheduler, str(config))
            except InputError as error:
                raise CheckpointError(str(error)) from error
        elif issubclass(cls, nn.Module):
            check_built(cls, folder / part, variant)


def _library_class(entry: Any) -> type | None:
    """The class of diffusers or transformers that an entry [library, class] of an index names.

    diffusers writes the name of a pipeline's own module in the place of the library.
    """
    import diffusers
    import transformers

    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(e, str) for e in entry):
        return None
    library, name = entry
    places = {"diffusers": diffusers, "transformers": transformers}
    if library in places:
        found = getattr(places[library], name, None) if name.isidentifier() else None
    else:
        own = vars(diffusers.pipelines).get(library) if library.isidentifier() else None
        found = getattr(own, name, None) if name.isidentifier() else None
        found = found or getattr(transformers, name, None)
    return found if isinstance(found, type) else None


def check_built(cls: Any, folder: Path, variant: str | None = None) -> None:
    """Refuse a network of these libraries whose files are not those of its configuration.

    It is built without storage. Tensors of diffusers' networks must be just those; transformers'
    tie some, and may read further heads, but not further layers.

    Raises:
        CheckpointError: names the value or the key.
    """
    path = folder / "config.json"
    config = read_object(path)
    found, name = read_headers(folder, variant)
    if config.get("quantization_config"):
        return  # packed into other shapes; whoever unpacks them checks
    try:
        with few_modules(len(found), str(path)), torch.device("meta"):
            is_ours = hasattr(cls, "from_config")
            network = (
                cls.from_config(config) if is_ours else cls(cls.config_class.from_dict(config))
            )
    except ArvisionError:
        raise
    except Exception as error:  # a stranger's numbers in others' code
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: no network has these values ({reason})") from error
    if is_ours:
        check_fit(network, found, name)
        return
    wanted = {key: Held.of(value) for key, value in network.state_dict().items()}
    for key, held in found.items():
        if key in wanted and wanted[key].shape != held.shape:
            raise CheckpointError(
                f"{name}: key {key!r} has shape {list(held.shape)}, expected {list(wanted[key].shape)}"
            )
        if key not in wanted and NUMBERED.search(key):
            raise CheckpointError(f"{name}: key {key!r} is unexpected")
