"""`arvision bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import expanded

EPILOG = """Examples:

arvision bench --models llamagen-fashion --samplers ar,sjd,sjd:window=32 --batch 1,16

arvision bench --models llamagen-fashion --samplers ar,sjd --compare out/bench/bench.json --out out/after

PYTHONPATH=../LlamaGen arvision bench --models llamagen-fashion --samplers ar --against official
"""


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("bench", epilog=EPILOG)(bench)


def bench(
    models: Annotated[str, typer.Option(help="Names, folders or hub ids, by commas.")],
    samplers: Annotated[str, typer.Option(help="name:option=value,... by commas.")] = "ar,sjd",
    batch: Annotated[str, typer.Option(help="Images drawn together, by commas.")] = "1",
    dtypes: Annotated[str, typer.Option(help="By commas.")] = "float32",
    device: Annotated[str | None, typer.Option(help="An accelerator where there is one.")] = None,
    compile_mode: Annotated[
        str | None, typer.Option("--compile", help="Mode of the pipeline's compile().")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Measured draws of each case.")] = 5,
    out: Annotated[
        Path, typer.Option(help="Folder for tables and plot.", callback=expanded)
    ] = Path("out/bench"),
    compare: Annotated[
        Path | None,
        typer.Option(help="A bench.json: tell what changed beyond noise.", callback=expanded),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="official: the authors' code on PYTHONPATH, with the same weights."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Passes, times, reads, operator calls and the share of the limit, alternating in one process."""
    import json

    from tqdm.auto import tqdm

    from ..bench import read, run
    from ..errors import InputError, optional
    from ..files import check_out

    with optional("plot", "the plot of arvision bench"):  # said before the work, not after it
        import matplotlib  # noqa: F401
    check_out(out, is_folder=True)
    old = None if compare is None else read(compare)
    lists = [
        [part.strip() for part in text.split(",") if part.strip()]
        for text in (models, samplers, dtypes)
    ]
    try:
        batches = [int(number) for number in batch.split(",")]
    except ValueError:
        raise InputError(f"--batch {batch!r}: expected numbers by commas, such as 1,16") from None
    kinds = len(lists[1]) + (against is not None)
    total = len(lists[0]) * kinds * len(lists[2]) * len(batches) * (rounds + 1)
    with tqdm(total=total, desc="bench", disable=quiet) as bar:
        found = run(
            lists[0],
            lists[1],
            batches=batches,
            dtypes=lists[2],
            device=device,
            compile=compile_mode,
            rounds=rounds,
            against=against,
            on_case=lambda: bar.update(1),
        )
    written = found.write(out, old)
    typer.echo(json.dumps(found.record(), indent=1) if as_json else found.markdown(old))
    for path in written:
        typer.echo(f"wrote {path}", err=True)
