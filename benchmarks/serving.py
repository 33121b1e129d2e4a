"""A server under load: Poisson arrivals, continuous batching against one by one, memory over time.

    python -m benchmarks.serving load --seconds 120
    python -m benchmarks.serving batching --pictures 96
    python -m benchmarks.serving memory --pictures 5000 --model tiny

The server is a process of its own (`arvision serve`), the load comes from this one. Beside the clock
stand the CPU seconds of the server's process, which other work on the machine changes less.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx2
import numpy as np
import psutil

PATH = "/v1/images/generations"
CLASSES = 3
"""Of the models that are served, the first ones."""

MAKE = """
import sys
from arvision import ARPipeline
from arvision.testing import tiny_llamagen
ARPipeline.from_model(tiny_llamagen()).save_pretrained(sys.argv[1])
"""
"""Makes a tiny model in a folder, in a process whose memory is given back."""


@contextlib.contextmanager
def server(model: str, *options: str) -> Iterator[tuple[str, psutil.Process]]:
    """A server in a process of its own, its address and its process; model "tiny" is made for it."""
    with tempfile.TemporaryDirectory() as folder:
        if model == "tiny":
            subprocess.run([sys.executable, "-c", MAKE, folder], check=True)
            model = folder
        with _process(model, *options) as found:
            yield found


@contextlib.contextmanager
def _process(model: str, *options: str) -> Iterator[tuple[str, psutil.Process]]:
    command = [sys.executable, "-m", "arvision.cli", "serve", "--model", model, "--port", "0"]
    started = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    try:
        assert started.stderr is not None
        for line in started.stderr:
            found = re.search(r"at (http://\S+)", line)
            if found:
                break
        else:
            raise SystemExit("the server did not start")
        yield found[1], psutil.Process(started.pid)
    finally:
        started.terminate()
        started.wait(120)


def cpu_seconds(process: psutil.Process) -> float:
    """User and system seconds so far."""
    used = process.cpu_times()
    return used.user + used.system


class Load:
    """Requests to a server, and how each was answered."""

    def __init__(self, address: str, seed: int = 0) -> None:
        self._address, self._random = address, random.Random(seed)
        self.seconds: list[float] = []
        self.statuses: Counter[Any] = Counter()

    async def ask(self, client: httpx2.AsyncClient, due: float | None = None) -> None:
        """One picture of a random class, timed from when it was due."""
        due = time.perf_counter() if due is None else due
        body = {
            "prompt": str(self._random.randrange(CLASSES)),
            "seed": self._random.getrandbits(32),
        }
        try:
            answer = await client.post(self._address + PATH, json=body)
            self.statuses[answer.status_code] += 1
            if answer.status_code == 200:
                self.seconds.append(time.perf_counter() - due)
        except httpx2.HTTPError as error:
            self.statuses[type(error).__name__] += 1

    async def closed(self, clients: int, num: int) -> float:
        """`num` requests from clients that wait for their answers; seconds that it took."""
        left = iter(range(num))
        async with _client() as client:

            async def work() -> None:
                for _ in left:
                    await self.ask(client)

            started = time.perf_counter()
            await asyncio.gather(*(work() for _ in range(clients)))
        return time.perf_counter() - started

    async def poisson(self, rate: float, seconds: float, seed: int) -> float:
        """Requests at random times, `rate` a second on average; seconds until the last answer."""
        gaps = np.random.default_rng(seed).exponential(1 / rate, int(2 * rate * seconds) + 20)
        times = gaps.cumsum()
        started = time.perf_counter()
        async with _client() as client:
            tasks = []
            for moment in times[times < seconds]:
                due = started + float(moment)
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                tasks.append(asyncio.create_task(self.ask(client, due)))
            await asyncio.gather(*tasks)
        return time.perf_counter() - started


def _client() -> httpx2.AsyncClient:
    limits = httpx2.Limits(max_connections=2000, max_keepalive_connections=200)
    return httpx2.AsyncClient(timeout=600, limits=limits)


async def load(model: str, shares: list[float], seconds: float, options: list[str]) -> None:
    """Poisson load at shares of the capacity that is measured right before."""
    with server(model, *options) as (address, process):
        await Load(address).closed(8, 32)  # warm
        for share in shares:
            asked = Load(address, 1)
            spent = cpu_seconds(process)
            took = await asked.closed(32, 192)
            capacity = 192 / took
            spent = cpu_seconds(process) - spent
            print(
                f"capacity {capacity:.2f} pictures/s, {1000 * spent / 192:.0f} CPU ms a picture, "
                f"load average {os.getloadavg()[0]:.1f}"
            )
            asked = Load(address, 2)
            spent = cpu_seconds(process)
            took = await asked.poisson(share * capacity, seconds, seed=3)
            spent = cpu_seconds(process) - spent
            done = len(asked.seconds)
            p50, p95, p99 = np.percentile(asked.seconds or [float("nan")], [50, 95, 99])
            print(
                f"{share:.0%}: offered {share * capacity:.2f}/s, {sum(asked.statuses.values())} requests, "
                f"answered {dict(asked.statuses)}, {done / took:.2f} pictures/s, p50 {p50:.2f} s, "
                f"p95 {p95:.2f} s, p99 {p99:.2f} s, {1000 * spent / max(1, done):.0f} CPU ms a picture",
                flush=True,
            )


async def batching(model: str, num: int, turns: int) -> None:
    """The same requests in one running batch, and one by one, in turns."""
    found: dict[str, list[tuple[float, float]]] = {}
    with contextlib.ExitStack() as stack:
        servers = {
            "continuous, 16 at a time": stack.enter_context(server(model)),
            "one by one": stack.enter_context(server(model, "--batch", "1")),
        }
        for name, (address, _) in servers.items():
            await Load(address).closed(16, 16)
            found[name] = []
        for turn in range(turns):
            for name, (address, process) in servers.items():
                spent = cpu_seconds(process)
                took = await Load(address, turn).closed(32, num)
                found[name].append((num / took, num / (cpu_seconds(process) - spent)))
    for name, runs in found.items():
        wall, cpu = (float(np.median([run[k] for run in runs])) for k in (0, 1))
        print(f"{name}: {wall:.2f} pictures/s, {cpu:.2f} pictures per CPU second")
    first, second = (np.median([run[0] for run in runs]) for runs in found.values())
    cpu_first, cpu_second = (np.median([run[1] for run in runs]) for runs in found.values())
    print(f"ratio: {first / second:.2f} by the clock, {cpu_first / cpu_second:.2f} by CPU seconds")


async def memory(model: str, num: int) -> None:
    """Memory of the server's own after every tenth of `num` pictures; files it has mapped left out."""
    with server(model) as (address, process):
        await Load(address).closed(32, 64)
        for part in range(11):
            if part:
                asked = Load(address, part)
                await asked.closed(32, num // 10)
                assert set(asked.statuses) == {200}, asked.statuses
            found = process.memory_info()
            own = (found.rss - getattr(found, "shared", 0)) / 1e6
            print(f"{part * (num // 10)} pictures: {own:.1f} MB", flush=True)


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["load", "batching", "memory"])
    parser.add_argument("--model", default="llamagen-fashion")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.9, 1.2])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--turns", type=int, default=3)
    given, options = parser.parse_known_args()
    if given.what == "load":
        asyncio.run(load(given.model, given.shares, given.seconds, options))
    elif given.what == "batching":
        asyncio.run(batching(given.model, given.pictures, given.turns))
    else:
        asyncio.run(memory(given.model, given.pictures))


if __name__ == "__main__":
    main()
