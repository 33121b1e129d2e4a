"""`arvision convert` and `arvision info`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .output import expanded
from .sample import parse_options

EPILOG = """Examples:

arvision convert --from llamagen --transformer c2i_L_384.pt --tokenizer vq_ds16_c2i.pt --out llamagen-l

arvision convert --from infinity --transformer infinity_2b_reg.pth --tokenizer infinity_vae_d32reg.pth --text-encoder google/flan-t5-xl --out infinity-2b

arvision convert --from nextstep --transformer NextStep-1.1 --size release=1.1 --dtype bfloat16 --out nextstep
"""


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("convert", epilog=EPILOG)(convert)
    app.command("info")(info)


def convert(
    family: Annotated[
        str, typer.Option("--from", help="llamagen, var, mar, dd, infinity or nextstep.")
    ],
    transformer: Annotated[
        Path, typer.Option(help="The authors' file (or folder).", callback=expanded)
    ],
    out: Annotated[Path, typer.Option(help="Folder to write, new or empty.", callback=expanded)],
    tokenizer: Annotated[
        Path | None, typer.Option(help="File of the image tokenizer.", callback=expanded)
    ] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="Folder or hub id of the T5 encoder of captions.")
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option(help="What the files do not tell, name=value; repeatable.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Make a pipeline's folder of a published checkpoint."""
    from ..conversion import convert as run

    pipe = run(
        family,
        transformer,
        out,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        sizes=parse_options(size or []),
        dtype=dtype,
    )
    names = ("guidance_scale", "temperature", "top_k", "top_p")
    settings = {name: pipe.config[name] for name in names}
    if as_json:
        typer.echo(json.dumps({"out": str(out), "kind": pipe.kind, "settings": settings}))
        return
    words = ", ".join(f"{name} {value}" for name, value in settings.items())
    typer.echo(f'{out}: arvision.load("{out}") opens it; settings: {words}')


def info(
    name: Annotated[str, typer.Argument(help="A file, a folder, a known name or a hub id.")],
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Tell what something is and how to load it; no network is built."""
    from ..inspection import as_lines, inspect

    facts = inspect(name)
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for line in as_lines(facts):
        typer.echo(line)
