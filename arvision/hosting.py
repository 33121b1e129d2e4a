"""A process that serves an application: its socket, and uvicorn around it."""

from __future__ import annotations

import socket as sockets
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from .errors import ArvisionError, InputError

CONNECTIONS = 1024
"""Connections at a time; further ones are told 503."""

IDLE = 15
"""Seconds that a connection without a request is kept."""

HUNG = 60
"""Seconds without an answer after which a worker is replaced."""

UNABLE = 3
"""Exit status of a worker that could not begin, as uvicorn understands it."""


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


def host(
    make: Callable[[], Any], socket: sockets.socket, title: str, grace: float, workers: int = 1
) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        make: makes the ASGI application; one that can be pickled, for several workers.
        socket: see `listen`.
        title: what stderr is told to be there, with its address.
        grace: seconds that requests have to end in.
        workers: processes that take requests from the socket; one that dies is replaced.

    Raises:
        InputError: a worker could not make its application; it has said why.
    """
    import uvicorn  # comes with every extra that serves something
    from uvicorn.supervisors import Multiprocess

    config = uvicorn.Config(
        make() if workers == 1 else partial(_begin, make),
        factory=workers > 1,
        workers=workers,
        log_level="warning",
        access_log=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=IDLE,
        timeout_graceful_shutdown=int(grace) + 1,
        timeout_worker_healthcheck=HUNG,
        server_header=False,
    )
    name, port = socket.getsockname()[:2]
    shown = f"[{name}]" if ":" in str(name) else name
    print(f"arvision: {title} at http://{shown}:{port}", file=sys.stderr, flush=True)  # noqa: T201
    if workers == 1:
        uvicorn.Server(config).run(sockets=[socket])
        return
    supervisor = Multiprocess(config, sockets=[socket])
    supervisor.run()
    if any(process.exitcode == UNABLE for process in supervisor.processes):
        raise InputError(f"{title}: a worker could not begin, see above")


def _begin(make: Callable[[], Any]) -> Any:
    """An application in a worker; an error of ours is a line, and the end of all workers."""
    try:
        return make()
    except ArvisionError as error:
        print(f"arvision: {error}", file=sys.stderr, flush=True)  # noqa: T201
        raise SystemExit(UNABLE) from None
