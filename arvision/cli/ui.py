"""`arvision ui`."""

from __future__ import annotations

from typing import Annotated

import typer

from .serve import bearer_token

EPILOG = """Examples:

arvision ui

arvision ui --model llamagen-fashion --model ./my-model --port 7861

ARVISION_TOKEN=secret arvision ui --host 0.0.0.0

The page offers the models named here and no others; docs/ui.md says what is on it. Ctrl+C ends it.
"""


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("ui", epilog=EPILOG)(ui)


def ui(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Embedded name, folder or hub id; repeatable. The embedded ones if none."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address; 0.0.0.0 for all of the machine's.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="0 for any that is free.")] = 7860,
    queue: Annotated[int, typer.Option(help="Draws that wait, at most.")] = 16,
    images: Annotated[int, typer.Option(help="Pictures of each sampler, at most.")] = 8,
    prompt_length: Annotated[int, typer.Option(help="Characters of a prompt, at most.")] = 1000,
    timeout: Annotated[float, typer.Option(help="Seconds of a draw, at most.")] = 300.0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
) -> None:
    """A page to try models on; ARVISION_TOKEN in the environment is the password of user arvision."""
    from ..hosting import host as host_app
    from ..hosting import listen
    from ..ui.desk import Bounds, Desk
    from ..ui.page import make_app

    bounds = Bounds(queue=queue, images=images, prompt=prompt_length, timeout=timeout)
    token = bearer_token()
    # A port in use is told before anything is loaded.
    socket = listen(host, port)
    desk = Desk(model or (), bounds, device, dtype)
    host_app(lambda: make_app(desk, token), socket, "the page", grace=1)
