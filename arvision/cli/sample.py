"""`arvision sample`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import expanded, tell

EPILOG = """Examples:

arvision sample --model llamagen-fashion --prompt sneaker --out sneaker.png

arvision sample --model llamagen-fashion-t2i --prompt "a dark ankle boot" --num-images 4 --out boots.png

arvision sample --model llamagen-fashion-dd --prompt boot --steps 1 --out boot.png

arvision sample --model ./infinity-2b --prompt "a red fox" --negative "blurry" --guidance-scale 3

arvision sample --model llamagen-fashion --prompt bag --num-images 3 --guidance-scale 1 --guidance-scale 2 --guidance-scale 4 --out bags.png

arvision sample --model zai-org/GLM-Image --prompt "make it night" --image day.png --out night.png

arvision sample --model llamagen-fashion --prompt bag --image sneaker.png --mask mask.png --out edited.png

arvision sample --model llamagen-fashion-t2i --prompt "a dress" --preview now.png --preview-every 4 --out dress.png

arvision sample --model llamagen-fashion --prompt 7 --sampler sjd --window 32 --coupling maximal --json
"""


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("sample", epilog=EPILOG)(sample)


def parse_seed(text: str) -> Any:
    """ "3" to 3, and "3:5" to image 5 of seed 3 alone."""
    from ..errors import InputError

    parts = text.split(":")
    if len(parts) > 2 or not all(part.isdecimal() and len(part) <= 20 for part in parts):
        raise InputError(f"seed {text!r}: expected a number, or seed:image such as 0:3")
    numbers = tuple(int(part) for part in parts)
    return numbers[0] if len(numbers) == 1 else [numbers]


def weights_of(texts: list[str] | None) -> Any:
    """["3"] to 3.0, ["1,2"] to [1.0, 2.0], and ["2", "4"] to [[2.0], [4.0]], one for each image."""
    from ..inputs import parse_schedule

    found = [parse_schedule("guidance-scale", text) for text in texts or ()]
    if len(found) < 2:
        return found[0] if found else None
    return [one if isinstance(one, list) else [one] for one in found]


def shares_of(text: str | None) -> Any:
    """ "0,0.5" to [0.0, 0.5]; names stay."""
    from ..inputs import parse_schedule

    return text if text is None or "," not in text else parse_schedule("guidance-schedule", text)


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """["window=32"] to {"window": 32}."""
    from ..errors import InputError
    from ..samplers.base import parse_value

    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InputError(f"option {pair!r}: expected name=value")
        options[key] = parse_value(value)
    return options


def refuse_unused(given: dict[str, Any], when: str) -> None:
    """Refuse options that were given (are not None) and change nothing here."""
    from ..errors import InputError

    unused = [name for name, value in given.items() if value is not None]
    if unused:
        raise InputError(f"{unused[0]} {when}: it would have no effect")


def load_picture(path: Path, mode: str = "RGB") -> Any:
    """A picture from a file, as RGB or grey ("L")."""
    from PIL import Image, UnidentifiedImageError

    from ..errors import InputError
    from ..files import user_path

    path = user_path(path)
    try:
        with Image.open(path) as picture:
            return picture.convert(mode)
    except OSError as error:
        is_unknown = isinstance(error, UnidentifiedImageError)
        why = "no format we know" if is_unknown else error.strerror or error
        raise InputError(f"{path}: expected a picture ({why})") from error


def shows(out: Path) -> Any:
    """A callback that writes previews to `out`, each in the place of the one before."""
    from ..files import replacing
    from ..sheet import contact_sheet, enlarge

    def show(pipe: Any, step: int, timestep: int, given: dict[str, Any]) -> None:
        if "preview" in given:
            with replacing(out) as path:
                enlarge(contact_sheet(given["preview"])).save(path)

    return show


def of_model(
    model: str, device: str | None, dtype: str | None, images: list[Any], mask: Any
) -> tuple[list[Any], Any]:
    """Pictures that this command has enlarged when it wrote them, of the model's own size again."""
    from ..folders import parse_device, parse_dtype
    from ..opening import open_cached
    from ..sheet import without_enlargement

    place = parse_device(device)
    pipe = open_cached(model, str(place), parse_dtype(dtype, place))
    height, width = getattr(pipe.model, "picture_size", (0, 0))
    if not width:
        return images, mask
    size = (width, height)
    images = [without_enlargement(each, size) for each in images]
    return images, None if mask is None else without_enlargement(mask, size)


