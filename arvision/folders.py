"""Where models lie, and on what they run: names of embedded models, folders, devices, dtypes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .errors import CheckpointError, InputError, unknown_name
from .files import user_path
from .needed import INDEXES

if TYPE_CHECKING:
    import torch

ASSETS = Path(__file__).parent / "assets"


def embedded_models() -> list[str]:
    """Names of the models inside the package."""
    return sorted(path.parent.name for path in ASSETS.glob("*/model_index.json"))


def find_model(name_or_path: str | Path) -> str | Path:
    """The folder of an embedded model or of a path, or a hub id "owner/name" as it is.

    Raises:
        InputError: an unknown name.
        CheckpointError: a folder that holds no pipeline.
    """
    name = str(name_or_path)
    longest = max(len(part.encode(errors="replace")) for part in name.split("/"))
    if "\0" in name or longest > 255 or len(name) > 4000:
        raise unknown_name("model", name, embedded_models())  # no system has such a folder
    if name in embedded_models():
        return ASSETS / name
    path = user_path(name)
    if path.is_dir():
        if not any((path / name).exists() for name in INDEXES):
            raise CheckpointError(
                f"{path}: expected a pipeline folder, model_index.json is missing (and config.json, "
                "by which a network of transformers goes)"
            )
        return path
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    raise unknown_name("model", name, embedded_models())


def parse_device(device: str | torch.device | None) -> torch.device:
    """The device of that name; None for an accelerator (CUDA, XPU, MPS) where there is one.

    Raises:
        InputError: no such device on this machine.
    """
    import torch

    if device is None:
        if torch.accelerator.is_available():
            return torch.device(torch.accelerator.current_accelerator() or "cpu")
        return torch.device("cpu")
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device {device!r}: expected a name such as 'cpu' or 'cuda:0'") from error
    try:
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {str(place)!r}: this machine has none, expected 'cpu'") from error
    return place


def parse_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """The floating-point type of that name; None for float32 on a CPU and bfloat16 elsewhere.

    Raises:
        InputError: no such type.
    """
    import torch

    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"dtype {dtype!r}: expected 'float32', 'float64', 'bfloat16' or 'float16'")
    return found
