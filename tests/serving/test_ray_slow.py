"""Two replicas of the example under Ray Serve, one of which is killed under load."""

from __future__ import annotations

import importlib.util
import io
import os
import signal
import socket
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import pytest
from PIL import Image

import arvision

ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")

pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "ray_serve.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("ray_serve_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    ray.cloudpickle.register_pickle_by_value(module)
    return module


@pytest.fixture(scope="module")
def address(example):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Ray's processes talk to one another by the machine's own address.
    os.environ["ARVISION_TESTS_NETWORK"] = "1"
    # A machine under load takes longer than Ray waits for.
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "180")
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "180")
    os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S", "60")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    options = {"model": "llamagen-fashion", "replicas": 2, "most": 2, "num_cpus": 0.5}
    serve.run(example.build(options), name="arvision")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()
    del os.environ["ARVISION_TESTS_NETWORK"]


def replicas():
    """Process ids of the replicas that are alive."""
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if "ServeReplica" in line and "Pictures" in line:
            found.append(process.pid)
    return found


def test_no_request_is_lost_when_a_replica_is_killed_under_load(example, address):
    before = replicas()
    assert len(before) == 2
    requests = [(str(number % 10), number) for number in range(32)]
    with ThreadPoolExecutor(16) as pool:
        first = list(pool.map(lambda pair: example.draw(address, *pair), requests[:8]))
        waiting = [pool.submit(example.draw, address, *pair) for pair in requests]
        wait(waiting, return_when=FIRST_COMPLETED)
        os.kill(before[0], signal.SIGKILL)
        found = [one.result(300) for one in waiting]
    assert found[:8] == first
    pipe = arvision.load("llamagen-fashion")
    for (prompt, seed), data in zip(requests[::5], found[::5], strict=True):
        expected = pipe(int(prompt), seed=seed, progress=False).images[0]
        assert Image.open(io.BytesIO(data)).tobytes() == expected.tobytes()
    for _ in range(600):
        if len(replicas()) == 2 and before[0] not in replicas():
            return
        time.sleep(0.2)
    raise AssertionError("the replica was not replaced")
