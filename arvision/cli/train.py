"""`arvision train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .fashion import FashionFolder
from .output import expanded, set_threads, tell
from .sample import refuse_unused

EPILOG = """Examples:

arvision train --recipe llamagen-fashion --out runs/llamagen-fashion

arvision train --recipe llamagen-fashion-t2i --out runs/llamagen-fashion

arvision train --recipe llamagen-fashion-t2i-dd --out runs/llamagen-fashion-t2i-dd

arvision train --recipe llamagen-fashion-draft --out runs/llamagen-fashion

arvision train --recipe var-fashion --out runs/var-fashion

arvision train --recipe infinity-fashion --out runs/infinity-fashion

arvision train --recipe mar-fashion --out runs/mar-fashion

arvision train --recipe fashion-classifier --out runs

arvision train --recipe llamagen --data pictures --size 64 --minutes 30 --out runs/mine

arvision train --recipe llamagen --data pictures --captions captions.csv --size 64 --steps 3000 --out runs/texts

With --data a model is trained on pictures of your own (recipes llamagen, var and mar; docs/training.md)
and lies in OUT. The others are the embedded models: the text model continues in the folder of the first: it shares the tokenizer and starts from its
weights. The draft learns from the embedded llamagen-fashion. Run a command again to resume it. The
finished model lies in OUT/RECIPE.
"""


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("train", epilog=EPILOG)(train)


def train(
    recipe: Annotated[
        str, typer.Option(help="See the examples; with --data llamagen, var or mar.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for checkpoints and the finished model.", callback=expanded)
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of your own pictures; subfolders are classes.", callback=expanded
        ),
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(help="With --data: .csv or .jsonl of file and text.", callback=expanded),
    ] = None,
    size: Annotated[int | None, typer.Option(help="With --data: pixels of a side; 64.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="With --data: wall time in all; 10, or --steps.")
    ] = None,
    factor: Annotated[
        int | None, typer.Option(help="With --data: pixels per token and side.")
    ] = None,
    hidden_size: Annotated[
        int | None, typer.Option(help="With --data: width of the transformer; 192.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="With --data: its blocks; 4.")] = None,
    codebook_size: Annotated[
        int | None, typer.Option(help="With --data: codes of the tokenizer; 512.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="With --data: pictures per step; 32.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="With --data: peak of both schedules; 0.001.")
    ] = None,
    sample_every: Annotated[
        int | None, typer.Option(help="With --data: steps between sheets of samples.")
    ] = None,
    mixed_precision: Annotated[
        str | None, typer.Option(help="With --data: no or bf16; what is faster.")
    ] = None,
    unconditional: Annotated[
        bool, typer.Option("--unconditional", help="With --data: subfolders are no classes.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="With --data; 0.")] = None,
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
    """Train (or resume) an embedded model from its recipe, or a model of your own pictures."""
    from ..files import check_out

    own: dict[str, Any] = {
        "size": size,
        "minutes": minutes,
        "factor": factor,
        "hidden_size": hidden_size,
        "num_layers": layers,
        "codebook_size": codebook_size,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "sample_every": sample_every,
        "mixed_precision": mixed_precision,
        "is_unconditional": unconditional or None,
        "seed": seed,
    }
    check_out(out, is_folder=True)
    set_threads(threads)
    if data is not None:
        theirs = {"--num-images": num_images, "--card-samples": card_samples}
        refuse_unused({**theirs, "--fashion-mnist": fashion_mnist}, "with --data")
        given = {name: value for name, value in own.items() if value is not None}
        _own(recipe, data, out, captions, steps, given, as_json, quiet)
        return
    flags = {f"--{name.removeprefix('is_').removeprefix('num_')}": v for name, v in own.items()}
    flags = {name.replace("_", "-"): value for name, value in flags.items()}
    refuse_unused({"--captions": captions, **flags}, "without --data")
    from ..training.publish import run_recipe

    figures = run_recipe(
        recipe,
        out,
        steps=steps,
        num_images=num_images,
        card_samples=card_samples,
        progress=not quiet,
    )
    tell(json.dumps(figures) if as_json else f"{recipe} -> {out / recipe}")


def _own(
    recipe: str,
    data: Path,
    out: Path,
    captions: Path | None,
    steps: int | None,
    given: dict[str, Any],
    as_json: bool,
    quiet: bool,
) -> None:
    """Train on a person's own pictures."""
    from ..training.own import train as run
    from ..training.own_recipes import OwnSettings

    settings = OwnSettings(recipe=recipe, steps=steps, **given)
    figures = run(data, out, settings, captions=captions, progress=not quiet)
    if not figures:
        return  # not the first of several processes
    if as_json:
        tell(json.dumps(figures))
    else:
        loss, names = figures["held_out_loss"], figures["classes"]
        prompt = "A CAPTION" if names is None else names[0]
        tell(
            f"{out}: held-out loss {loss['first']:.3f} untrained, {loss['best']:.3f} at step "
            f'{loss["best_step"]}; arvision sample --model {out} --prompt "{prompt}" --out picture.png'
        )
