"""A long run: two thousand draws in flat memory, and kills at random moments with nothing lost.

The kills start processes that draw, report, compare, train, distil and export in miniature
(`runs.py`), end them with SIGKILL and SIGTERM, start them anew, and compare every byte that the
package promises with what an undisturbed run wrote.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import arvision
from arvision.files import MARK
from arvision.pipeline import ARPipeline
from arvision.testing import tiny_llamagen

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

DRAWS = 2000
THREADS = 4
SEEDS_OF_SMALL = 8
KILLS_OF_EACH = 4
"""Of six commands: 24 in all."""

MOST_BYTES = 4096
"""That may stay of a draw: less than its picture (56 x 56 x 3) or its laws would take."""

MOST_OBJECTS = 0.5
"""Python's objects likewise: fewer than one of each draw."""


def cases() -> list[tuple[str, Any]]:
    """A name and a function that draws with a seed and gives tokens, for every model and sampler."""
    found: list[tuple[str, Any]] = []
    tiny = ARPipeline.from_model(tiny_llamagen(grid=(4, 4)), guidance_scale=2.0)
    drafts = {"token": tiny, "continuous": "mar-fashion-draft", "scale": "var-fashion-small"}
    pipes = [("tiny", tiny)]
    pipes += [
        (str(name), arvision.load(str(name), device="cpu")) for name in arvision.list_models()
    ]
    for name, pipe in pipes:
        prompt = "a dark bag" if name.endswith("t2i") else 1
        for entry in arvision.list_samplers(pipe):
            options: dict[str, Any] = {}
            if entry == "draft" and name != "tiny":
                options = {"draft": "llamagen-fashion-draft"}
            elif entry in ("draft", "cspd", "code"):
                options = {"draft": drafts[pipe.kind]}
            try:
                sampler = arvision.get_sampler(str(entry), **options)
                pipe(prompt, seed=0, sampler=sampler, output_type="latent", progress=False)
            except arvision.InputError:
                continue  # gsd and lantern want a codebook, a caption model has no such draft

            def draw(seed: int, pipe: Any = pipe, prompt: Any = prompt, by: Any = sampler) -> Any:
                kind = ("pil", "np", "pt", "latent")[seed % 4]
                if pipe.tokenizer is None:
                    kind = "latent"
                return pipe(prompt, seed=seed, sampler=by, output_type=kind, progress=False).tokens

            found.append((f"{name} {entry}", draw))
    return found + text_cases() + image_network_cases()


def text_cases() -> list[tuple[str, Any]]:
    """Text with every drafter that needs no model of its own."""
    from text_models import random_prompts, tiny_llama

    network, prompts = tiny_llama(), random_prompts([7, 5])
    found = []
    for drafter in ("prompt_lookup", "token_recycling", None):

        def draw(seed: int, drafter: Any = drafter) -> Any:
            options: dict[str, Any] = {"temperature": 1.0, "seed": seed, "max_new_tokens": 9}
            return arvision.generate(network, prompts, drafter=drafter, **options).tokens

        found.append((f"text {drafter}", draw))
    return found


def image_network_cases() -> list[tuple[str, Any]]:
    """An image network of transformers, NextStep and Infinity, from the recorded checkpoints."""
    from image_networks import janus_prompts, tiny_janus
    from nextstep_models import load_calm

    from arvision.models import Janus

    janus, [ids] = Janus(tiny_janus()), janus_prompts([6])
    nextstep = ARPipeline.from_model(load_calm())

    def draw_janus(seed: int) -> Any:
        sampler = arvision.get_sampler("sjd")
        return sampler(janus, [ids], seeds=[seed], guidance_scale=2.0).tokens

    def draw_nextstep(seed: int) -> Any:
        return nextstep("a cat", seed=seed, output_type="latent", progress=False).tokens

    return [("janus sjd", draw_janus), ("nextstep ar", draw_nextstep)]


