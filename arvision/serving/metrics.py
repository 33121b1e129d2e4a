"""Counters of a server, as Prometheus reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from .engine import Engine

BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""Seconds."""


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()
        self._counters = {
            "pictures": Counter("arvision_pictures", "Pictures drawn.", registry=own),
            "passes": Counter("arvision_passes", "Calls of the model.", registry=own),
            "pass_seconds": Counter(
                "arvision_pass_seconds", "Seconds in passes of lanes.", registry=own
            ),
        }
        self.requests = Counter(
            "arvision_requests", "Answers by path and status.", ["path", "status"], registry=own
        )
        self.waited = Histogram(
            "arvision_wait_seconds",
            "From the order to the first pass.",
            buckets=BUCKETS,
            registry=own,
        )
        self.seconds = Histogram(
            "arvision_picture_seconds",
            "From the order to the picture.",
            buckets=BUCKETS,
            registry=own,
        )

    def add(self, name: str, value: float) -> None:
        """Count what the engine tells."""
        self._counters[name].inc(value)

    def watch(self, engine: Engine) -> None:
        """Read the engine's queue and batch whenever somebody asks."""
        own = self.registry
        Gauge("arvision_waiting", "Pictures that wait.", registry=own).set_function(
            lambda: engine.num_waiting
        )
        Gauge("arvision_drawing", "Pictures being drawn.", registry=own).set_function(
            lambda: engine.num_drawing
        )

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)
