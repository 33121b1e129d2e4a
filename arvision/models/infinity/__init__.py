"""The Infinity family."""

from .model import Infinity
from .schedules import scale_schedule
from .tokenizer import InfinityTokenizer
from .transformer import InfinityTransformer

__all__ = ["Infinity", "InfinityTokenizer", "InfinityTransformer", "scale_schedule"]
