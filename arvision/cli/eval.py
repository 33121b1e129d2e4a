"""`arvision eval`: generate, score, compare and report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..files import check_out
from . import eval_demo
from .fashion import FashionFolder
from .output import expanded, tell

app = typer.Typer(
    help="Evaluation: generate samples, score them, test equivalence, write reports.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
ExtractorName = Annotated[str, typer.Option(help="See `arvision eval extractors`.")]
Weights = Annotated[str | None, typer.Option(help="Local weights of the extractor.")]
Download = Annotated[bool, typer.Option("--download", help="Let the extractor fetch weights.")]
Size = Annotated[int | None, typer.Option(help="Input side of lite0, such as 64.")]
Batch = Annotated[int, typer.Option(help="Images per forward pass of the extractor.")]

GENERATE_EPILOG = """Examples:

arvision eval generate --model llamagen-fashion --protocol fashion --num 2000 --out samples/ar --sampler ar

arvision eval generate --model ./llamagen-xl --sampler sjd --protocol adm-in256 --pixels llamagen --out xl

torchrun --nproc-per-node 8 -m arvision.cli eval generate --model ./var-d16 --protocol adm-in256 --out var

Run a command again to resume it, with any batch size and any number of processes. Behind torchrun
write --num-images for --num, which torchrun takes for its own --numa-binding.
"""


def _extractor(name: str, weights: str | None, download: bool, size: int | None) -> Any:
    """The extractor with the options that were given."""
    from ..eval import get_extractor
    from ..eval.distributed import local_device

    options: dict[str, Any] = {}
    if weights is not None:
        options["weights"] = weights
    if download:
        options["download"] = True
    if size is not None:
        options["size"] = size
    return get_extractor(name, device=local_device(), **options)


def _print_scores(scores: dict[str, Any], as_json: bool, **facts: Any) -> None:
    if as_json:
        found = {name: score.to_dict() for name, score in scores.items()}
        tell(json.dumps({"scores": found, **facts}))
        return
    width = max((len(name) for name in scores), default=0)
    for name, score in scores.items():
        tell(f"{name:<{width}}  {score}")


def _options(pairs: list[str]) -> dict[str, Any]:
    from .sample import parse_options

    return parse_options(pairs)


@app.command(epilog=GENERATE_EPILOG)
def generate(
    model: Annotated[str, typer.Option(help="Embedded name, folder or hub id.")],
    out: Annotated[
        Path, typer.Option(help="Folder of the samples; resumed if it is there.", callback=expanded)
    ],
    sampler: Annotated[str, typer.Option(help="See `arvision samplers`.")] = "ar",
    protocol: Annotated[
        str, typer.Option(help="adm-in256, coco-30k, fashion, free.")
    ] = "adm-in256",
    num: Annotated[
        int | None,
        typer.Option("--num", "--num-images", help="Images; the protocol's number if left."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Image k has the identity (seed, k).")] = 0,
    pixels: Annotated[str, typer.Option(help="plain, llamagen, var, mar, to256.")] = "plain",
    prompts: Annotated[
        Path | None,
        typer.Option(help="Captions: text, CSV, TSV, JSON lines or JSON.", callback=expanded),
    ] = None,
    per_prompt: Annotated[int, typer.Option(help="Images of each caption.")] = 1,
    num_classes: Annotated[int | None, typer.Option(help="Instead of the protocol's.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images drawn at once.")] = 32,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...; recorded.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="name=value; repeatable.")] = None,
    write: Annotated[str | None, typer.Option(help="Also write npz, png or tar.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw the samples of a protocol into OUT, resumable and the same for any number of GPUs."""
    from ..errors import unknown_name
    from ..eval.distributed import processes
    from ..eval.generate import run_facts
    from ..eval.sources import ShardSource
    from ..eval.writers import write_npz, write_pictures, write_tar
    from ..evaluation import draw_samples

    writers = {"npz": write_npz, "png": write_pictures, "tar": write_tar}
    if write is not None and write not in writers:
        raise unknown_name("sample format", write, writers)
    check_out(out, is_folder=True)
    with processes() as rank:
        shards = draw_samples(
            model,
            out,
            sampler,
            protocol=protocol,
            num=num,
            num_classes=num_classes,
            seed=seed,
            pixels=pixels,
            prompts=prompts,
            per_prompt=per_prompt,
            batch_size=batch_size,
            dtype=dtype,
            options=_options(option or []),
            progress=not quiet,
        )
        if rank == 0:
            facts = run_facts(shards)
            if write is not None:
                path = out / "samples" if write == "png" else out / f"samples.{write}"
                if not path.exists():  # else it is from an earlier start of the same run
                    writers[write](ShardSource(out), path)
                facts["written"] = str(path)
            tell(json.dumps(facts) if as_json else f"{facts['images']} images -> {out}")


