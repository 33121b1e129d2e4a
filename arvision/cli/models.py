"""`arvision models` and `arvision samplers`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .output import tell


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("models")(models)
    app.command("samplers")(samplers)


def models(as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """List the embedded models."""
    from ..catalog import list_models

    listed = list_models()
    if as_json:
        tell(json.dumps([{"name": name, **name.facts} for name in listed]))
        return
    for name in listed:
        tell(f"{name:24} {name.facts['kind']:11} {name.facts['summary']}")


def samplers(
    model: Annotated[str | None, typer.Option(help="Only those that drive this model.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """List the samplers and whether they are lossless."""
    from ..catalog import list_samplers

    listed = list_samplers(model)
    if as_json:
        tell(json.dumps([{"name": name, **name.facts} for name in listed]))
        return
    for name in listed:
        law = "lossless" if name.facts["lossless"] else "lossy"
        tell(f"{name:10} {law:9} {name.facts['drives']:10} {name.facts['summary']}")
