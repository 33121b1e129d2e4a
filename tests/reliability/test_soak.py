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
WARM = 500
"""Draws until caches, thread arenas and lazily imported modules are there."""

THREADS = 4
KILLS_OF_EACH = 4
"""Of six commands: 24 in all."""

MOST_GROWTH = 24e6
"""Bytes of the process over the draws after `WARM`; a picture kept by mistake would be more."""

MOST_OBJECTS = 1000
"""Python's objects likewise: fewer than one for each draw."""


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


def give_back() -> None:
    """Let go of all that is free: glibc keeps freed memory for each thread, by the hundred megabytes."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.mark.slow
def test_two_thousand_draws_in_threads_leave_memory_flat():
    every = cases()
    small = [case for case in every if case[0].partition(" ")[0] in ("tiny", "text", "janus")]
    draw = random.Random(0)
    # The embedded models take most of the time: each of their samplers has some turns.
    plan = [(case, seed) for case in every for seed in range(4)]
    plan += [(draw.choice(small), draw.randrange(8)) for _ in range(DRAWS - len(plan))]
    draw.shuffle(plan)
    known: dict[tuple[str, int], Any] = {}
    process, sizes, objects = psutil.Process(), [], []

    def one(job: Any) -> tuple[tuple[str, int], Any]:
        (name, call), seed = job
        return (name, seed), call(seed)

    done = 0
    before = torch.get_num_threads()
    with ThreadPoolExecutor(THREADS) as pool:
        for first in range(0, len(plan), 50):
            jobs = plan[first : first + 50]
            # Alternately all threads at once and one after the other.
            run = pool.map if first // 50 % 2 else map
            for key, tokens in run(one, jobs):
                again = known.setdefault(key, tokens)
                same = (
                    torch.allclose(again, tokens) if hasattr(tokens, "dtype") else again == tokens
                )
                assert same, f"{key}: another picture for the same seed"
            done += len(jobs)
            del jobs, again, tokens
            give_back()
            if done > WARM:
                sizes.append((done, process.memory_info().rss))
                objects.append((done, len(gc.get_objects()) - len(known)))
    assert done == DRAWS
    assert torch.get_num_threads() == before
    for name, points, most in (("bytes", sizes, MOST_GROWTH), ("objects", objects, MOST_OBJECTS)):
        places, values = np.array(points, dtype=float).T
        slope = float(np.polyfit(places, values, 1)[0])
        growth = slope * (DRAWS - WARM)
        print(f"{name}: {growth:,.0f} over {DRAWS - WARM} draws, {points[-1][1]:,} at the end")
        assert growth < most, f"{name} grow by {growth:,.0f} over {DRAWS - WARM} draws"


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
