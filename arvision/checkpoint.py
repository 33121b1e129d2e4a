"""Reading weight files safely, and saying what is wrong with one that does not fit."""

from __future__ import annotations

import argparse
import difflib
import pathlib
import pickle
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict, TypeVar, get_args, get_origin
from zipfile import BadZipFile

import torch
from torch import Tensor, nn

from .errors import CheckpointError, InputError, unknown_name
from .files import replacing, user_path
from .schema import Modules, check_fields, hints_of, read_json, short

StateDict = dict[str, Tensor]

MORE_WRAPPERS = (
    *("model_ema", "ema", "ema_state_dict", "state_dict", "model_state_dict", "model", "module"),
    "trainer",
)
"""Where trainers keep tensors, tried behind a family's own names, also one within another."""

WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
"""Parts of a key that torch's wrappers add, wherever a wrapped module stands."""

STRAY_PARTS = {"causal_mask", "kv_cache", "k_cache", "v_cache", "freqs_cis"}
"""Parts of keys of buffers that official code may save and that hold no weights."""

_NUMPY_MODULES = ("numpy._core.multiarray", "numpy.core.multiarray")
_READING = threading.Lock()
"""Held while harmless classes are allowed, which torch keeps for the whole process."""


class ShardIndex(TypedDict):
    """What an index of shards says: the file of each tensor."""

    weight_map: dict[str, str]


SHARD = re.compile(r"-\d+-of-(\d+)\.")
"""In the name of a shard: the number of all."""

INDEX = ".index.json"
"""End of the name of a file that says which shard holds which tensor."""


def read_state_dict(
    source: str | Path | Mapping[str, object], wrappers: Iterable[str], device: str = "cpu"
) -> StateDict:
    """The tensors of a checkpoint, by name.

    Args:
        source: a `.pt`, `.pth`, `.ckpt` or `.safetensors` file, a folder of shards or their index
            (`*.index.json`), or a dict.
        wrappers: keys under which a release may keep the tensors, best first, "a.b" for a dict
            within a dict; a file without any of them is taken as it is.
        device: where a pickled file's tensors go; "meta" keeps names and shapes alone.

    Raises:
        CheckpointError: no such file, a truncated one, one that holds pickled code, or one without
            tensors.
    """
    if isinstance(source, Mapping):
        content: object = source
        name = "the given state dict"
    else:
        path = user_path(source)
        name = str(path)
        if path.is_dir():
            path = _index_in(path)
        if not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{name}: no such file")
        content = _read_content(path, device)
    wrappers = tuple(wrappers)
    content, _ = _unwrapped(content, wrappers)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{name}: expected a dict of tensors, found {type(content).__name__}")
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if not tensors:
        found = ", ".join(sorted(map(str, content))[:5]) or "nothing"
        raise CheckpointError(
            f"{name}: expected tensors, at the top or under one of {', '.join(wrappers)}; found {found}"
        )
    return _plain_keys(tensors, has_wrappers=bool(wrappers))


def write_like(
    source: str | Path, path: str | Path, wrappers: Iterable[str], weights: StateDict
) -> None:
    """Write weights in the layout of another file: its names around them, its types, its other tensors.

    Args:
        source: a file that `read_state_dict` reads.
        path: to write, by `torch.save`, or as safetensors where its suffix says so.
        wrappers: see `read_state_dict`.
        weights: by name; those that the file lacks are left out.

    Raises:
        CheckpointError: see `read_state_dict`.
        DiskError: the disk is full or fails.
    """
    content, steps = _unwrapped(_read_content(user_path(source), "cpu"), tuple(wrappers))
    assert isinstance(content, Mapping)
    held = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    plain = dict(zip(held, _plain_keys(held, has_wrappers=True), strict=True))
    new = {
        key: weights[plain[key]].detach().to("cpu", value.dtype).contiguous()
        if plain[key] in weights
        else value
        for key, value in held.items()
    }
    with replacing(path, durable=True) as temporary:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(new, temporary)
            return
        whole: Any = new
        for step in reversed(steps):
            whole = {step: whole}
        with open(temporary, "wb") as file:
            torch.save(whole, file)


