"""The VAR family."""

from .model import VAR
from .student import VARStudent, VARStudentTransformer
from .tokenizer import VARTokenizer
from .transformer import VARTransformer

__all__ = ["VAR", "VARStudent", "VARStudentTransformer", "VARTokenizer", "VARTransformer"]
