"""`arvision distill`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import expanded, set_threads, tell

MOST_PROMPTS = 1 << 28
"""Bytes of a file of captions."""

EPILOG = """Examples:

arvision distill --teacher llamagen-fashion --out runs/llamagen-fashion-dd

arvision distill --teacher var-fashion --out runs/var-fashion-dd --num-pairs 40000 --timesteps 0,3

arvision distill --teacher llamagen-fashion-t2i --out runs/t2i --prompts captions.txt

arvision distill --teacher llamagen-fashion --method dd2 --init llamagen-fashion-dd --out runs/dd2

arvision sample --model runs/llamagen-fashion-dd/llamagen-fashion-dd --prompt boot --steps 2 --out boot.png

The teacher first writes pairs of noise and tokens, then the student learns them. Run a command again
to resume it; `torchrun --nproc-per-node 2 -m arvision.cli distill ...` shares the work among processes. The
finished student lies in OUT/TEACHER-dd.
"""


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("distill", epilog=EPILOG)(distill)


def distill(
    teacher: Annotated[str, typer.Option(help="Embedded name or folder of the model to distil.")],
    out: Annotated[
        Path, typer.Option(help="Folder for pairs, checkpoints and the student.", callback=expanded)
    ],
    method: Annotated[
        str, typer.Option(help="dd1: from pairs; dd2: from the teacher's scores.")
    ] = "dd1",
    num_pairs: Annotated[int | None, typer.Option(help="Pairs to learn from.")] = None,
    num_held_out: Annotated[int | None, typer.Option(help="Pairs for the figures.")] = None,
    shard_size: Annotated[int | None, typer.Option(help="Pairs per file and batch.")] = None,
    timesteps: Annotated[
        str | None, typer.Option(help="Known tokens (scales) to train for, such as 0,20.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pairs per step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak of the schedule.")] = None,
    vector_weight: Annotated[float | None, typer.Option(help="Of the regression term.")] = None,
    picture_weight: Annotated[float | None, typer.Option(help="Of the decoder's term.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Captions of a text teacher, one per line.", callback=expanded),
    ] = None,
    intermediate_size: Annotated[
        int | None, typer.Option(help="Width of the student's feed-forward layers.")
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            help="A trained student to start from: for dd2 of this teacher (dd1 makes one if left), "
            "for dd1 of any."
        ),
    ] = None,
    score_steps: Annotated[int | None, typer.Option(help="dd2: optimiser steps.")] = None,
    card_samples: Annotated[int | None, typer.Option(help="Samples to measure on.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; small models like one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measured figures.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Distil a model into a student that draws an image in one or two passes."""
    from ..files import check_out, read_regular
    from ..samplers.base import parse_value
    from ..training.distill import DistillSettings
    from ..training.distill import distill as run

    check_out(out, is_folder=True)
    set_threads(threads)
    fit: dict[str, Any] = {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
    }
    given: dict[str, Any] = {
        "num_pairs": num_pairs,
        "num_held_out": num_held_out,
        "shard_size": shard_size,
        "vector_weight": vector_weight,
        "picture_weight": picture_weight,
        "prompts": None if prompts is None else read_regular(prompts, MOST_PROMPTS).splitlines(),
        "intermediate_size": intermediate_size,
        "init": init,
        "num_card": card_samples,
        "timesteps": None if timesteps is None else parse_value(f"[{timesteps}]"),
    }
    settings = DistillSettings(**{k: v for k, v in given.items() if v is not None})
    changed = dataclasses.replace(settings.fit, **{k: v for k, v in fit.items() if v is not None})
    given_steps = {} if score_steps is None else {"steps": score_steps}
    if batch_size is not None:
        given_steps["batch_size"] = batch_size
    scored = dataclasses.replace(settings.score_fit, **given_steps)
    settings = dataclasses.replace(settings, fit=changed, score_fit=scored)
    figures = run(teacher, out, settings, method=method, progress=not quiet)
    if not figures:
        return
    student = out / f"{Path(teacher).name}-dd"
    agreed = [
        f"agreement {share:.3f} behind {k}" for k, share in figures.get("agreement", {}).items()
    ]
    likelihood = figures.get("log_likelihood", {})
    agreed += [f"log-likelihood {name} {value:.2f}" for name, value in likelihood.items()]
    tell(json.dumps(figures) if as_json else f"{student}: {', '.join(agreed)}")