class Heap(ctypes.Structure):
    """What glibc's `mallinfo2` tells."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def held() -> int:
    """Bytes that somebody has asked for and not given back, Python's small objects aside.

    Not the size of the process: glibc keeps freed memory for each thread, by the hundred megabytes.
    """
    gc.collect()
    try:
        library = ctypes.CDLL("libc.so.6")
        library.mallinfo2.restype = Heap
    except (OSError, AttributeError):  # another C library, or glibc before 2.33
        return psutil.Process().memory_info().rss
    library.malloc_trim(0)
    heap = library.mallinfo2()
    return heap.uordblks + heap.hblkhd


def plan_of(every: list[tuple[str, Any]]) -> tuple[list[Any], list[Any]]:
    """Jobs (case, seed): each that there is once, and then `DRAWS` in all, of the same.

    Whatever fills up by the kinds of passes is full after the first turn of each; what grows after
    that is a leak.
    """
    draw = random.Random(0)
    small = [case for case in every if case[0].partition(" ")[0] in ("tiny", "text", "janus")]
    large = [case for case in every if case not in small]
    first = [(case, seed) for case in small for seed in range(SEEDS_OF_SMALL)]
    first += [(case, seed) for case in large for seed in range(2)]
    # The embedded models take most of the time: each of their samplers has one more turn.
    then = [(case, draw.randrange(2)) for case in large]
    rest = DRAWS - len(first) - len(then)
    then += [(draw.choice(small), draw.randrange(SEEDS_OF_SMALL)) for _ in range(rest)]
    draw.shuffle(first)
    draw.shuffle(then)
    return first, then


@pytest.mark.slow
def test_two_thousand_draws_in_threads_leave_memory_flat(monkeypatch):
    # oneDNN compiles a product for each number of rows and keeps it (0.3 to 0.6 MB, 540 MB in all
    # here). Windows that follow measured costs have other numbers of rows on another day, so that
    # these would come late and look like a leak: MKL, which keeps nothing, multiplies here.
    monkeypatch.setattr("arvision.kernels.linear.packed.packing_pays", lambda: False)
    first, then = plan_of(cases())
    known: dict[tuple[str, int], Any] = {}
    points: list[tuple[int, int, int]] = []

    def one(job: Any) -> tuple[tuple[str, int], Any]:
        (name, call), seed = job
        return (name, seed), call(seed)

    before = torch.get_num_threads()
    done = 0
    for jobs in (part[at : at + 50] for part in (first, then) for at in range(0, len(part), 50)):
        # Alternately all threads at once and one after the other. What libraries keep for a thread
        # (oneDNN's working memory, up to 50 MB) ends with it, and is not counted.
        with ThreadPoolExecutor(THREADS) as pool:
            for key, tokens in (pool.map if len(points) % 2 else map)(one, jobs):
                again = known.setdefault(key, tokens)
                same = (
                    torch.allclose(again, tokens) if hasattr(tokens, "dtype") else again == tokens
                )
                assert same, f"{key}: another picture for the same seed"
        done += len(jobs)
        del jobs, again, tokens
        points.append((done, held(), len(gc.get_objects())))
        print(*(f"{value:,}" for value in (*points[-1], psutil.Process().memory_info().rss)))
    assert done == DRAWS
    assert torch.get_num_threads() == before
    counted = [point for point in points if point[0] > len(first) + 50]
    places, *values = np.array(counted, dtype=float).T
    for name, grown, most in (
        ("bytes", values[0], MOST_BYTES),
        ("objects", values[1], MOST_OBJECTS),
    ):
        slope = float(np.polyfit(places, grown, 1)[0])
        print(f"{name}: {slope:,.2f} a draw over {places[-1] - places[0]:,.0f} draws")
        assert slope < most, f"{slope:,.2f} {name} stay of every draw"


class Runs:
    """A process that has imported everything and forks a run at a time: imports cost seconds."""

    def __init__(self) -> None:
        self.inner = subprocess.Popen(
            [sys.executable, str(HERE / "runs.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self.inner.stdout is not None
        return self.inner.stdout.readline().strip()

    def start(self, kind: str, out: Path) -> int:
        """Begin a run; its process id."""
        assert self.inner.stdin is not None
        self.inner.stdin.write(f"{kind} {out}\n")
        self.inner.stdin.flush()
        return int(self._read())

    def end(self) -> int:
        """Wait for the run; its exit status, negative for a signal."""
        return int(self._read())

    def close(self) -> None:
        """End the process that forks."""
        assert self.inner.stdin is not None
        self.inner.stdin.close()
        assert self.inner.wait(60) == 0


@pytest.fixture(scope="module")
def runs():
    found = Runs()
    yield found
    found.close()


VOLATILE = ("seconds", "speed_up", "images_per_second", "written", "python", "date")


def without_clock(value: Any) -> Any:
    """A report without what a clock says."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not any(word in k for word in VOLATILE)}
        return {k: without_clock(v) for k, v in kept.items()}
    return [without_clock(entry) for entry in value] if isinstance(value, list) else value


