"""`arvision serve`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

EPILOG = """Examples:

arvision serve --model llamagen-fashion

curl -s http://127.0.0.1:8000/v1/images/generations -H "Content-Type: application/json" -d '{"prompt": "sneaker", "seed": 7}'

arvision serve --model zai-org/GLM-Image --port 30001

arvision serve --model llamagen-fashion --workers 4

ARVISION_TOKEN=secret arvision serve --model ./janus --host 0.0.0.0 --batch 32 --queue 256

SIGTERM and Ctrl+C draw what was ordered, take nothing new, and end. For several processes and many GPUs see docs/serving.md.
"""

TOKEN = "ARVISION_TOKEN"
"""Environment variable of the bearer token, which a command line would show to everybody."""


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("serve", epilog=EPILOG)(serve)


def bearer_token() -> str | None:
    """The token of the environment; None for none (`InputError`: an empty one)."""
    from ..errors import InputError

    token = os.environ.get(TOKEN)
    if token is not None and not token.strip():
        raise InputError(f"{TOKEN} is empty: expected a token, or no such variable")
    return token


def serve(
    model: Annotated[str, typer.Option(help="Embedded name, folder or hub id.")],
    host: Annotated[str, typer.Option(help="Address; 0.0.0.0 for all of the machine's.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="0 for any that is free.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Of the model in requests.")] = None,
    batch: Annotated[int, typer.Option(help="Pictures drawn at a time, at most.")] = 16,
    queue: Annotated[int, typer.Option(help="Pictures that wait, at most.")] = 128,
    images: Annotated[int, typer.Option(help="Pictures of a request, at most.")] = 10,
    prompt_length: Annotated[int, typer.Option(help="Characters of a prompt, at most.")] = 4000,
    timeout: Annotated[float, typer.Option(help="Seconds of a request, at most.")] = 300.0,
    batching: Annotated[
        str, typer.Option(help="auto, continuous (nothing else), or arrival.")
    ] = "auto",
    workers: Annotated[
        int, typer.Option(help="Processes, each with the model, a batch and a queue of its own.")
    ] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
) -> None:
    """Serve a model over HTTP; ARVISION_TOKEN in the environment asks requests for that token."""
    from functools import partial

    from ..errors import check_count
    from ..folders import find_model, parse_device, parse_dtype
    from ..hosting import host as host_app
    from ..hosting import listen
    from ..serving import Limits, application

    limits = Limits(
        batch=batch,
        queue=queue,
        images=images,
        prompt=prompt_length,
        timeout=timeout,
        batching=batching,
    )
    check_count("workers", workers, 256)
    token = bearer_token()
    # A port in use and an unknown name are told before anything is loaded.
    socket = listen(host, port)
    find_model(model)
    place = parse_device(device)
    kind = parse_dtype(dtype, place)
    make = partial(application, model, name or model, limits, token, str(place), kind)
    host_app(make, socket, name or model, limits.timeout, workers)
