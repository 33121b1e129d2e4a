"""A process that serves an application: its socket, and uvicorn around it."""

from __future__ import annotations

import socket as sockets
import sys
from typing import Any

from .errors import InputError

CONNECTIONS = 1024
"""Connections at a time; further ones are told 503."""

IDLE = 15
"""Seconds that a connection without a request is kept."""


def listen(host: str, port: int) -> sockets.socket:
    """A socket bound to an address.

    Raises:
        InputError: the port is in use, not allowed, or no port; or an address that is not this
            machine's.
    """
    if not 0 <= port < 1 << 16:
        raise InputError(f"port {port}: expected 0..65535")
    try:
        family, kind, _, _, address = sockets.getaddrinfo(host, port, type=sockets.SOCK_STREAM)[0]
        found = sockets.socket(family, kind)
        found.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(CONNECTIONS)
    except OSError as error:
        raise InputError(
            f"{host}:{port} cannot be served ({error.strerror or error}): expected a free port of this "
            "machine, such as --port 0 for any"
        ) from error
    found.set_inheritable(True)
    return found


def host(app: Any, socket: sockets.socket, title: str, grace: float) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        app: ASGI application.
        socket: see `listen`.
        title: what stderr is told to be there, with its address.
        grace: seconds that requests have to end in.
    """
    import uvicorn  # comes with every extra that serves something

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=IDLE,
        timeout_graceful_shutdown=int(grace) + 1,
        server_header=False,
    )
    name, port = socket.getsockname()[:2]
    shown = f"[{name}]" if ":" in str(name) else name
    print(f"arvision: {title} at http://{shown}:{port}", file=sys.stderr, flush=True)  # noqa: T201
    uvicorn.Server(config).run(sockets=[socket])
