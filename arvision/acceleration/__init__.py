"""`accelerate`: a pipeline's or a network's own call, drawn by our samplers."""

from .calls import accelerate, restore

__all__ = ["accelerate", "restore"]
