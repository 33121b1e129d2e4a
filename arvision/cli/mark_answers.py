"""`arvision mark-answers`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import expanded, tell

EPILOG = """Examples:

arvision mark-answers --prompts questions.txt --model ./draft --out marked.jsonl

arvision mark-answers --prompts facts.jsonl --exchange 2 --derail 1 --out marked.jsonl

arvision train-draft --model ./target --prompts marked.jsonl --kind judge --out runs/judge

With --model it answers each question and asks you: type the part that is wrong, from its first wrong
word on; nothing where all is fine; "-" to leave an answer out; end the input to stop. Answers that
were marked before stay in the file, and their questions are not asked again. With --exchange the records of the file
have an "answer" that is true and a "key", the part that makes it so ("topic" is optional): each is
written as it is, and with the keys of others in the place of its own, marked as wrong. --derail adds right
answers that are broken off and go on with words out of place, as weak drafts do.
"""


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("mark-answers", epilog=EPILOG)(mark_answers)


def mark_answers(
    prompts: Annotated[Path, typer.Option(help="File of questions.", callback=expanded)],
    out: Annotated[Path, typer.Option(help="File of marked answers.", callback=expanded)],
    model: Annotated[
        str | None, typer.Option(help="Who answers: folder, GGUF file, hub id.")
    ] = None,
    exchange: Annotated[
        int | None, typer.Option(help="Wrong answers made of each right one.")
    ] = None,
    derail: Annotated[
        int | None, typer.Option(help="With --exchange: broken answers made of each right one.")
    ] = None,
    num_answers: Annotated[int | None, typer.Option(help="Answers to each question; 1.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer; 64.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the draws; 0.8.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
) -> None:
    """Make marked answers for a judge (`train-draft --kind judge`)."""
    from ..errors import InputError
    from ..files import append_line, write_text
    from ..text.fitting.judge import read_marked
    from ..text.fitting.marking import as_line, asked, derailed, exchanged, read_known
    from ..text.fitting.recipes import questions
    from .generate import tame
    from .sample import refuse_unused

    if (model is None) == (exchange is None):
        raise InputError("expected either --model NAME or --exchange NUMBER")
    given = {
        "num_answers": num_answers,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
    }
    if exchange is not None:
        refuse_unused({f"--{k.replace('_', '-')}": v for k, v in given.items()}, "with --exchange")
        made = exchanged(read_known(prompts), exchange)
        # The held-out end of the file stays one of facts.
        made = ([] if derail is None else derailed(made, derail)) + made
        lines = [as_line(marked) for marked in made]
        write_text(out, "\n".join(lines) + "\n")
        tell(f"{len(lines)} answers -> {out}")
        return
    refuse_unused({"--derail": derail}, "without --exchange")
    done = {marked.prompt for marked in read_marked(out)} if out.exists() else set()
    left = [text for text in questions(prompts) if text not in done]

    def ask(prompt: str, answer: str) -> str | None:
        typer.echo(f"\n{tame(prompt)}\n> {tame(answer)}", err=True)
        try:
            return input()
        except EOFError:
            return None

    options = {name: value for name, value in given.items() if value is not None}
    number = 0
    for marked in asked(model, left, ask, chat=chat, **options):
        append_line(out, as_line(marked))
        number += 1
    tell(f"{number} answers -> {out}")
