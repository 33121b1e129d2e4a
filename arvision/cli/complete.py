"""`arvision complete`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .output import expanded

EPILOG = """Examples:

arvision complete --model ./SmolLM2-135M-Instruct --prompt "The capital of France is" --k 3

arvision complete --model ./model --prompt "Dear all," --ngrams letters.txt --max-new-tokens 12 --stats

Continuations are suggestions: they share their passes, and no law of the model holds for them. NGRAMS is
a file of texts like the one that is written; it keeps the continuations apart.
"""


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("complete", epilog=EPILOG)(complete)


def complete(
    model: Annotated[str, typer.Option(help="Folder, GGUF file or hub id of a causal LM.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    k: Annotated[int, typer.Option("--k", "-k", help="Continuations.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 16,
    ngrams: Annotated[
        Path | None, typer.Option(help="File of text to take n-grams from.", callback=expanded)
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Weight of the n-grams; 0.5 where left out.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print figures on stderr.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print texts and figures.")] = False,
) -> None:
    """Suggest several continuations of a text from one pass per token (approximate)."""
    from ..text.completion import complete as run
    from .generate import dtype_of, tame
    from .sample import refuse_unused

    if ngrams is None:
        refuse_unused({"--alpha": alpha}, "without --ngrams")
    out = run(
        model,
        prompt,
        k=k,
        max_new_tokens=max_new_tokens,
        ngrams=ngrams,
        alpha=0.5 if alpha is None else alpha,
        chat=chat,
        device=device,
        dtype=dtype_of(dtype),
    )
    if as_json:
        found = {"texts": out.texts, "tokens": out.tokens, "scores": out.scores}
        typer.echo(json.dumps({**found, "stats": dict(out.stats)}))
    else:
        for number, text in enumerate(out.texts or [], 1):
            typer.echo(f"{number}: {tame(text)}")
    if stats:
        typer.echo(
            f"{out.stats.tokens} tokens, {out.stats.forward_passes} passes, "
            f"{out.stats.seconds:.2f} s, rule {out.stats.rule} (lossy)",
            err=True,
        )
