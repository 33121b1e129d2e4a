"""What a server takes and how long it tries."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..errors import ArvisionError, InputError, as_integer, check_count


class BusyError(ArvisionError, RuntimeError):
    """The queue is full: try again later."""


class ClosedError(ArvisionError, RuntimeError):
    """The server is stopping and takes nothing new."""


BATCHINGS = ("auto", "continuous", "arrival")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of a server.

    Attributes:
        batch: pictures that are drawn at a time, at most.
        queue: pictures that wait, at most; more are refused (429).
        images: pictures of one request, at most.
        prompt: characters of a prompt, at most.
        pixels: of a side, at most.
        body: bytes of a request, at most.
        timeout: seconds that a request may take, waiting included.
        upload: seconds in which a request's body must have come.
        batching: "continuous" refuses what cannot enter a running batch, "arrival" draws everything
            in batches as it comes, "auto" does each where it can.

    Raises:
        InputError: a bound that is no positive number, or an unknown way of batching.
    """

    batch: int = 16
    queue: int = 128
    images: int = 10
    prompt: int = 4000
    pixels: int = 4096
    body: int = 1 << 20
    timeout: float = 300.0
    upload: float = 20.0
    batching: str = "auto"

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name == "batching":
                if value not in BATCHINGS:
                    raise InputError(f"batching {value!r}: expected one of {', '.join(BATCHINGS)}")
            elif each.type == "int":
                check_count(each.name, value)
            elif (
                as_integer(value) is None and not isinstance(value, float)
            ) or not 0 < value < 1e9:
                raise InputError(f"{each.name} {value!r}: expected seconds > 0")
