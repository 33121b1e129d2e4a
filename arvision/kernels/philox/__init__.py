"""Counter-based random bits: Philox4x32-10."""

from .reference import philox4x32

__all__ = ["philox4x32"]
