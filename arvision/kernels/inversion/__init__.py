"""Draws by inversion of a cumulative sum; the Triton piece is a step that other kernels call."""

from .reference import draw

__all__ = ["draw"]
