"""`arvision train-draft`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import expanded, tell

EPILOG = """Examples:

arvision train-draft --model ./SmolLM2-135M-Instruct --prompts prompts.txt --kind hydra --out runs/hydra

arvision train-draft --model ./target --prompts prompts.txt --kind medusa2 --out runs/medusa2

arvision generate --model runs/medusa2/backbone --prompt "Hello" --draft runs/medusa2

arvision train-draft --model ./target --prompts prompts.txt --kind ppd --steps 200 --out runs/ppd

arvision generate --model ./SmolLM2-135M-Instruct --prompt "Hello" --chat --draft runs/hydra --stats

arvision train-draft --model ./target --prompts prompts.txt --kind model --pretrain ./my-texts --out runs/fastdraft

arvision train-draft --model ./target --prompts prompts.txt --kind model --divergence auto --on-policy 0.5 --out runs/distilled

arvision train-draft --model ./target --prompts prompts.txt --kind acceptance --draft runs/distilled --out runs/stop

arvision train-draft --model ./target --prompts marked.jsonl --kind judge --out runs/judge

PROMPTS holds one prompt per line, or is a .csv or .tsv file with a column named prompt, or a .jsonl
or .json file; each is wrapped in the model's chat template where it has one. The target
stays frozen and answers them itself; what is fitted learns from these answers. Only medusa2 trains
the target as well: a copy of it, OUT/backbone, which is another model then. Run a command again
to resume it. For a judge (`--rule judge`) it holds marked answers, a JSON object per line:
{"prompt": "2 + 2?", "answer": "It is 5.", "wrong": "5"}, without "wrong" where all is fine.
"""


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("train-draft", epilog=EPILOG)(train_draft)


def train_draft(
    model: Annotated[str, typer.Option(help="Target: folder, GGUF file or hub id.")],
    prompts: Annotated[Path, typer.Option(help="File of prompts, see below.", callback=expanded)],
    out: Annotated[
        Path, typer.Option(help="Folder for checkpoints and the finished draft.", callback=expanded)
    ],
    kind: Annotated[
        str,
        typer.Option(
            help="medusa, medusa2, hydra, hydra++, clover, chimera, eagle3, mtp, ppd, hidden_transfer, "
            "lud, model, nested, acceptance, parallel (of an encoder-decoder target), judge."
        ),
    ] = "hydra",
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per step.")] = None,
    num_heads: Annotated[
        int | None,
        typer.Option(
            help="Longest draft of heads or pseudo tokens, steps that eagle3 and mtp unroll; 3."
        ),
    ] = None,
    divergence: Annotated[
        str | None,
        typer.Option(
            help="forward_kl (the default), reverse_kl, jensen_shannon, total_variation; for a model "
            "also auto, the best of pilots."
        ),
    ] = None,
    answer_tokens: Annotated[
        int | None, typer.Option(help="Tokens of an answer at most; 96.")
    ] = None,
    num_ensemble: Annotated[
        int | None, typer.Option(help="Members of each prompt token of ppd; 1.")
    ] = None,
    pretrain: Annotated[
        Path | None,
        typer.Option(
            help="File or folder of texts that a fresh draft model learns from first.",
            callback=expanded,
        ),
    ] = None,
    pretrain_steps: Annotated[
        int | None, typer.Option(help="Optimiser steps of the pre-training; 400.")
    ] = None,
    start: Annotated[
        str | None, typer.Option(help="Of a draft model: layers (of the target) or fresh.")
    ] = None,
    on_policy: Annotated[
        float | None, typer.Option(help="Share of answers that a draft model draws itself; 0.")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="What --divergence auto or acceptance is for; 0 is greedy."),
    ] = None,
    draft: Annotated[
        str | None, typer.Option(help="Draft model whose acceptance is learnt (acceptance).")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Fit draft heads, pseudo tokens or a small draft model on a frozen target."""
    from ..files import check_out
    from ..text.fitting.recipes import fit_draft
    from .generate import dtype_of

    check_out(out, is_folder=True)
    figures: dict[str, Any] = fit_draft(
        model,
        prompts,
        out,
        kind,
        steps=steps,
        batch_size=batch_size,
        num_heads=num_heads,
        divergence=divergence,
        answer_tokens=answer_tokens,
        num_ensemble=num_ensemble,
        pretrain=pretrain,
        pretrain_steps=pretrain_steps,
        start=start,
        on_policy=on_policy,
        temperature=temperature,
        draft=draft,
        dtype=dtype_of(dtype),
        device=device,
        progress=not quiet,
    )
    tell(json.dumps(figures) if as_json else f"{kind} -> {out}: {figures}")
