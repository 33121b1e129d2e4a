"""What is there to know of an NVIDIA GPU: are the kernels right on it, and how near is a pass to its memory?

Checks the kernels natively, checks that captured loops draw the eager loop's tokens, and measures models of
published sizes with random weights (time does not depend on their values). Each part runs in a process of
its own and leaves a JSON; a second run goes on with the parts that are missing.

    python -m benchmarks.gpu                 # in under eight minutes
    python -m benchmarks.gpu --tiny          # the same code on small sizes, on any machine
    python -m benchmarks.gpu --parts kernels,llamagen-xl --again
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from arvision import generate, get_sampler
from arvision.bench import bandwidth
from arvision.decoding.fixed_step import Steps
from arvision.files import write_text
from arvision.kernels import dispatch
from arvision.models import (
    MAR,
    VAR,
    LlamaGen,
    LlamaGenStudent,
    LlamaGenTokenizer,
    LlamaGenTransformer,
    MARTransformer,
    VARStudent,
    VARTokenizer,
    VARTransformer,
)
from arvision.models.llamagen.student import LlamaGenStudentTransformer
from arvision.models.var.student import VARStudentTransformer
from arvision.testing import tiny_llamagen

from . import kernels
from .common import RESULTS, environment

ROOT = Path(__file__).parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
MODE = "auto" if DEVICE.type == "cuda" else "eager"
"""Of a fixed step: captured where there is a GPU."""

LLAMAGEN = {
    "llamagen-b": {"hidden_size": 768, "num_layers": 12, "num_heads": 12},
    "llamagen-xl": {"hidden_size": 1280, "num_layers": 36, "num_heads": 20},
    "llamagen-3b": {"hidden_size": 3200, "num_layers": 24, "num_heads": 32},
}
VARS = {"var-d16": 16, "var-d30": 30}
MARS = {
    "mar-b": {"hidden_size": 768, "depth": 12, "num_heads": 12, "head": (1024, 6)},
    "mar-l": {"hidden_size": 1024, "depth": 16, "num_heads": 16, "head": (1280, 8)},
}


def seconds_of(task: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of a task that is warmed up once; what `stats.warm_up` tells is taken off."""
    times = []
    for _ in range(rounds + 1):
        _wait()
        started = time.perf_counter()
        out = task()
        _wait()
        stats = getattr(out, "stats", {})
        times.append(time.perf_counter() - started - (stats.get("warm_up") or 0.0))
    return times[1:]


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def bytes_of(network: nn.Module) -> int:
    """Bytes of all weights but looked-up tables."""
    tables = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
    weights = [p for p in network.parameters() if id(p) not in tables]
    return sum(weight.numel() * weight.element_size() for weight in weights)


