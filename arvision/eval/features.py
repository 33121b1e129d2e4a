"""Feature extractors: a registry of networks that turn bytes into rows of numbers.

An extractor maps uint8 [B, 3, H, W] to float32 [B, D], owns its resize, and is always in
evaluation mode. What it is called, how it resizes and which weights it holds go into every report,
because a distance means nothing without them.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ArvisionError, CheckpointError, InputError, check_count
from ..files import regular_file, sha256_of
from ..folders import parse_device
from ..registry import Registry
from .pixels import check_images


@dataclass(frozen=True)
class ExtractorFacts:
    """What a report records about an extractor.

    Attributes:
        name: registered name.
        dim: D of the features.
        preprocess_id: resize and normalisation, in words that stay fixed.
        weights_sha256: of the weight file, or None for weights made from a seed.
        license: of the weights.
        is_fid: whether distances of its features may be called FID.
        outputs: names that `outputs` returns.
    """

    name: str
    dim: int
    preprocess_id: str
    weights_sha256: str | None = None
    license: str = "unknown"
    is_fid: bool = False
    outputs: tuple[str, ...] = ("features",)

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON types."""
        return {**asdict(self), "outputs": list(self.outputs)}


class Extractor(nn.Module):
    """Base of all extractors; a subclass gives `facts` and `compute`.

    Args:
        facts: see `ExtractorFacts`.
    """

    def __init__(self, facts: ExtractorFacts) -> None:
        super().__init__()
        self.facts = facts

    def train(self, mode: bool = True) -> Extractor:
        """Stays in evaluation mode, whatever is asked."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        tensor = next(self.parameters(), next(self.buffers(), None))
        return torch.device("cpu") if tensor is None else tensor.device

    def compute(self, images: Tensor) -> dict[str, Tensor]:
        """Named outputs of uint8 images [B, 3, H, W]; "features" is [B, D]."""
        raise NotImplementedError

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """All named outputs, each float32 [B, *].

        Raises:
            InputError: not uint8 [B, 3, H, W].
        """
        images = check_images(images)
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        with torch.inference_mode():
            found = self.compute(images.to(self.device))
        return {name: value.float().clone() for name, value in found.items()}

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, D] float32 of uint8 images [B, 3, H, W]."""
        return self.outputs(images)["features"]


class WrappedModule(Extractor):
    """Any module that maps uint8 [B, 3, H, W] to [B, D].

    Args:
        module: a copy of it is called, in evaluation mode; the module itself stays as it is.
        name: for reports.
        dim: D; None measures it with black images of 64x64.
        preprocess_id: what the module does with the bytes.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str | None = None,
        dim: int | None = None,
        preprocess_id: str = "own",
    ) -> None:
        name, own = name or type(module).__name__, _copy_of(module, "extractor").eval()
        width = _measure(own, name) if dim is None else check_count("dim", dim)
        super().__init__(ExtractorFacts(name, width, preprocess_id))
        self.module = own
        self.eval().requires_grad_(False)

    def compute(self, images: Tensor) -> dict[str, Tensor]:
        """The module's answer, which must be [B, D]."""
        found = self.module(images)
        if not isinstance(found, Tensor):
            kind, wanted = type(found).__name__, f"a tensor [B, {self.facts.dim}]"
            raise InputError(f"extractor {self.facts.name} gave a {kind}: expected {wanted}")
        if found.ndim != 2 or found.shape[1] != self.facts.dim:
            shape, wanted = list(found.shape), f"[B, {self.facts.dim}]"
            raise InputError(f"extractor {self.facts.name} gave {shape}: expected {wanted}")
        return {"features": found}


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _copy_of(module: Any, name: str) -> Any:
    """A copy that can be moved and set to evaluation without its owner noticing.

    Answers of earlier passes that a module keeps (as `weight_norm` does) lose their graph, which
    torch does not copy; hooks that are methods of something else, such as a trainer, stay its own.
    """
    parts, known = list(module.modules()), {}
    for part in parts:
        for value in vars(part).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                known[id(value)] = value.detach().clone()
        for hook in (hook for kind in HOOKS for hook in getattr(part, kind, {}).values()):
            owner = getattr(hook, "__self__", None)
            if owner is not None and not any(owner is own for own in parts):
                known[id(owner)] = owner
    try:
        return copy.deepcopy(module, known)
    except Exception as error:
        reason = (str(error) or repr(error)).splitlines()[0][:200]
        raise InputError(f"{name} {type(module).__name__} cannot be copied ({reason})") from error


