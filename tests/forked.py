"""A script as several processes, in the environment that a launcher makes.

They are forks of this process, so that none has to import PyTorch again.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
from pathlib import Path

FORK = multiprocessing.get_context("fork")


def _run(script: Path, arguments: list[str], environment: dict[str, str]) -> None:
    os.environ |= environment
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def run_forked(script: Path, size: int, *arguments: object, seconds: float = 300) -> None:
    """Run `script` as `size` processes that find one another; each has to end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    own = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    given = [str(argument) for argument in arguments]
    processes = [FORK.Process(target=_run, args=(script, given, one)) for one in own]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    left = [process for process in processes if process.is_alive()]
    for process in left:
        process.kill()
    assert [process.exitcode for process in processes] == [0] * size