def built(make: Callable[[], nn.Module]) -> Any:
    """A network with random weights of the default initialisation, made where it runs."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return nn.Module.to(make().eval(), DTYPE)


def check_kernels(tiny: bool) -> dict[str, Any]:
    """The tests of the kernels on the device (tiny: some of them, by Triton's interpreter)."""
    folder = ROOT / "tests" / "kernels"
    if DEVICE.type == "cuda":
        wanted, env = ["-m", "gpu", str(folder)], {}
    else:
        files = ("test_triton_compaction.py",) if tiny else sorted(folder.glob("test_triton_*"))
        wanted, env = [str(folder / str(file)) for file in files], {"TRITON_INTERPRET": "1"}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", *wanted],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **env},
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    return {
        "passed": done.returncode == 0,
        "summary": lines[-1] if lines else done.stderr[-400:],
        "failure": "" if done.returncode == 0 else done.stdout[-3000:],
        "seconds": time.perf_counter() - started,
    }


def time_kernels(tiny: bool) -> dict[str, Any]:
    """Microseconds of each operation, see `benchmarks.kernels`."""
    benches = kernels.BENCHES
    chosen = ("verify 32 x 16384",) if tiny else benches
    return {name: benches[name]() for name in chosen}


def check_loops(tiny: bool) -> dict[str, Any]:
    """Tokens of captured loops, of eager ones and of the references, for couplings and windows."""
    model = tiny_llamagen(grid=(3, 3) if tiny else (8, 8)).to(DEVICE)
    specs = ["ar", "sjd:window=4", "sjd:window=4:coupling=maximal"]
    if not tiny:
        specs += ["sjd:window=16", "sjd:window=32:coupling=independent", "sjd:window=32:tree=drift"]
    told: dict[str, Any] = {}
    for spec in specs:
        sampler = get_sampler(spec)
        draw = partial(sampler, model, [0, 1, 2], seeds=[1, 2, 3], guidance_scale=2.0)
        loop = draw()
        with dispatch.taking("reference"):
            told[f"{spec}: kernels and references"] = _alike(loop.tokens, draw().tokens)
        if "tree" not in spec:
            captured = draw(steps=Steps(MODE))
            told[f"{spec}: {captured.stats['step']} and loop"] = _alike(
                loop.tokens, captured.tokens
            )
            often = draw(steps=Steps(MODE, reads_every=4))
            told[f"{spec}: every fourth pass read"] = _alike(loop.tokens, often.tokens)
    return told


def _alike(ours: torch.Tensor, other: torch.Tensor) -> float:
    """Share of equal tokens: 1 but for ties of rounding."""
    return float((ours == other).double().mean())


def measure_llamagen(name: str, tiny: bool) -> dict[str, Any]:
    """Milliseconds of a pass of 1 and of 32 candidates, as a loop and as fixed steps, at guidance 4."""
    sizes: dict[str, Any] = dict(LLAMAGEN[name]) | {"grid": (24, 24)}
    if tiny:
        sizes |= {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "grid": (5, 5)}
        sizes |= {"vocab_size": 64, "num_classes": 3}
    network = built(lambda: LlamaGenTransformer(**sizes))
    model = LlamaGen(network, None)
    passes, size, told = (6 if tiny else 48), bytes_of(network), {}
    for window in (1, 32):
        spec = "ar" if window == 1 else f"sjd:window={min(window, passes if tiny else window)}"
        for step in (None, MODE):
            sampler = get_sampler(spec)
            draw = partial(
                sampler,
                model,
                [1],
                seeds=[0],
                guidance_scale=4.0,
                on_step=lambda number, _: number >= passes,
                steps=None if step is None else Steps(step),
            )
            times = [each / passes for each in seconds_of(draw, 3)]
            told[f"window {window}, {step or 'loop'}"] = _row(times, size)
    return {"bytes": size, "peak_memory": _peak(), "passes": told}


def measure_var(name: str, tiny: bool) -> dict[str, Any]:
    """Milliseconds of an image of ten scales, tokens alone, at guidance 4."""
    depth = 2 if tiny else VARS[name]
    sizes: dict[str, Any] = {"hidden_size": 64 * depth, "num_layers": depth, "num_heads": depth}
    drawn: dict[str, Any] = {"ch": 32, "ch_mult": (1, 1), "num_res_blocks": 1} if tiny else {}
    shape: dict[str, Any] = {"patch_nums": (1, 2, 3), "codebook_size": 64} if tiny else {}
    network = built(lambda: VARTransformer(**sizes, **shape))
    model = VAR(network, built(lambda: VARTokenizer(**drawn, **shape)))
    draw = partial(get_sampler("ar"), model, [1], seeds=[0], guidance_scale=4.0)
    times, size = seconds_of(draw, 3), bytes_of(network)
    return {"bytes": size, "peak_memory": _peak(), "image": _row(times, size * len(model.scales))}


def measure_mar(name: str, tiny: bool) -> dict[str, Any]:
    """Milliseconds of an image of 16 passes and 25 denoising steps each, at guidance 3."""
    wanted: dict[str, Any] = MARS[name]
    width, depth = wanted["head"]
    sizes: dict[str, Any] = {"head_width": width, "head_depth": depth} | {
        "hidden_size": wanted["hidden_size"],
        "encoder_depth": wanted["depth"],
        "decoder_depth": wanted["depth"],
        "num_heads": wanted["num_heads"],
    }
    if tiny:
        sizes = {"hidden_size": 32, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 4}
        sizes |= {"head_width": 32, "head_depth": 1, "grid": (3, 3), "num_buffer": 2}
    steps, passes = (3, 3) if tiny else (25, 16)
    network = built(lambda: MARTransformer(**sizes, num_sampling_steps=steps))
    sampler = get_sampler(f"ar:num_iter={passes}")
    draw = partial(sampler, MAR(network), [1], seeds=[0], guidance_scale=3.0)
    head = bytes_of(network.diffloss)
    times, size = seconds_of(draw, 3), bytes_of(network)
    read = passes * (size - head + steps * head)
    return {"bytes": size, "peak_memory": _peak(), "image": _row(times, read)}


def measure_students(tiny: bool) -> dict[str, Any]:
    """Milliseconds of an image of students of one and more passes, of the size of LlamaGen-B and VAR-d16."""
    sizes: dict[str, Any] = {"hidden_size": 32, "num_layers": 2, "num_heads": 4} if tiny else {}
    grid: dict[str, Any] = {"grid": (4, 4), "vocab_size": 64, "timesteps": (0, 8)} if tiny else {}
    paint: dict[str, Any] = {"ch": 32, "ch_mult": (1, 1, 1), "num_res_blocks": 1}
    small: dict[str, Any] = paint | {"z_channels": 32, "codebook_size": 64} if tiny else {}
    scales: dict[str, Any] = {"patch_nums": (1, 2, 3), "codebook_size": 64} if tiny else {}
    known: dict[str, Any] = {"timesteps": (0, 1)} if tiny else {}
    drawn: dict[str, Any] = paint | {"ch_mult": (1, 1)} if tiny else {}
    students: dict[str, Any] = {
        "llamagen-b": LlamaGenStudent(
            built(lambda: LlamaGenStudentTransformer(**sizes, **grid)),
            built(lambda: LlamaGenTokenizer(**small)),
        ),
        "var-d16": VARStudent(
            built(lambda: VARStudentTransformer(**sizes, **scales, **known)),
            built(lambda: VARTokenizer(**drawn, **scales)),
        ),
    }
    told: dict[str, Any] = {}
    for name, model in students.items():
        sampler = get_sampler("dd")
        draw = partial(sampler, model, [1], seeds=[0])
        passes = draw().stats["forward_passes"]
        times, size = seconds_of(draw, 3), bytes_of(model.transformer)
        told[f"{name}, {passes} passes"] = _row(times, size * passes)
    return {"peak_memory": _peak(), "image": told}


def measure_text(tiny: bool) -> dict[str, Any]:
    """Milliseconds of a pass of a language model of 1.7 billion weights (SmolLM2's sizes)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
    sizes |= {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 49152}
    if tiny:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    config = LlamaConfig(**sizes, max_position_embeddings=2048, eos_token_id=None)  # pyright: ignore
    network, new = built(lambda: LlamaForCausalLM(config)), 8 if tiny else 64
    prompt = list(range(3, 40))
    # The output layer is a matrix, however the input is looked up.
    size = bytes_of(network)
    told: dict[str, Any] = {}
    for drafter in (None, "token_recycling"):
        draw = partial(generate, network, [prompt], drafter=drafter, max_new_tokens=new)
        passes = draw().stats["forward_passes"]
        times = [each / passes for each in seconds_of(draw, 3)]
        told[drafter or "one token a pass"] = _row(times, size) | {"passes": passes}
    return {"bytes": size, "peak_memory": _peak(), "passes": told}


def _row(times: list[float], size: int) -> dict[str, Any]:
    """Milliseconds, and the share of the time that reading `size` bytes takes at the measured bandwidth."""
    median = statistics.median(times)
    share = size / _bandwidth() / median
    return {
        "ms": 1e3 * median,
        "all_ms": [1e3 * each for each in times],
        "share_of_bandwidth": share,
    }


@cache
def _bandwidth() -> float:
    return bandwidth(DEVICE)


def _peak() -> int | None:
    return torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else None


PARTS: dict[str, tuple[Callable[[bool], dict[str, Any]], int]] = {
    "kernels": (check_kernels, 240),
    "loops": (check_loops, 90),
    "llamagen-xl": (partial(measure_llamagen, "llamagen-xl"), 60),
    "llamagen-b": (partial(measure_llamagen, "llamagen-b"), 60),
    "llamagen-3b": (partial(measure_llamagen, "llamagen-3b"), 60),
    "text-1.7b": (measure_text, 60),
    "var-d16": (partial(measure_var, "var-d16"), 45),
    "var-d30": (partial(measure_var, "var-d30"), 45),
    "mar-b": (partial(measure_mar, "mar-b"), 45),
    "mar-l": (partial(measure_mar, "mar-l"), 45),
    "students": (measure_students, 45),
    "kernel-times": (time_kernels, 90),
}
"""What runs, in this order, and the seconds after which each is given up."""


def run_part(name: str, tiny: bool, out: Path) -> dict[str, Any]:
    """Run one part here and leave its JSON."""
    started = time.perf_counter()
    with torch.no_grad():
        figures = PARTS[name][0](tiny)
    here = {"tiny": tiny, "took": time.perf_counter() - started, "environment": environment()}
    record = {"part": name, **figures, **here}
    write_text(out / f"{name}.json", json.dumps(record, indent=1) + "\n")
    return record


def run_child(name: str, tiny: bool, out: Path, limit: float) -> str:
    """Run one part in a process of its own, as a fault of the GPU ends a process; what went wrong."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--only", name, "--out", str(out)]
    command += ["--tiny"] * tiny
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not done after {limit:.0f} s"
    return "" if done.returncode == 0 else done.stderr[-1500:]


