"""A server in a process of its own: signals, kills, slow clients, requests that are none."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx2
import psutil
import pytest
from PIL import Image, ImageChops

pytest.importorskip("fastapi")

pytestmark = pytest.mark.slow
PATH = "/v1/images/generations"


class Server:
    def __init__(self, *options):
        command = [sys.executable, "-m", "arvision.cli", "serve", "--model", "llamagen-fashion"]
        self.process = subprocess.Popen(
            [*command, "--port", "0", *options], stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        found = re.search(r"at (http://[\d.]+:(\d+))", line)
        assert found is not None, line + self.process.stderr.read()
        self.address, self.port = found[1], int(found[2])

    def ask(self, timeout=300.0, **body):
        return httpx2.post(self.address + PATH, json={"prompt": "bag"} | body, timeout=timeout)

    def end(self, how=signal.SIGTERM):
        """What it wrote to stderr."""
        self.process.send_signal(how)
        _, said = self.process.communicate(timeout=300)
        return said


def status_or_fault(server, **body):
    try:
        return server.ask(**body).status_code
    except httpx2.HTTPError as error:
        return type(error).__name__


def test_sigterm_draws_what_was_ordered_and_takes_nothing_new():
    server = Server()
    with ThreadPoolExecutor(12) as pool:
        waiting = [pool.submit(status_or_fault, server, seed=seed, n=4) for seed in range(12)]
        while httpx2.get(server.address + "/health").json()["waiting"] < 16:
            time.sleep(0.01)
        said = server.end()
        assert [one.result() for one in waiting] == [200] * 12
    assert said == ""
    assert server.process.returncode in (0, -signal.SIGTERM)
    with pytest.raises(httpx2.ConnectError):
        server.ask()


def test_a_server_that_is_killed_leaves_nobody_waiting():
    server = Server()
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(status_or_fault, server, seed=seed, n=4) for seed in range(8)]
        while httpx2.get(server.address + "/health").json()["waiting"] < 8:
            time.sleep(0.01)
        killed = time.monotonic()
        server.end(signal.SIGKILL)
        told = [one.result() for one in waiting]
    assert time.monotonic() - killed < 30
    assert all(one == 200 or isinstance(one, str) for one in told)
    again = Server("--port", str(server.port))
    assert again.ask(seed=1).status_code == 200
    assert "Traceback" not in again.end()


def test_what_is_too_much_is_told_to_come_again_and_then_comes():
    server, told = Server("--batch", "2", "--queue", "4"), Counter()

    def until_answered(seed):
        while True:
            answer = server.ask(seed=seed)
            told[answer.status_code] += 1
            if answer.status_code != 429:
                return answer.status_code
            assert "expected at most 4, try again later" in answer.json()["error"]["message"]
            time.sleep(int(answer.headers["retry-after"]))

    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(until_answered, range(24))) == [200] * 24
    assert told[429] > 0
    assert set(told) == {200, 429}
    assert server.end() == ""
    print("answers:", told)


def test_one_of_two_workers_is_killed_under_load():
    import arvision

    server = Server("--workers", "2", "--batch", "4")
    parent = psutil.Process(server.process.pid)
    assert server.ask(seed=0).status_code == 200

    def workers():
        found = parent.children()
        return [one for one in found if "spawn_main" in " ".join(one.cmdline())]

    first, broken = workers(), []
    assert len(first) == 2

    def until_answered(seed):
        """A picture is a function of its prompt and seed, so whoever is cut off asks again."""
        while True:
            try:
                answer = server.ask(seed=seed)
            except httpx2.HTTPError as error:
                broken.append(type(error).__name__)
                time.sleep(0.2)
                continue
            assert answer.status_code == 200, answer.text
            return answer.json()["data"][0]["b64_json"]

    with ThreadPoolExecutor(12) as pool:
        waiting = [pool.submit(until_answered, seed) for seed in range(48)]
        while sum(one.done() for one in waiting) < 6:
            time.sleep(0.01)
        # Which of the two had taken how many requests is chance: the busier one is killed.
        busier = max(first, key=lambda one: one.cpu_times().user)
        busier.send_signal(signal.SIGKILL)
        drawn = [one.result() for one in waiting]
    assert broken
    pipe = arvision.load("llamagen-fashion")
    for seed in (0, 20, 47):
        alone = pipe("bag", seed=seed, progress=False).images[0]
        picture = Image.open(io.BytesIO(base64.b64decode(drawn[seed])))
        assert max(ImageChops.difference(picture, alone).tobytes()) <= 2  # decoded beside others
    until = time.monotonic() + 120
    while len(workers()) < 2 and time.monotonic() < until:
        time.sleep(0.2)
    second = workers()
    assert len(second) == 2
    assert busier.pid not in [one.pid for one in second]
    assert server.end() == ""
    print("cut off:", Counter(broken))


def test_workers_that_cannot_begin_end_the_server(tmp_path):
    import arvision

    arvision.load("llamagen-fashion").save_pretrained(tmp_path / "model")
    weights = next((tmp_path / "model" / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    command = [sys.executable, "-m", "arvision.cli", "serve", "--port", "0", "--workers", "2"]
    done = subprocess.run(
        [*command, "--model", str(tmp_path / "model")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].endswith("a worker could not begin, see above")


def dawdle(port, stop):
    """A client that sends a byte of its request now and then, and one that reads no answer."""
    body = json.dumps({"prompt": "bag", "n": 8, "seed": 1}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    whole = (head + f"Content-Length: {len(body)}\r\n\r\n").encode() + body
    with (
        socket.create_connection(("127.0.0.1", port)) as slow,
        socket.create_connection(("127.0.0.1", port)) as deaf,
    ):
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        deaf.sendall(whole)
        for byte in whole:
            if stop.wait(0.2):
                return
            try:
                slow.sendall(bytes([byte]))
            except OSError:
                stop.wait()
                return


def test_slow_clients_hold_up_nobody():
    server, stop = Server("--batch", "8"), threading.Event()
    crowd = [threading.Thread(target=dawdle, args=(server.port, stop)) for _ in range(16)]
    for one in crowd:
        one.start()
    try:
        for seed in range(4):
            assert server.ask(seed=seed).status_code == 200
    finally:
        stop.set()
        for one in crowd:
            one.join()
    assert "Traceback" not in server.end()


VALUES = [
    *(
        None,
        True,
        -1,
        0,
        1e308,
        float("1e-320"),
        2**70,
        "",
        "x",
        "\x00",
        "\ud800",
        "1",
        "zebra",
        "9" * 5000,
    ),
    *(
        [],
        {},
        [1],
        {"a": 1},
        "32x32",
        "0x0",
        "99999x1",
        "sjd",
        "sjd:window=x",
        "a:b:c",
        "ar:top_k=-1",
    ),
]
FIELDS = (
    *(
        "prompt",
        "n",
        "size",
        "seed",
        "stream",
        "partial_images",
        "response_format",
        "model",
        "user",
    ),
    *("guidance_scale", "temperature", "top_k", "top_p", "sampler", "negative_prompt", "nothing"),
)


def malformed(random_):
    """A body that is no request, or hardly one."""
    kind = random_.random()
    if kind < 0.15:
        return bytes(random_.randrange(256) for _ in range(random_.randrange(60)))
    if kind < 0.25:
        return json.dumps(random_.choice(VALUES)).encode()
    body = {"prompt": "bag"} if random_.random() < 0.6 else {}
    for _ in range(random_.randrange(1, 4)):
        body[random_.choice(FIELDS)] = random_.choice(VALUES)
    text = json.dumps(body)
    return (text[: random_.randrange(len(text))] if kind < 0.35 else text).encode()


def test_a_thousand_malformed_requests_are_told_what_is_wrong():
    server, random_ = Server(), random.Random(0)
    told = {}
    with httpx2.Client(timeout=300) as client:
        for number in range(1000):
            path = (
                PATH
                if number % 20
                else random_.choice(["/", "/v1/models/%00", "/x" * 500, "/generate"])
            )
            method = (
                "POST" if number % 17 else random_.choice(["PUT", "DELETE", "PATCH", "OPTIONS"])
            )
            headers = {"content-type": random_.choice(["application/json", "text/plain", "x"])}
            answer = client.request(
                method, server.address + path, content=malformed(random_), headers=headers
            )
            told[answer.status_code] = told.get(answer.status_code, 0) + 1
            assert answer.status_code < 500, answer.text
            if answer.status_code >= 400:
                message = answer.json()["error"]["message"]
                assert message
                assert "\n" not in message
    assert told[422] > 500
    assert server.ask(seed=1).status_code == 200
    assert server.end() == ""


def test_a_port_in_use_is_one_line_before_anything_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "arvision.cli",
                "serve",
                "--model",
                "llamagen-fashion",
                "--port",
                port,
            ],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env=os.environ,
        )
    assert done.returncode == 2
    assert done.stderr.startswith(f"arvision: 127.0.0.1:{port} cannot be served")
    assert done.stderr.count("\n") == 1