def _unwrapped(content: object, wrappers: tuple[str, ...]) -> tuple[object, list[str]]:
    """The innermost dict that the wrappers' names lead to, and the names that do."""
    steps: list[str] = []
    for _ in range(4):
        if not isinstance(content, Mapping):
            break
        is_bare = not any(isinstance(value, Tensor) for value in content.values())
        for wrapper in (*wrappers, *(MORE_WRAPPERS if is_bare else ())):
            inner: object = content
            for step in wrapper.split("."):
                inner = inner.get(step) if isinstance(inner, Mapping) else None
            if isinstance(inner, Mapping) and inner:
                content = inner
                steps += wrapper.split(".")
                break
        else:
            break
    return content, steps


def is_stray(key: str) -> bool:
    """Whether a key names a buffer without weights, or a part of the loss."""
    parts = key.split(".")
    return parts[0] == "loss" or not STRAY_PARTS.isdisjoint(parts)


def _plain_keys(tensors: StateDict, has_wrappers: bool) -> StateDict:
    """Tensors under the names that the network gave them, without those of what wrapped it."""
    plain = {".".join(p for p in k.split(".") if p not in WRAPPED): v for k, v in tensors.items()}
    for prefix in ("module.", "model.", "module."):
        weights = [key for key in plain if not is_stray(key)]
        is_wrapper = prefix == "module." or has_wrappers
        if is_wrapper and weights and all(key.startswith(prefix) for key in weights):
            plain = {key.removeprefix(prefix): value for key, value in plain.items()}
    return plain


def _harmless() -> list[Any]:
    """Classes and functions that trainers pickle beside tensors and that do nothing but hold values.

    NumPy's are listed under the names of its releases 1 and 2, since files hold either.
    """
    import numpy as np

    kinds = [type(np.dtype(code)) for code in ("?", *"bBhHiIlLqQefdg", "U", "S", "O")]
    found: list[Any] = [argparse.Namespace, np.ndarray, np.dtype, *kinds]
    found += [pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePosixPath]
    found += [(pathlib.PosixPath, "pathlib._local.PosixPath")]
    scalar, array = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    for module in _NUMPY_MODULES:
        found += [(scalar, f"{module}.scalar"), (array, f"{module}._reconstruct")]
    return found


def check_is_weights(path: Path) -> None:
    """Name what downloads leave in the place of weights.

    Raises:
        CheckpointError: a git-lfs pointer, an HTML page, JSON or an empty file.
    """
    with path.open("rb") as file:
        start = file.read(512).lstrip().lower()
    found = None
    if not start:
        found = "is empty"
    elif start.startswith(b"version https://git-lfs"):
        found = "is a git-lfs pointer and not the file (git lfs pull fetches it)"
    elif start.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head")):
        found = "is an HTML page and not the file; was the download refused?"
    elif start.startswith((b"{", b"[")):
        found = "is JSON text and not the file; was the download refused?"
    if found is not None:
        raise CheckpointError(f"{path}: {found}")


def _read_content(path: Path, device: str) -> object:
    """What a file holds, what an index of shards names, or what lies in a folder of shards."""
    if path.is_dir():
        return _read_loose(path)
    return _read_shards(path) if path.name.endswith(INDEX) else _read(path, device)


def _read_loose(folder: Path) -> StateDict:
    """The tensors of several safetensors without an index, each in one of them.

    Raises:
        CheckpointError: a key in two files, as of two variants, or a shard that is missing.
    """
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        numbered = SHARD.search(path.name)
        if numbered is not None and int(numbered[1]) != len(files):
            raise CheckpointError(
                f"{folder}: {path.name} and in all {len(files)} *.safetensors: expected one *{INDEX}, "
                "or all shards"
            )
    tensors: StateDict = {}
    for path in files:
        held = _read(path)
        assert isinstance(held, dict)
        if twice := set(held) & set(tensors):
            names = ", ".join(file.name for file in files[:4])
            raise CheckpointError(
                f"{folder}: key {min(twice)!r} is in two of {names}: expected one *{INDEX}, one "
                "*.safetensors, or shards of one model"
            )
        tensors |= held
    return tensors