def _measure(module: nn.Module, name: str) -> int:
    """D of a module, from two black images of 64x64."""
    tensor = next(module.parameters(), next(module.buffers(), None))
    device = None if tensor is None else tensor.device
    try:
        with torch.inference_mode():
            found = module(torch.zeros(2, 3, 64, 64, dtype=torch.uint8, device=device))
    except Exception as error:
        reason = (str(error) or repr(error)).splitlines()[0][:200]
        raise InputError(
            f"extractor {name} does not take uint8 [2, 3, 64, 64] ({reason}): expected a module from "
            "bytes to [B, D], or dim=D if it needs another size"
        ) from error
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 2:
        given = list(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise InputError(f"extractor {name} gave {given}: expected [B, D]")
    return int(found.shape[1])


EXTRACTORS: Registry[Any] = Registry("extractor", "arvision.extractors")


def get_extractor(
    extractor: str | nn.Module, device: str | torch.device | None = None, **options: Any
) -> Extractor:
    """An extractor by name, or any module wrapped as one.

    A module or an extractor of the caller's is left as it is: in its mode, on its device.

    Args:
        extractor: a registered name, an `Extractor`, or a module from bytes to features.
        device: where to put it; None leaves it.
        **options: for the builder, such as `weights=` (a local path) or `download=True`.

    Raises:
        InputError: an unknown name, option or device; a module that is no extractor.
        MissingDependencyError: the package that holds the weights is not installed.
    """
    place = None if device is None else parse_device(device)
    if isinstance(extractor, str):
        made = _built(extractor, EXTRACTORS[extractor], options)
    elif isinstance(extractor, Extractor):
        elsewhere = place is not None and place != extractor.device
        made = _copy_of(extractor, "extractor") if elsewhere else extractor
    elif isinstance(extractor, nn.Module):
        made = _built(type(extractor).__name__, partial(WrappedModule, extractor), options)
    else:
        kind = type(extractor).__name__
        raise InputError(f"extractor is a {kind}: expected a name or a torch module")
    return made.eval() if place is None else made.to(place).eval()


def _built(name: str, build: Any, options: dict[str, Any]) -> Extractor:
    """What a builder makes of options that it knows."""
    try:
        return build(**options)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise InputError(f"extractor {name}: {error}") from error


def list_extractors() -> list[str]:
    """Registered names."""
    return sorted(entry.name for entry in EXTRACTORS)


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, read in pieces.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        return sha256_of(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error


def safe_load(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a torch or safetensors file, with no code run.

    Raises:
        CheckpointError: unreadable, truncated, or holding anything but tensors.
    """
    try:
        regular_file(path).close()
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(str(path))
        found = torch.load(path, map_location="cpu", weights_only=True)
    except ArvisionError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
        raise CheckpointError(f"{path}: expected a file of plain tensors ({reason})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}, expected a state dict")
    return found


def resize(images: Tensor, side: int) -> Tensor:
    """Bytes [B, 3, H, W] to float32 grey levels 0..255 of `side` x `side`.

    Antialiased bicubic, rounded and clipped to whole grey levels as PIL does; images that have
    the size already are left alone.
    """
    pixels = images.float()
    if pixels.shape[-2:] == (side, side):
        return pixels
    pixels = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True)
    return pixels.round().clamp_(0, 255)
