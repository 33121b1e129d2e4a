"""Model families: networks, and one class per family that satisfies its contract."""

from ..registry import Registry
from .conditions import ImagePrompt, Prompt
from .infinity import Infinity, InfinityTokenizer, InfinityTransformer
from .llamagen import (
    LlamaGen,
    LlamaGenStudent,
    LlamaGenStudentTransformer,
    LlamaGenTokenizer,
    LlamaGenTransformer,
)
from .mar import MAR, MARAutoencoder, MARTransformer
from .nextstep import NextStep, NextStepAutoencoder, NextStepTransformer
from .var import VAR, VARStudent, VARStudentTransformer, VARTokenizer, VARTransformer

FAMILIES: Registry[type] = Registry("model family")
"""Name of a family's transformer class to the family; a pipeline finds its model class here."""

FAMILIES.register("InfinityTransformer", kind="scale")(Infinity)
FAMILIES.register("LlamaGenTransformer", kind="token")(LlamaGen)
FAMILIES.register("LlamaGenStudentTransformer", kind="student", teacher="LlamaGenTransformer")(
    LlamaGenStudent
)
FAMILIES.register("MARTransformer", kind="continuous")(MAR)
FAMILIES.register("NextStepTransformer", kind="continuous")(NextStep)
FAMILIES.register("VARTransformer", kind="scale")(VAR)
FAMILIES.register("VARStudentTransformer", kind="student", teacher="VARTransformer")(VARStudent)

__all__ = [
    "FAMILIES",
    "ImagePrompt",
    "Infinity",
    "InfinityTokenizer",
    "InfinityTransformer",
    "LlamaGen",
    "LlamaGenStudent",
    "LlamaGenStudentTransformer",
    "LlamaGenTokenizer",
    "LlamaGenTransformer",
    "MAR",
    "MARAutoencoder",
    "MARTransformer",
    "NextStep",
    "NextStepAutoencoder",
    "NextStepTransformer",
    "Prompt",
    "VAR",
    "VARStudent",
    "VARStudentTransformer",
    "VARTokenizer",
    "VARTransformer",
]
