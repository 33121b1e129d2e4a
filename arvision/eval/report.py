"""One JSON and one Markdown file that say what was measured, with what, and how sure it is."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..files import user_path, write_json, write_text
from .features import Extractor
from .protocols import PIXEL_PRESETS, PROTOCOLS, Protocol
from .score import Score
from .shards import config_hash

PACKAGES = ("arvision", "torch", "diffusers", "transformers", "timm", "torchmetrics", "numpy")
FORMAT = "arvision-report/v1"


def package_versions() -> dict[str, str]:
    """Versions of the packages that a figure depends on, and of Python."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, "torch-fidelity", "scipy", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit() -> str | None:
    """Commit of the package's checkout, with "+changes" if it has any; None outside one."""
    place = Path(__file__).resolve().parent
    try:
        run = {"cwd": place, "capture_output": True, "text": True, "timeout": 10}
        head = subprocess.run(["git", "rev-parse", "HEAD"], check=True, **run)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], check=True, **run)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def machine() -> dict[str, Any]:
    """Processor, threads and accelerator."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"machine": platform.machine(), "threads": torch.get_num_threads(), "gpu": gpu}


def comparability(protocol: Protocol | None, num: int, extractor: Extractor | None) -> str:
    """What figures of this run may stand beside."""
    if protocol is None:
        return "runs with the same reference, extractor, preprocessing and number of samples"
    reasons, facts = [], extractor.facts if extractor is not None else None
    if num != protocol.num:
        reasons.append(f"{num:,} samples where the protocol has {protocol.num:,}")
    if facts is not None and facts.name != protocol.extractor:
        reasons.append(f"extractor {facts.name}, the protocol has {protocol.extractor}")
    elif facts is not None and facts.name == "inception-adm" and not facts.is_fid:
        reasons.append("weights that are not the published file")
    if reasons:
        return "not to published figures of " + protocol.id + ": " + "; ".join(reasons)
    return protocol.comparable_to


def build_report(
    scores: Mapping[str, Score],
    *,
    samples: str,
    num: int,
    extractor: Extractor | None = None,
    reference: Mapping[str, Any] | None = None,
    notes: Mapping[str, Mapping[str, Any]] | None = None,
    run: Mapping[str, Any] | None = None,
    measured: Mapping[str, Any] | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """The report as JSON types.

    Args:
        scores: by name.
        samples: where they are.
        num: how many.
        extractor: that was used.
        reference: name, sha256 and whether its statistics were read.
        notes: what reading the pictures of "samples" and "reference" left out or changed, by
            reason, with counts and first names.
        run: settings of the run that made the samples (`run.json`), where known.
        measured: seconds, passes and images per second of that run.
        seconds: of the evaluation.
    """
    name = str((run or {}).get("protocol", "custom"))
    protocol = next((p for k, p in PROTOCOLS.items() if name in (k, p.id)), None)
    preset = PIXEL_PRESETS.get(str((run or {}).get("pixels", "")))
    return {
        "format": FORMAT,
        "protocol": protocol.to_dict() if protocol else {"id": name},
        "comparable_to": comparability(protocol, num, extractor),
        "samples": samples,
        "num": num,
        "scores": {key: score.to_dict() for key, score in scores.items()},
        "extractor": extractor.facts.to_dict() if extractor else None,
        "reference": dict(reference) if reference else None,
        "notes": {side: dict(found) for side, found in (notes or {}).items() if found},
        "run": dict(run) if run else None,
        "config_hash": config_hash(dict(run)) if run else None,
        "pixels": dict(vars(preset)) if preset else None,
        "measured": dict(measured) if measured else None,
        "evaluation_seconds": seconds,
        "versions": package_versions(),
        "commit": git_commit(),
        "machine": machine(),
    }


def to_markdown(report: Mapping[str, Any]) -> str:
    """The report for readers."""
    lines = [f"# {report['samples']}", "", f"Protocol **{report['protocol']['id']}**, "]
    lines[-1] += f"{report['num']:,} samples. Comparable to {report['comparable_to']}."
    extractor = report.get("extractor")
    if extractor and not extractor["is_fid"]:
        lines += ["", f"Extractor {extractor['name']}: **not FID**."]
    lines += ["", "| score | value | 95 % interval | how |", "| --- | --- | --- | --- |"]
    for name, score in report["scores"].items():
        interval = score.get("interval")
        span = f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
        lines.append(f"| {name} | {score['value']:.4f} | {span} | {score.get('method', '')} |")
    lines += ["", "| setting | value |", "| --- | --- |"]
    for part in ("run", "measured", "reference", "extractor", "pixels", "machine", "versions"):
        for key, value in (report.get(part) or {}).items():
            if value not in (None, {}, []):
                lines.append(f"| {part}: {key} | {_short(value)} |")
    for side, kinds in (report.get("notes") or {}).items():
        for kind, reasons in kinds.items():
            for reason, found in reasons.items():
                row = f"| {side}: {kind.replace('_', ' ')} | {found['count']}: {reason} "
                lines.append(f"{row}({_short(', '.join(found['first']))}) |")
    for key in ("config_hash", "commit", "evaluation_seconds"):
        if report.get(key) is not None:
            lines.append(f"| {key} | {_short(report[key])} |")
    return "\n".join(lines) + "\n"


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")


def write_report(report: Mapping[str, Any], folder: str | Path) -> tuple[Path, Path]:
    """`report.json` and `report.md` in `folder`, each whole or not at all."""
    place = user_path(folder)
    write_json(place / "report.json", dict(report), indent=2)
    write_text(place / "report.md", to_markdown(report))
    return place / "report.json", place / "report.md"