def _index_in(folder: Path) -> Path:
    """The one index of shards, the one file of tensors, or the folder of safetensors itself."""
    for pattern in (f"*{INDEX}", "*.safetensors", "*.bin", "*.pth", "*.pt", "*.ckpt"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found and pattern == "*.safetensors":
            return folder
        if found:
            names = ", ".join(path.name for path in found[:4])
            raise CheckpointError(f"{folder}: {names}: expected one *{INDEX} or one *.safetensors")
    raise CheckpointError(f"{folder}: a folder without *{INDEX} or *.safetensors")


def _read(path: Path, device: str = "cpu") -> object:
    try:
        check_is_weights(path)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with _READING, torch.serialization.safe_globals(_harmless()):
            return torch.load(path, map_location=device, weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        if "Weights only load failed" in str(error) or "Unsupported" in str(error):
            raise CheckpointError(
                f"{path}: holds pickled code and not only tensors; it was not run. Re-save its "
                "tensors alone (torch.save of the state dict)"
            ) from error
        raise CheckpointError(f"{path}: cannot be read ({reason}); is it complete?") from error
    except (BadZipFile, EOFError, RuntimeError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: cannot be read ({reason}); is it complete?") from error
    except Exception as error:  # safetensors raises its own class
        raise CheckpointError(f"{path}: cannot be read ({error}); is it complete?") from error


def _read_shards(index: Path) -> StateDict:
    """The tensors of all files that an index names, each where the index says.

    Raises:
        CheckpointError: an index that is none, a shard that is missing, or that holds other keys.
    """
    try:
        content: Any = check_fields(read_json(index), ShardIndex, str(index))
    except (OSError, InputError) as error:
        raise CheckpointError(
            f"{index}: expected an index of shards with a weight_map ({error})"
        ) from error
    places = content["weight_map"]
    shards = sorted(set(places.values()))
    tensors: StateDict = {}
    for shard in shards:
        path = index.parent / shard
        if Path(shard).name != shard:
            raise CheckpointError(f"{index}: names {shard!r}, expected files beside it")
        if not path.is_file():
            raise CheckpointError(f"{index}: names {shard}, which is missing")
        held = _read(path)
        wanted = {key for key, place in places.items() if place == shard}
        if not isinstance(held, Mapping) or set(held) != wanted:
            keys = set(held) if isinstance(held, Mapping) else set()
            key = min(keys ^ wanted, default="")
            raise CheckpointError(f"{path}: key {key!r} is not where {index.name} says")
        tensors |= held
    return tensors


Module = TypeVar("Module", bound=nn.Module)


class Held(NamedTuple):
    """What a file says of one tensor: its shape, and the name of its type in safetensors."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, value: Tensor) -> Held:
        """What it would say of this tensor."""
        kind = "F" if value.is_floating_point() else str(value.dtype).removeprefix("torch.")
        return cls(tuple(value.shape), kind)

    @property
    def is_floating(self) -> bool:
        """Whether it holds real numbers."""
        return self.dtype.startswith(("F", "BF"))


def check_fit(module: nn.Module, found: Mapping[str, Held], name: str) -> None:
    """Refuse tensors that are not just those of a module.

    Args:
        module: to be filled; it may lie on the meta device.
        found: what there is, by key.
        name: where, for messages.

    Raises:
        CheckpointError: names the first missing, misshapen or unexpected key, or the first of
            integers where the module has real numbers, or the reverse.
    """
    wanted = module.state_dict()
    for key, value in wanted.items():
        if key not in found:
            near = difflib.get_close_matches(key, [k for k in found if k not in wanted], n=1)
            hint = f"; it has an unexpected {near[0]!r}" if near else ""
            raise CheckpointError(f"{name}: key {key!r} is missing{hint}")
        shape, kind = found[key].shape, found[key].dtype
        if shape != tuple(value.shape):
            raise CheckpointError(
                f"{name}: key {key!r} has shape {list(shape)}, expected {list(value.shape)}"
            )
        if found[key].is_floating != value.is_floating_point():
            what = "floating-point numbers" if value.is_floating_point() else "integers"
            raise CheckpointError(f"{name}: key {key!r} holds {kind}, expected {what}")
    for key in found:
        if key not in wanted:
            near = difflib.get_close_matches(key, list(wanted), n=1)
            hint = f"; the nearest expected key is {near[0]!r}" if near else ""
            raise CheckpointError(f"{name}: key {key!r} is unexpected{hint}")


def check_counts(config: Mapping[str, Any], cls: Any, name: str, num_tensors: int) -> None:
    """Refuse a number of modules that so many tensors cannot fill; building them takes minutes.

    Raises:
        CheckpointError: see above.
    """
    for field, hint in hints_of(cls).items():
        is_count = Modules in _marks(hint)
        value = config.get(field)
        if is_count and isinstance(value, int) and value > num_tensors:
            raise CheckpointError(
                f"{name}: {field} {short(value)}, but the weights are {num_tensors} tensors"
            )


def _marks(hint: Any) -> tuple[Any, ...]:
    """What an annotation says besides the type, also of one of several types."""
    own = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return own + tuple(mark for each in get_args(hint) for mark in _marks(each))


def load_strictly(
    cls: type[Module],
    sizes: dict[str, Any],
    tensors: StateDict,
    name: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Module:
    """Build `cls(**sizes)` in evaluation mode around tensors that must fit it exactly.

    Nothing is initialised and thrown away: the module is built without storage and takes the
    tensors over (cast to `dtype`). Buffers that hold no weights (`is_stray`) are left out.

    Raises:
        CheckpointError: names the first missing, unexpected or misshapen key.
    """
    check_counts(sizes, cls, name, len(tensors))
    with torch.device("meta"):
        module = cls(**sizes)
    wanted = module.state_dict()
    tensors = {key: value for key, value in tensors.items() if key in wanted or not is_stray(key)}
    check_fit(module, {key: Held.of(value) for key, value in tensors.items()}, name)
    cast = {
        key: value.to(device, dtype if value.is_floating_point() else None)
        for key, value in tensors.items()
    }
    module.load_state_dict(cast, strict=True, assign=True)
    return module.eval()


def split_placement(sizes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a caller says about a checkpoint, and apart from it `dtype` and `device` where given.

    Raises:
        InputError: a `dtype` that is no floating-point type of torch.
    """
    place = {name: sizes[name] for name in ("dtype", "device") if sizes.get(name) is not None}
    dtype = place.get("dtype", torch.float32)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype {dtype!r}: expected a floating-point type such as torch.bfloat16")
    return {name: value for name, value in sizes.items() if name not in ("dtype", "device")}, place


def known_sizes(
    sizes: Mapping[str, Any], known: Sequence[str], kind: str, aliases: Mapping[str, str]
) -> dict[str, Any]:
    """What a caller says about a checkpoint, by our names; None counts as not given.

    Args:
        sizes: names, ours or the authors', to values; sequences become tuples.
        known: our names.
        kind: what the sizes belong to, for messages.
        aliases: the authors' names to ours.

    Raises:
        InputError: a name that is neither.
    """
    given = {}
    for name, value in sizes.items():
        ours = aliases.get(name, name)
        if ours not in known:
            raise unknown_name(f"size of a {kind}:", name, known)
        if ours == "grid" and isinstance(value, Sequence) and len(value) != 2:
            raise InputError(f"grid {value!r}: expected (rows, columns)")
        if value is not None:
            is_sequence = isinstance(value, Sequence) and not isinstance(value, str)
            given[ours] = tuple(value) if is_sequence else value
    return given


def check_sizes(found: Mapping[str, Any], given: Mapping[str, Any], name: str) -> None:
    """Refuse sizes `given` that are not those `found` in the tensors of file `name`.

    Raises:
        CheckpointError: see above.
    """
    for key, value in found.items():
        if given.get(key, value) != value:
            raise CheckpointError(f"{name}: its tensors say {key} {value}, not {given[key]}")


def count_numbered(tensors: StateDict, prefix: str) -> int:
    """One more than the largest number behind "prefix." at the start of a key; 0 without any."""
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    numbers = [int(found[1]) for key in tensors if (found := pattern.match(key))]
    return max(numbers, default=-1) + 1


def shape_of(tensors: StateDict, key: str, dims: int, name: str) -> tuple[int, ...]:
    """Shape of a tensor that a layout must have.

    Raises:
        CheckpointError: it is missing or has another number of dimensions.
    """
    if key not in tensors:
        raise CheckpointError(f"{name}: key {key!r} is missing")
    shape = tuple(tensors[key].shape)
    if len(shape) != dims:
        raise CheckpointError(f"{name}: key {key!r} has shape {list(shape)}, expected {dims} sides")
    return shape
