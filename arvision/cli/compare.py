"""`arvision compare` and `arvision demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .output import expanded, tell

EPILOG = """Examples:

arvision compare --model llamagen-fashion-t2i --prompt "a dark ankle boot" --samplers ar,sjd:coupling=gumbel,sjd:coupling=maximal

arvision compare --model llamagen-fashion --samplers ar:noise=flow,dd@llamagen-fashion-dd,dd:steps=2@llamagen-fashion-dd

arvision compare --model llamagen-fashion --prompt bag --prompt dress --samplers ar,sjd:window=32 --num-images 4 --out out/bags --json
"""

DEMO_PROMPTS: dict[str, list[Any]] = {
    "llamagen-fashion": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
    "llamagen-fashion-t2i": [
        "a dark ankle boot",
        "a light ankle boot",
        "a grey sneaker",
        "a light long-sleeved shirt",
        "a dark short-sleeved t-shirt",
        "a dark pullover",
        "a light narrow dress",
        "a light wide bag",
        "a dark sandal",
        "a grey coat",
    ],
}


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("compare", epilog=EPILOG)(compare)
    app.command("demo")(demo)


def _bar(total: int, label: str, quiet: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=label, disable=quiet)


def compare(
    model: Annotated[str, typer.Option(help="Embedded name, folder or hub id.")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="Repeatable; none for one image of each class.")
    ] = None,
    samplers: Annotated[
        str, typer.Option(help="name:option=value,name@other-model,...")
    ] = "ar,sjd",
    num_images: Annotated[int | None, typer.Option(help="Images of each prompt (4).")] = None,
    seed: Annotated[int, typer.Option(help="Image k has identity (seed, k).")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images drawn together.")] = 1,
    out: Annotated[
        Path, typer.Option(help="Folder for sheet, tables and plot.", callback=expanded)
    ] = Path("out/compare"),
    guidance_scale: Annotated[float | None, typer.Option()] = None,
    temperature: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option()] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Draw the same seeds with several samplers; write a sheet, tables and a plot."""
    from ..api import load
    from ..comparison import compare as run
    from ..errors import InputError, optional
    from ..files import check_out

    with optional("plot", "the plot of arvision compare"):  # said before the work, not after it
        import matplotlib  # noqa: F401
    check_out(out, is_folder=True)
    specs = [spec for spec in samplers.split(",") if spec.strip()]
    pipe = load(model)
    num_images = num_images or (4 if prompt else 1)
    prompt = prompt or list(pipe.config["class_names"] or [])
    if not prompt:
        raise InputError(f"model {model!r} has no classes: expected at least one --prompt")
    total = -(-len(prompt) * num_images // max(1, batch_size)) * len(specs)
    with _bar(total, "compare", quiet) as bar:
        result = run(
            pipe,
            prompt,
            specs,
            num_images=num_images,
            seed=seed,
            batch_size=batch_size,
            model_name=model,
            on_batch=lambda _: bar.update(1),
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
    written = result.write(out)
    tell(result.json() if as_json else result.text())
    for path in written:
        tell(f"wrote {path}", err=True)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the sheets.", callback=expanded)] = Path(
        "out"
    ),
    samplers: Annotated[str, typer.Option(help="As in compare.")] = "ar,sjd",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Draw one sheet per embedded model, AR above SJD for the same seeds."""
    from ..api import load
    from ..catalog import list_models
    from ..comparison import compare as run
    from ..files import check_out, replacing

    check_out(out, is_folder=True)
    specs = samplers.split(",")
    for name in list_models():
        prompts = DEMO_PROMPTS.get(name)
        if prompts is None:
            continue
        with _bar(len(prompts) * len(specs), name, quiet) as bar:
            result = run(
                load(name),
                prompts,
                specs,
                num_images=1,
                model_name=name,
                on_batch=lambda _, bar=bar: bar.update(1),
            )
        names = load(name).config["class_names"]
        if names:
            result.prompts = [names[int(prompt)] for prompt in result.prompts]
        sheet = out / f"{name}.png"
        with replacing(sheet) as path:
            result.sheet().save(path)
        tell(f"\n{name} -> {sheet}\n{result.text()}")
