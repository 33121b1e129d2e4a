"""`arvision finetune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import expanded, set_threads, tell
from .sample import parse_options, refuse_unused

EPILOG = """Examples:

arvision finetune llamagen-fashion --data pictures --steps 300 --out tuned

arvision finetune c2i_B_256.pt --tokenizer vq_ds16_c2i.pt --data pictures --lora-rank 16 --out tuned

arvision finetune var_d16.pth --tokenizer vae_ch160v4096z32.pth --data pictures --lora-rank 16 --merge --out tuned

arvision finetune mar_base/checkpoint-last.pth --tokenizer kl16.ckpt --data pictures --label 207 --out tuned

Run a command again to resume it. The authors' files come out in their own layout under OUT, folders as
folders; with --lora-rank an adapter in peft's layout lies in OUT/adapter: arvision.load(MODEL, adapter=...).
"""


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("finetune", epilog=EPILOG)(finetune)


def finetune(
    checkpoint: Annotated[
        str, typer.Argument(help="The authors' file, an embedded name or a folder.")
    ],
    data: Annotated[
        Path,
        typer.Option(
            help="Folder of your own pictures; subfolders are classes.", callback=expanded
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run.", callback=expanded)],
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Of the authors' file: that of its tokenizer.", callback=expanded),
    ] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="Likewise: folder or hub id of the T5 of captions.")
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option(help="What the files do not tell, name=value; repeatable.")
    ] = None,
    captions: Annotated[
        Path | None, typer.Option(help=".csv or .jsonl of file and text.", callback=expanded)
    ] = None,
    label: Annotated[str | None, typer.Option(help="Class of pictures in no subfolders.")] = None,
    steps: Annotated[int | None, typer.Option(help="500.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="16.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="0.0001; with LoRA 0.001.")] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="Train updates of this rank, not the weights.")
    ] = None,
    lora_alpha: Annotated[int | None, typer.Option(help="The rank unless given.")] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="With LoRA: write the model, too.")
    ] = False,
    sample_every: Annotated[
        int | None, typer.Option(help="Steps between sheets of samples.")
    ] = None,
    mixed_precision: Annotated[str | None, typer.Option(help="no or bf16.")] = None,
    seed: Annotated[int | None, typer.Option(help="0.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; small models like one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measured figures.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Go on training a published, embedded or own model on pictures of your own, whole or by LoRA."""

    from .. import load
    from ..conversion import read_published
    from ..errors import InputError
    from ..files import check_out, user_path
    from ..inspection import inspect
    from ..training.finetune import FinetuneSettings
    from ..training.finetune import finetune as run

    check_out(out, is_folder=True)
    set_threads(threads)
    given: dict[str, Any] = {
        "label": label,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "lora_rank": lora_rank,
        "lora_alpha": lora_alpha,
        "merge": merge or None,
        "sample_every": sample_every,
        "mixed_precision": mixed_precision,
        "seed": seed,
    }
    settings = FinetuneSettings(
        **{name: value for name, value in given.items() if value is not None}
    )
    path = user_path(checkpoint)
    if path.is_file():
        family = inspect(path).get("family")
        if family not in ("llamagen", "var", "mar"):
            raise InputError(f"{path}: expected a checkpoint of LlamaGen, VAR or MAR")
        how = {"tokenizer": tokenizer, "text_encoder": text_encoder}
        pipe = read_published(family, path, sizes=parse_options(size or []), **how)
    else:
        only = {"--tokenizer": tokenizer, "--text-encoder": text_encoder, "--size": size or None}
        refuse_unused(only, f"with {checkpoint}, which is no file of the authors")
        pipe = load(checkpoint, device="cpu", dtype="float32")
    is_file = path.is_file()
    figures = run(
        pipe,
        data,
        out,
        settings,
        captions=captions,
        official=path if is_file else None,
        name=str(path.absolute()) if is_file or path.exists() else checkpoint,
        progress=not quiet,
    )
    if not figures:
        return  # not the first of several processes
    if as_json:
        tell(json.dumps(figures))
    else:
        loss = figures["held_out_loss"]
        where = out if lora_rank is None else out / "adapter"
        tell(
            f"{where}: held-out loss {loss['first']:.3f} as it came, {loss['best']:.3f} at step "
            f"{loss['best_step']}; {figures['trained']:,} parameters trained"
        )
