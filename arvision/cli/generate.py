"""`arvision generate`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import expanded

EPILOG = """Examples:

arvision generate --model ./SmolLM2-135M-Instruct --prompt "What is a llama?" --chat --drafter token_recycling --stats

arvision generate --model model.gguf --prompt "def add(a, b):" --drafter prompt_lookup+token_recycling --stop "\\n\\n"

arvision generate --model ./target --prompt "Once upon a time" --draft ./draft --temperature 0.7 --json

arvision generate --model ./target --prompt "Hello" --draft ./draft --rule judge --rule-option head=runs/judge

arvision generate --model ./target --prompts questions.csv --chat --drafter prompt_lookup --json

PROMPTS: a prompt per line; .csv and .tsv with a column named prompt; .jsonl and .json with objects
that have a "prompt". A stop string that is a special token of the model ends a text as that token.
"""


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("generate", epilog=EPILOG)(generate)


def unescaped(text: str) -> str:
    """Text with the line ends and tabs that a shell cannot write; other characters are themselves."""
    known = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    return re.sub(r"\\([ntr\\])", lambda found: known[found[1]], text)


def _texts(prompt: list[str] | None, prompts: Path | None) -> list[str]:
    """The prompts of the command line or of a file, one of both."""
    from ..errors import InputError
    from ..prompt_files import read_prompts

    if (prompt is None) == (prompts is None):
        raise InputError("expected either --prompt TEXT (repeatable) or --prompts FILE")
    if prompts is None:
        return prompt or []
    return [record["prompt"] for record in read_prompts(prompts)]


def tame(text: str) -> str:
    """What a model wrote, for a terminal: it may break lines, but not move the cursor or the like."""
    if not sys.stdout.isatty():
        return text
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)


def dtype_of(name: str | None) -> Any:
    """The torch dtype of that name, None for None."""
    import torch

    from ..errors import unknown_name

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in kinds:
        raise unknown_name("dtype", name, kinds)
    return None if name is None else kinds[name]


def generate(
    model: Annotated[str, typer.Option(help="Folder, GGUF file or hub id of a causal LM.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; repeatable.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="File of them: text, CSV, TSV, JSON lines or JSON.", callback=expanded),
    ] = None,
    drafter: Annotated[str | None, typer.Option(help="A drafter, or two joined by +.")] = None,
    draft: Annotated[str | None, typer.Option(help="Draft model, or heads of train-draft.")] = None,
    rule: Annotated[str, typer.Option(help="lossless, or a rule such as block.")] = "lossless",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens per prompt.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Tokens kept; all where left out.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Mass kept; all where left out.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws, 0 where left out.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends a text; repeatable.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    num_draft: Annotated[str | None, typer.Option(help="Candidates per pass, or auto.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="Drafter option name=value.")] = None,
    rule_option: Annotated[list[str] | None, typer.Option(help="Rule option name=value.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print figures on stderr.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print texts and figures.")] = False,
) -> None:
    """Continue a text, several tokens per pass."""
    from ..samplers.base import parse_value
    from ..text.generation import drafter_of
    from ..text.generation import generate as run
    from ..text.rules import choose_rule
    from .sample import parse_options, refuse_unused

    options: dict[str, Any] = parse_options(option or [])
    texts = _texts(prompt, prompts)
    if draft is not None:
        found, argument = drafter_of(draft)
        options[argument] = draft
        drafter = drafter or found
    if drafter is None:
        refuse_unused({"--num-draft": num_draft, "--option": option}, "without --drafter")
        # What is wrong with a rule is told first.
        choose_rule(rule, "chosen", temperature, **parse_options(rule_option or []))
        chosen = None if rule == "lossless" else rule
        refuse_unused({"--rule": chosen, "--rule-option": rule_option}, "without --drafter")
    if temperature == 0:
        given = {"--top-k": top_k, "--top-p": top_p, "--seed": seed}
        refuse_unused(given, "at --temperature 0")
    streams = len(texts) == 1 and not as_json

    def show(_: int, text: str) -> None:
        sys.stdout.write(tame(text))
        sys.stdout.flush()

    out = run(
        model,
        texts,
        drafter=drafter,
        rule=rule,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k or 0,
        top_p=1.0 if top_p is None else top_p,
        seed=seed or 0,
        stop=[unescaped(text) for text in stop or []],
        chat=chat,
        num_draft=None if num_draft is None else parse_value(num_draft),
        drafter_options=options,
        rule_options=parse_options(rule_option or []),
        stream=show if streams else None,
        device=device,
        dtype=dtype_of(dtype),
    )
    figures = {name: value for name, value in out.stats.items() if name != "windows"}
    if as_json:
        typer.echo(json.dumps({"texts": out.texts, "tokens": out.tokens, "stats": figures}))
    elif streams:
        typer.echo()
    else:
        for text in out.texts or []:
            typer.echo(tame(text))
    if stats:
        typer.echo(
            f"{out.stats.tokens} tokens, {out.stats.forward_passes} passes, "
            f"{out.stats.tokens_per_pass:.2f} tokens per pass, {out.stats.seconds:.2f} s, rule "
            f"{out.stats.rule} ({'lossless' if out.stats.lossless else 'lossy'})",
            err=True,
        )
