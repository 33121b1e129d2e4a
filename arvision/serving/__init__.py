"""Pictures over HTTP: an engine that batches continuously, and OpenAI's endpoints around it."""

from ..errors import optional

with optional("serve", "a server"):
    from .app import application, make_app
    from .engine import Engine
    from .limits import BusyError, ClosedError, Limits
    from .order import Drawn, Order
    from .studio import Studio

__all__ = [
    "BusyError",
    "ClosedError",
    "Drawn",
    "Engine",
    "Limits",
    "Order",
    "Studio",
    "application",
    "make_app",
]
