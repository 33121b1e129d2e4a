"""The tests see neither the network nor what else lies on the machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

CONNECT = "import socket; socket.create_connection(({host!r}, {port}), timeout=5).close()"


@pytest.mark.parametrize("host", ["192.0.2.1", "example.org"])
def test_the_network_is_closed_here_and_in_children(host: str):
    with pytest.raises(RuntimeError, match="mark it `network`"):
        socket.create_connection((host, 80), timeout=5)
    command = [sys.executable, "-c", CONNECT.format(host=host, port=80)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"a test wants {host}" in done.stderr


def test_loopback_is_open_here_and_in_children():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("localhost", port), timeout=5).close()
        command = [sys.executable, "-c", CONNECT.format(host="127.0.0.1", port=port)]
        subprocess.run(command, check=True)


@pytest.mark.network
def test_the_mark_opens_it():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a datagram socket sends nothing yet
        except OSError as error:
            pytest.skip(f"no network: {error}")


def test_caches_of_weights_are_empty():
    from huggingface_hub.constants import HF_HUB_CACHE

    assert not os.path.exists(HF_HUB_CACHE) or not os.listdir(HF_HUB_CACHE)
