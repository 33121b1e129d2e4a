"""`arvision train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .fashion import FashionFolder
from .output import expanded, tell

EPILOG = """Examples:

arvision train --recipe llamagen-fashion --out runs/llamagen-fashion

arvision train --recipe llamagen-fashion-t2i --out runs/llamagen-fashion

arvision train --recipe llamagen-fashion-t2i-dd --out runs/llamagen-fashion-t2i-dd

arvision train --recipe llamagen-fashion-draft --out runs/llamagen-fashion

arvision train --recipe var-fashion --out runs/var-fashion

arvision train --recipe infinity-fashion --out runs/infinity-fashion

arvision train --recipe mar-fashion --out runs/mar-fashion

arvision train --recipe fashion-classifier --out runs

The text model continues in the folder of the first: it shares the tokenizer and starts from its
weights. The draft learns from the embedded llamagen-fashion. Run a command again to resume it. The
finished model lies in OUT/RECIPE.
"""


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("train", epilog=EPILOG)(train)


def train(
    recipe: Annotated[str, typer.Option(help="See the examples.")],
    out: Annotated[
        Path, typer.Option(help="Folder for checkpoints and the finished model.", callback=expanded)
    ],
    steps: Annotated[int | None, typer.Option(help="At most this many steps per stage.")] = None,
    num_images: Annotated[int | None, typer.Option(help="Only this many training images.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; small models like one.")] = None,
    card_samples: Annotated[
        int | None, typer.Option(help="Samples that the card is measured on; 1000.")
    ] = None,
    fashion_mnist: FashionFolder = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measured figures.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Train (or resume) an embedded model from its recipe."""
    import torch

    from ..errors import check_count
    from ..files import check_out
    from ..training.publish import run_recipe

    check_out(out, is_folder=True)
    if threads is not None:
        torch.set_num_threads(check_count("threads", threads, 1024))
    figures = run_recipe(
        recipe,
        out,
        steps=steps,
        num_images=num_images,
        card_samples=card_samples,
        progress=not quiet,
    )
    tell(json.dumps(figures) if as_json else f"{recipe} -> {out / recipe}")