def tensors_of(data: bytes) -> bytes:
    """A file of tensors with its header in order: safetensors writes metadata in any order.

    The hash behind the end, which depends on that order, is left out.
    """
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    end = max(e["data_offsets"][1] for k, e in header.items() if k != "__metadata__")
    return json.dumps(header, sort_keys=True).encode() + data[8 + size : 8 + size + end]


def contents(folder: Path) -> dict[str, str]:
    """Hashes of the files that a run promises to write alike, by name."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".json" and path.name != "run.json":
            data = json.dumps(without_clock(json.loads(path.read_text()))).encode()
        elif (
            path.suffix in (".jsonl", ".md", ".txt", ".pt", ".log")
            and path.name != "metadata.jsonl"
        ):
            continue  # logs, times and optimiser states; the weights that they led to are compared
        elif path.suffix == ".safetensors":
            data = tensors_of(path.read_bytes())
        else:
            data = path.read_bytes()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["generate", "report", "compare", "train", "distill", "export"])
def test_killed_at_random_moments_nothing_is_lost(runs, tmp_path, kind):
    if kind == "distill":
        teacher = ARPipeline.from_model(tiny_llamagen(sharpness=3.0), guidance_scale=1.5)
        teacher.save_pretrained(tmp_path / "tiny")
    if kind == "export":
        runs.start("generate", tmp_path / "samples")
        assert runs.end() == 0
    whole, out = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    started = time.monotonic()
    runs.start(kind, whole)
    assert runs.end() == 0
    seconds = time.monotonic() - started
    wanted = contents(whole.parent)
    assert wanted
    draw, kills = random.Random(kind), 0
    for attempt in range(20):
        if kills == KILLS_OF_EACH:
            break
        pid = runs.start(kind, out)
        time.sleep(seconds * draw.uniform(0.05, 0.6))
        number = (signal.SIGKILL, signal.SIGTERM)[attempt % 2]
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(pid, number)
        status = runs.end()
        kills += status == -number
        assert status in (-number, 0)
        # What lies there is whole: each file that has its final name is the one of the whole run.
        for name, digest in contents_in_place(out.parent).items():
            assert wanted.get(name, digest) == digest, f"{kind}: {name} after {number.name}"
        if status == 0:
            shutil.rmtree(out.parent)  # it had ended before its kill
    assert kills == KILLS_OF_EACH
    runs.start(kind, out)
    assert runs.end() == 0
    assert contents(out.parent) == wanted
    assert not [path for path in out.parent.rglob("*") if MARK in path.name]


def contents_in_place(folder: Path) -> dict[str, str]:
    """Hashes of files under their final names, without what killed runs left to be swept."""
    found = contents(folder) if folder.exists() else {}
    return {name: digest for name, digest in found.items() if MARK not in name}