def sample(
    model: Annotated[str, typer.Option(help="Embedded name, folder or hub id.")],
    prompt: Annotated[list[str], typer.Option(help="Class id, class name or caption; repeatable.")],
    sampler: Annotated[
        str | None, typer.Option(help="See `arvision samplers`; by default what suits the model.")
    ] = None,
    num_images: Annotated[int, typer.Option(help="Images of each prompt.")] = 1,
    seed: Annotated[str, typer.Option(help="Seed, or seed:image for one image of a run.")] = "0",
    out: Annotated[
        Path | None, typer.Option(help="Picture to write (PNG).", callback=expanded)
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What to lead away from (text).")] = None,
    guidance_scale: Annotated[
        list[str] | None,
        typer.Option(
            help="Weight of the prompt, or one for each scale: 1,2,3; repeated: one for each image."
        ),
    ] = None,
    guidance_schedule: Annotated[
        str | None,
        typer.Option(help="constant, linear, falling, cosine, or shares of the image as in 0,0.5."),
    ] = None,
    temperature: Annotated[
        str | None, typer.Option(help="0 is greedy; or one for each scale: 1,0.5,0.5.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Tokens kept, 0 for all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Mass kept, 1 for all.")] = None,
    window: Annotated[str | None, typer.Option(help="Tokens per pass, or auto (sjd).")] = None,
    coupling: Annotated[str | None, typer.Option(help="gumbel, maximal, independent.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, where a model draws sizes.")] = None,
    width: Annotated[int | None, typer.Option(help="Likewise.")] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            help="Picture to edit, with --mask or --known-scales; repeatable (GLM-Image)."
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            help="Picture of what is redrawn (white) and kept (black).", callback=expanded
        ),
    ] = None,
    known_scales: Annotated[
        int | None, typer.Option(help="Coarse scales of --image that are kept (var, infinity).")
    ] = None,
    blend: Annotated[
        bool, typer.Option("--blend", help="Paste what is redrawn into --image.")
    ] = False,
    preview: Annotated[
        Path | None,
        typer.Option(
            help="Picture of what is drawn so far, written again and again (PNG).",
            callback=expanded,
        ),
    ] = None,
    preview_every: Annotated[
        int | None, typer.Option(help="Passes between two previews; 8 unless given.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Passes of a student (dd).")] = None,
    option: Annotated[list[str] | None, typer.Option(help="Sampler option name=value.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the statistics as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Draw pictures from a prompt."""
    from .. import Prompt, api
    from ..errors import InputError
    from ..files import check_out, replacing
    from ..inputs import parse_schedule
    from ..samplers.base import parse_value
    from ..sheet import PICTURES, contact_sheet, enlarge

    if out is not None:
        check_out(out, suffixes=PICTURES)
    options = parse_options(option or [])
    own = {
        "window": None if window is None else parse_value(window),
        "coupling": coupling,
        "steps": steps,
    }
    for name, value in own.items():
        if value is not None and name in options:
            raise InputError(f"--{name} and --option {name}=...: expected one of them")
    options |= {name: value for name, value in own.items() if value is not None}
    if parse_schedule("temperature", temperature) == 0:
        refuse_unused({"--top-k": top_k, "--top-p": top_p}, "at --temperature 0")
    prompts = prompt if negative is None else [Prompt(text, negative) for text in prompt]
    images = [load_picture(path) for path in image or []]
    grey = None if mask is None else load_picture(mask, "L")
    if grey is not None or known_scales is not None:
        images, grey = of_model(model, device, dtype, images, grey)
    shown: dict[str, Any] = {}
    if preview is not None:
        check_out(preview, suffixes=PICTURES)
        shown = {
            "preview_every": 8 if preview_every is None else preview_every,
            "callback_on_step_end": shows(preview),
        }
    elif preview_every is not None:
        raise InputError("--preview-every without --preview: expected the picture to write")
    result = api.sample(
        model,
        prompts if len(prompts) > 1 else prompts[0],
        sampler,
        num_images=num_images,
        seed=parse_seed(seed),
        guidance_scale=weights_of(guidance_scale),
        guidance_schedule=shares_of(guidance_schedule),
        temperature=parse_schedule("temperature", temperature),
        top_k=top_k,
        top_p=top_p,
        device=device,
        dtype=dtype,
        progress=not quiet,
        height=height,
        width=width,
        image=images or None,
        mask_image=grey,
        known_scales=known_scales,
        blend=blend,
        **shown,
        **options,
    )
    if out is not None:
        sheet = contact_sheet(result.images)
        with replacing(out) as path:
            (enlarge(sheet) if len(result.images) == 1 else sheet).save(path)
    stats = {
        name: value
        for name, value in result.stats.items()
        if name not in ("commit_pass", "seeds") or as_json
    }
    if as_json:
        tell(json.dumps(stats | {"out": None if out is None else str(out)}))
        return
    images = len(result.images)
    tell(
        f"{images} image{'s' if images > 1 else ''}, {stats['tokens']} tokens each: "
        f"{stats['forward_passes']} passes, {stats['tokens_per_pass']:.2f} tokens per pass, "
        f"{stats['seconds']:.2f} s" + (f" -> {out}" if out is not None else "")
    )