def markdown(out: Path) -> str:
    """What the parts in a folder say, as tables."""
    lines = ["| part | case | ms | share of bandwidth |", "| --- | --- | --- | --- |"]
    for name in PARTS:
        path = out / f"{name}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        cases = found.get("passes") or found.get("image") or {}
        for case, row in (cases if "ms" not in cases else {"an image": cases}).items():
            lines.append(f"| {name} | {case} | {row['ms']:.2f} | {row['share_of_bandwidth']:.0%} |")
    for name in ("kernels", "loops"):
        path = out / f"{name}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        if name == "kernels" and found:
            lines += [
                "",
                f"Kernels: {'all right' if found['passed'] else 'WRONG'}, {found['summary']}",
            ]
        alike = {
            case: share for case, share in found.items() if " and " in case or "fourth" in case
        }
        lines += [
            "",
            *(f"- {case}: {share:.4f} of the tokens alike" for case, share in alike.items()),
        ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the parts that are missing, and write and print what all of them say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu")
    parser.add_argument("--tiny", action="store_true", help="small sizes, in this process")
    parser.add_argument("--parts", default=",".join(PARTS), help="by commas")
    parser.add_argument("--again", action="store_true", help="parts that are there, too")
    parser.add_argument("--minutes", type=float, default=8.0, help="no part begins later")
    parser.add_argument("--only", help="run one part in this process")
    given = parser.parse_args(arguments)
    wanted = [given.only] if given.only else given.parts.split(",")
    unknown = [name for name in wanted if name not in PARTS]
    if unknown:
        parser.error(f"part {unknown[0]!r}: expected one of {', '.join(PARTS)}")
    if given.only:
        run_part(given.only, given.tiny, given.out)
        return 0
    if DEVICE.type != "cuda" and not given.tiny:
        print("no CUDA device: this waits for one (--tiny tries the code)", file=sys.stderr)
        return 2
    started, failed = time.perf_counter(), []
    for name in wanted:
        left = 60 * given.minutes - (time.perf_counter() - started)
        if (given.out / f"{name}.json").exists() and not given.again:
            continue
        if left <= 0:
            print(f"{name}: left for another run", file=sys.stderr)
            continue
        if given.tiny:
            run_part(name, True, given.out)
        elif wrong := run_child(name, False, given.out, min(left, PARTS[name][1])):
            failed.append(name)
            print(f"{name}: {wrong}", file=sys.stderr)
        print(f"{name}: {time.perf_counter() - started:.0f} s since the start", file=sys.stderr)
    told = markdown(given.out)
    write_text(given.out / "gpu.md", told)
    print(told)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