FID_EPILOG = """Examples:

arvision eval fid --samples xl --reference VIRTUAL_imagenet256_labeled.npz --weights weights-inception-2015-12-05-6726825d.pth

arvision eval fid --samples samples/ar --reference fashion-test --extractor lite0 --size 64

Samples and reference: an .npz (arr_0), .npy, .zip or .tar, a folder of pictures, or a folder of
`arvision eval generate`. The reference may also be statistics (mu, sigma), or fashion-test for the
Fashion-MNIST test images.
"""


@app.command(epilog=FID_EPILOG)
def fid(
    samples: Annotated[str, typer.Option(help="Samples: npz, npy, zip, tar, folder or run.")],
    reference: Annotated[str, typer.Option(help="The same, statistics, or fashion-test.")],
    extractor: ExtractorName = "inception-adm",
    weights: Weights = None,
    download: Download = False,
    size: Size = None,
    metrics: Annotated[str | None, typer.Option(help="Comma-separated; see the guide.")] = None,
    batch_size: Batch = 50,
    crop: Annotated[int | None, typer.Option(help="Crop the reference's pictures (COCO).")] = None,
    allow_jpeg: Annotated[bool, typer.Option("--allow-jpeg", help="Score lossy samples.")] = False,
    allow_sorted: Annotated[
        bool, typer.Option("--allow-sorted", help="IS of sorted files.")
    ] = False,
    fashion_mnist: FashionFolder = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """FID, sFID, IS, precision, recall and more of samples against a reference."""
    from ..eval.distributed import processes
    from ..eval.evaluate import evaluate
    from ..eval.sources import open_source
    from ..evaluation import open_reference

    with processes() as rank:
        source, goal = open_source(samples, allow_jpeg=allow_jpeg), open_reference(reference)
        network = _extractor(extractor, weights, download, size)
        scores = evaluate(
            source,
            goal,
            network,
            metrics=metrics,
            batch_size=batch_size,
            allow_jpeg=allow_jpeg,
            allow_sorted=allow_sorted,
            crop=crop,
            progress=not quiet,
        )
        if rank == 0 and scores is not None:
            _print_scores(scores, as_json, extractor=network.facts.to_dict())


CLIP_EPILOG = """Example:

arvision eval clip --samples coco --prompts coco30k.jsonl --weights openai/clip-vit-base-patch32 --download
"""


@app.command(epilog=CLIP_EPILOG)
def clip(
    samples: Annotated[str, typer.Option(help="Samples: npz, npy, zip, tar, folder or run.")],
    prompts: Annotated[
        Path, typer.Option(help="Captions in the samples' order.", callback=expanded)
    ],
    weights: Annotated[str, typer.Option(help="CLIP folder, or hub id with --download.")],
    download: Download = False,
    convention: Annotated[str, typer.Option(help="cosine, torchmetrics, hessel.")] = "cosine",
    prefix: Annotated[str, typer.Option(help="Put before captions.")] = "A photo depicts ",
    per_prompt: Annotated[int, typer.Option(help="Images of each caption.")] = 1,
    batch_size: Batch = 50,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """CLIP score of samples and their captions."""
    from ..eval.clip import clip_score
    from ..eval.sources import open_source
    from ..evaluation import read_captions

    source = open_source(samples)
    captions, _ = read_captions(prompts, per_prompt)
    score = clip_score(
        source,
        captions or [],
        _extractor("clip", weights, download, None),
        convention=convention,
        prefix=prefix,
        batch_size=batch_size,
        progress=not quiet,
    )
    _print_scores({"clip": score}, as_json)


REPORT_EPILOG = """Example:

arvision eval report --samples samples/ar --reference fashion-test --extractor lite0 --size 64 --out reports/ar
"""


@app.command(epilog=REPORT_EPILOG)
def report(
    samples: Annotated[str, typer.Option(help="Samples: npz, npy, zip, tar, folder or run.")],
    reference: Annotated[str, typer.Option(help="The same, statistics, or fashion-test.")],
    out: Annotated[
        Path, typer.Option(help="Folder for report.json and report.md.", callback=expanded)
    ],
    extractor: ExtractorName = "inception-adm",
    weights: Weights = None,
    download: Download = False,
    size: Size = None,
    metrics: Annotated[str | None, typer.Option(help="Comma-separated; see the guide.")] = None,
    batch_size: Batch = 50,
    crop: Annotated[int | None, typer.Option(help="Crop the reference's pictures (COCO).")] = None,
    allow_jpeg: Annotated[bool, typer.Option("--allow-jpeg", help="Score lossy samples.")] = False,
    allow_sorted: Annotated[
        bool, typer.Option("--allow-sorted", help="IS of sorted files.")
    ] = False,
    fashion_mnist: FashionFolder = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score samples and write one JSON and one Markdown report."""
    from ..eval.distributed import processes
    from ..eval.report import to_markdown
    from ..eval.sources import open_source
    from ..evaluation import open_reference
    from ..evaluation import report as run

    check_out(out, is_folder=True)
    with processes() as rank:
        source, goal = open_source(samples, allow_jpeg=allow_jpeg), open_reference(reference)
        found = run(
            source,
            goal,
            _extractor(extractor, weights, download, size),
            out,
            metrics=metrics,
            batch_size=batch_size,
            allow_jpeg=allow_jpeg,
            allow_sorted=allow_sorted,
            crop=crop,
            progress=not quiet,
        )
        if rank == 0:
            tell(json.dumps(found) if as_json else to_markdown(found))


EQUIVALENCE_EPILOG = """Example:

arvision eval equivalence --a samples/ar --b samples/sjd --model llamagen-fashion --reference fashion-test --size 64
"""


@app.command(epilog=EQUIVALENCE_EPILOG)
def equivalence(
    a: Annotated[Path, typer.Option(help="Run of the baseline.", callback=expanded)],
    b: Annotated[Path, typer.Option(help="Run of the accelerated sampler.", callback=expanded)],
    model: Annotated[str | None, typer.Option(help="Base model for the likelihood test.")] = None,
    reference: Annotated[str | None, typer.Option(help="For the Frechet equivalence.")] = None,
    extractor: ExtractorName = "lite0",
    weights: Weights = None,
    download: Download = False,
    size: Size = None,
    margin: Annotated[float, typer.Option(help="Relative gap of distances allowed.")] = 0.013,
    fashion_mnist: FashionFolder = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Is the sampler of run B equal to that of run A? Exit status 0 whatever the answer."""
    from ..eval.compare_runs import compare_runs
    from ..eval.sources import ShardSource
    from ..evaluation import likelihood, open_reference

    runs = ShardSource(a), ShardSource(b)
    goal = None if reference is None else open_reference(reference)
    network = _extractor(extractor, weights, download, size)
    log_likelihood = None if model is None else likelihood(model, a)
    results, sentence = compare_runs(
        *runs,
        network,
        log_likelihood=log_likelihood,
        reference=goal,
        margin=margin,
        progress=not quiet,
    )
    if as_json:
        tell(json.dumps({"verdict": sentence, "tests": [r.to_dict() for r in results]}))
        return
    for result in results:
        p_value = "" if result.p_value is None else f" p={result.p_value:.3g}"
        tell(f"{'ok  ' if result.passed else 'FAIL'} {result.name}:{p_value} {result.meaning}")
    tell(sentence)


COCO_EPILOG = """Example:

arvision eval coco --annotations captions_val2014.json --out coco30k.jsonl
"""


@app.command(epilog=COCO_EPILOG)
def coco(
    annotations: Annotated[Path, typer.Option(help="captions_val2014.json", callback=expanded)],
    out: Annotated[Path, typer.Option(help="JSON lines of prompts to write.", callback=expanded)],
    num: Annotated[int, typer.Option(help="Captions, one per image.")] = 30_000,
    seed: Annotated[int, typer.Option(help="Of the choice.")] = 0,
    as_json: Json = False,
) -> None:
    """Choose the captions of the COCO-30k protocol: one per image."""
    from ..eval.coco import choose_captions, write_captions

    check_out(out, suffixes=(".jsonl",))
    records = choose_captions(annotations, num, seed)
    write_captions(records, out)
    facts = {"captions": len(records), "out": str(out)}
    tell(json.dumps(facts) if as_json else f"{len(records)} captions -> {out}")


EXPORT_EPILOG = """Examples:

arvision eval export --samples run --layout npz --out samples.npz

arvision eval export --samples run --layout geneval --prompts evaluation_metadata.jsonl --per-prompt 4 --out geneval

Layouts: npz (ADM), png, tar, geneval, hpsv2, dpg-bench.
"""


@app.command(epilog=EXPORT_EPILOG)
def export(
    samples: Annotated[str, typer.Option(help="Samples: npz, npy, zip, tar, folder or run.")],
    layout: Annotated[str, typer.Option(help="npz, png, tar, geneval, hpsv2, dpg-bench.")],
    out: Annotated[Path, typer.Option(help="New file or folder.", callback=expanded)],
    prompts: Annotated[
        Path | None, typer.Option(help="For the benchmark layouts.", callback=expanded)
    ] = None,
    per_prompt: Annotated[int, typer.Option(help="Images of each prompt.")] = 1,
    as_json: Json = False,
) -> None:
    """Write samples as an ADM npz, pictures, a tar file, or as a benchmark wants them."""
    from ..errors import InputError, unknown_name
    from ..eval.sources import open_source
    from ..eval.writers import (
        LAYOUTS,
        export_layout,
        write_npz,
        write_pictures,
        write_tar,
    )
    from ..prompt_files import read_prompts

    plain = {"npz": write_npz, "png": write_pictures, "tar": write_tar}
    if layout not in (*plain, *LAYOUTS):
        raise unknown_name("layout", layout, (*plain, *LAYOUTS))
    if layout in plain and (prompts is not None or per_prompt != 1):
        unused = "--per-prompt" if prompts is None else "--prompts"
        raise InputError(
            f"{unused} with layout {layout}: expected a benchmark's ({', '.join(LAYOUTS)})"
        )
    if out.is_file():
        raise InputError(f"{out} exists: expected a new file or folder")
    suffixes = [f".{layout}"] if layout in ("npz", "tar") else []
    check_out(out, suffixes=suffixes, is_folder=not suffixes)
    source = open_source(samples)
    if layout in plain:
        written = plain[layout](source, out)
    elif prompts is None:
        raise InputError(f"layout {layout} needs prompts: give --prompts FILE")
    else:
        written = export_layout(layout, source, read_prompts(prompts), out, per_prompt)
    facts = {"images": len(source), "out": str(written)}
    tell(json.dumps(facts) if as_json else f"{len(source)} images -> {written}")


@app.command()
def repair(
    samples: Annotated[
        Path, typer.Option(help="Folder of `arvision eval generate`.", callback=expanded)
    ],
    as_json: Json = False,
) -> None:
    """Forget the blocks of a run whose files are missing or damaged; generate makes them again."""
    from ..eval.shards import ShardFolder

    blocks = ShardFolder(samples).repair()
    found = ", ".join(map(str, blocks)) or "none"
    tell(json.dumps({"forgotten": blocks}) if as_json else f"blocks forgotten: {found}")


@app.command()
def extractors(as_json: Json = False) -> None:
    """List the feature extractors."""
    from ..eval import EXTRACTORS

    found = {e.name: (e.value.__doc__ or "").strip().splitlines()[0] for e in EXTRACTORS}
    if as_json:
        tell(json.dumps(found))
        return
    for name, line in sorted(found.items()):
        tell(f"{name:<20} {line}")


app.command(epilog=eval_demo.EPILOG)(eval_demo.demo)
