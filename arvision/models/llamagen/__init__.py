"""The LlamaGen family."""

from .model import LlamaGen
from .student import LlamaGenStudent, LlamaGenStudentTransformer
from .tokenizer import LlamaGenTokenizer
from .transformer import LlamaGenTransformer

__all__ = [
    "LlamaGen",
    "LlamaGenStudent",
    "LlamaGenStudentTransformer",
    "LlamaGenTokenizer",
    "LlamaGenTransformer",
]
