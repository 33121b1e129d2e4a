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


def models(
    every: Annotated[
        bool, typer.Option("--all", help="Published models too: files, licence, settings, figures.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """List the embedded models, and with --all the published ones that can be read."""
    from ..catalog import list_known_models, list_models

    listed = list_models()
    known = list_known_models() if every else []
    if as_json:
        tell(json.dumps([{"name": name, **name.facts} for name in (*listed, *known)]))
        return
    for name in listed:
        tell(f"{name:24} {name.facts['kind']:11} {name.facts['summary']}")
    for name in known:
        facts = name.facts
        settings = ", ".join(f"{key} {value}" for key, value in facts["settings"].items())
        lines = {
            "files": ", ".join(facts["files"].values()),
            "settings": settings or "none",
            "quality": facts["quality"] or "nothing known to us",
            "speed": facts["speed"] or "nothing known to us",
            "source": facts["source"],
            "checked": _checked(facts["checked"]),
            "samplers": ", ".join(facts["samplers"]),
            "load": facts["load"],
        }
        hub = facts["hub"] or "not at the hub"
        tell(f"\n{name:24} {facts['kind']:11} {hub}: {facts['size']}, {facts['licence']}")
        for key, value in lines.items():
            tell(f"    {key + ':':10}{value}")


def _checked(places: dict[str, str | None]) -> str:
    """Where hub id, licence and size were looked up, and which of them were not."""
    seen = [f"{what} in {place}" for what, place in places.items() if place]
    unseen = [what for what, place in places.items() if not place]
    return "; ".join(seen) + (f"; NOT looked up: {', '.join(unseen)}" if unseen else "")


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
