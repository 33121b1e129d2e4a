"""The VAR family."""

from .model import VAR
from .tokenizer import VARTokenizer
from .transformer import VARTransformer

__all__ = ["VAR", "VARTokenizer", "VARTransformer"]
