"""What `ARPipeline.compile` does for each kind of model."""

from __future__ import annotations

from typing import Any

from .decoding.fixed_step import Steps


def compile_networks(pipe: Any, mode: str, reads_every: int) -> Steps | None:
    """See `ARPipeline.compile`.

    Returns:
        How passes of a token model run; None for other kinds, whose network is compiled in place.
    """
    steps = Steps(mode, reads_every)
    if pipe.kind == "token":
        return steps
    if mode == "auto" and pipe.device.type == "cuda":
        mode = "reduce-overhead"
    if mode not in ("auto", "eager"):
        pipe.transformer.compile(mode=mode, dynamic=False)
    return None
