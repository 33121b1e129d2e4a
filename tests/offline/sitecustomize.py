"""No network for the tests: every connection that leaves the machine is refused.

Python imports this file at its start wherever this folder is on `PYTHONPATH`, so that the processes
that tests start are under the same rule; `conftest.py` puts it there. Sockets that C++ code opens
(gloo between ranks, on loopback) are not seen.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

VARIABLE = "ARVISION_TESTS_NETWORK"
"""Set while a test marked `network` runs."""

NAMED_FIRST = ("socket.getaddrinfo", "socket.gethostbyname")
ADDRESSED = ("socket.connect", "socket.sendto", "socket.sendmsg")
HERE = {None, "", "localhost", "::", "::1", "0.0.0.0", socket.gethostname()}


class NetworkUsed(RuntimeError):
    """Not an `OSError`, which code that copes with a dead network would hide."""


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: raise where a host other than this machine is asked for."""
    if event in NAMED_FIRST:
        host = arguments[0]
    elif event in ADDRESSED and isinstance(arguments[1], tuple):  # else a path: a Unix socket
        host = arguments[1][0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in HERE and not host.startswith("127.") and VARIABLE not in os.environ:
        raise NetworkUsed(f"a test wants {host} ({event}): mark it `network` or do without")


sys.addaudithook(_refuse)
