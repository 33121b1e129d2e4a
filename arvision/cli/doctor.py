"""`arvision doctor`: versions, devices, and which implementation of each operation runs here."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from typing import Annotated, Any

import typer

from .output import tell

EPILOG = "Examples: arvision doctor; arvision doctor --device cuda --json"
PACKAGES = ("arvision", "torch", "triton", "transformers", "diffusers")


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor", epilog=EPILOG)(doctor)


def doctor(
    device: Annotated[
        str | None, typer.Option(help="Where tensors would lie; the best device by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Tell versions, devices, and which implementation of each operation runs, and why."""
    found = examine(device)
    if as_json:
        tell(json.dumps(found))
        return
    for name, version in found["versions"].items():
        tell(f"{name:16} {version or 'not installed'}")
    for entry in found["devices"]:
        tell(f"{entry['device']:16} {entry['name']}")
    tell(f"\noperations on {found['device']}:")
    if found["device"] != "cpu":
        tell("(proved by Triton's interpreter and compiler; the speed on a GPU was not measured)")
    for name, entry in found["operations"].items():
        tell(f"{name:16} {entry['implementation']:10} {entry['reason']}")
        tell(f"{'':27} {entry['summary']}")
        if "used_by" in entry:
            tell(f"{'':27} for {entry['used_by']}")


def examine(device: str | None = None) -> dict[str, Any]:
    """What `doctor` prints.

    Args:
        device: a torch device; None for the first CUDA device, or the CPU where there is none.

    Raises:
        InputError: not the name of a device, or one that is not here.
    """
    import torch

    from ..errors import InputError
    from ..kernels.dispatch import OPS, USED_BY, explain

    devices = [{"device": "cpu", "name": platform.processor() or platform.machine()}]
    for index in range(torch.cuda.device_count()):
        devices.append({"device": f"cuda:{index}", "name": torch.cuda.get_device_name(index)})
    wanted = device or ("cuda" if len(devices) > 1 else "cpu")
    here = {entry["device"] for entry in devices} | {e["device"].split(":")[0] for e in devices}
    if wanted not in here:
        raise InputError(f"device {wanted!r}: expected one of {', '.join(sorted(here))}")
    operations = {}
    for name, summary in OPS.items():
        choice = explain(wanted)
        operations[name] = {
            "implementation": choice.implementation,
            "reason": choice.reason,
            "summary": summary,
            "used_by": USED_BY[name],
        }
    operations["linear"] = _linear(wanted)
    operations["step"] = _step(wanted)
    return {
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in PACKAGES},
        "devices": devices,
        "device": wanted,
        "operations": operations,
    }


def _step(device: str) -> dict[str, str]:
    """What `ARPipeline.compile("auto")` makes of a pass of a token model."""
    is_cuda = device.startswith("cuda")
    return {
        "implementation": "cuda graph" if is_cuda else "loop",
        "reason": "captured for each window, on CUDA"
        if is_cuda
        else "nothing to capture here; "
        "'eager' makes passes of fixed shapes, 'default' compiles them",
        "summary": "one pass of a token model, after compile()",
    }


def _linear(device: str) -> dict[str, str]:
    """What the linear layers of the models run."""
    from ..kernels.linear import packed_operators, packing_pays

    obstacle = None
    if device != "cpu":
        obstacle = "oneDNN's packed product is for CPUs"
    elif packed_operators() is None:
        obstacle = "this build of PyTorch lacks oneDNN's packed product"
    elif not packing_pays():
        obstacle = "MKL is as fast on this CPU as oneDNN's packed product"
    return {
        "implementation": "onednn" if obstacle is None else "torch",
        "reason": obstacle or "at inference in float32 on a CPU, from 4 rows",
        "summary": "linear layers of the models",
    }


def _version(package: str) -> str | None:
    if package == "torch":
        import torch

        return torch.__version__  # names the accelerator that it was built for
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
