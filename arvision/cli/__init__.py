"""The command line: parses, calls, prints. No logic of its own."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import warnings
from typing import Annotated, NoReturn

import typer

from .. import __version__
from ..errors import ArvisionError, DiskError, one_line
from . import (
    bench,
    compare,
    complete,
    convert,
    distill,
    doctor,
    finetune,
    generate,
    mark_answers,
    models,
    sample,
    serve,
    train,
    train_draft,
    ui,
)
from . import eval as evaluation

app = typer.Typer(
    name="arvision",
    help="Fast, exact sampling for autoregressive image models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
sample.add_to(app)
generate.add_to(app)
complete.add_to(app)
compare.add_to(app)
serve.add_to(app)
ui.add_to(app)
bench.add_to(app)
models.add_to(app)
convert.add_to(app)
train.add_to(app)
mark_answers.add_to(app)
train_draft.add_to(app)
distill.add_to(app)
finetune.add_to(app)
doctor.add_to(app)
app.add_typer(evaluation.app, name="eval")


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Fast, exact sampling for autoregressive image models."""


def main() -> None:
    """Entry point: exit 0, 2 on bad input (one line on stderr), 1 on a fault."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.showwarning = _one_line
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except SystemExit as end:
        if type(sys.stdout).__name__ == "PacifyFlushWrapper":  # how typer leaves a closed output
            _drop_output()
            _end("the output was closed", 1)
        raise end from None
    except KeyboardInterrupt:
        _end("interrupted, nothing half written", 130)
    except ArvisionError as error:
        _end(str(error), 1 if isinstance(error, DiskError) else 2)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        _end("out of memory: lower the number of images, the batch size or the window", 1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        _drop_output()
        _end(f"{error.filename or 'the output'} cannot be written: {error.strerror}", 1)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether Python's, the CPU's or an accelerator's memory is at its end."""
    text = str(error)
    return (
        isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text
    )


def _end(message: str, status: int) -> NoReturn:
    """One line on stderr, and the exit status."""
    with contextlib.suppress(OSError, ValueError):
        print(f"arvision: {one_line(message)}", file=sys.stderr)  # noqa: T201
    raise SystemExit(status) from None


def _drop_output() -> None:
    """Let what a broken stdout still holds go nowhere, else Python complains when it ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(message: Warning | str, *_: object, **__: object) -> None:
    print(f"arvision: warning: {one_line(message)}", file=sys.stderr)  # noqa: T201
