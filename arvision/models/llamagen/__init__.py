"""The LlamaGen family."""

from .model import LlamaGen
from .tokenizer import LlamaGenTokenizer
from .transformer import LlamaGenTransformer

__all__ = ["LlamaGen", "LlamaGenTokenizer", "LlamaGenTransformer"]
