"""Model families: networks, and one class per family that satisfies its contract."""

from typing import TYPE_CHECKING

from ..lazy import on_demand
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
from .transformers_image import (
    Chameleon,
    ChameleonDecoder,
    Emu3,
    GlmImage,
    Janus,
    TransformersImageModel,
)
from .var import VAR, VARStudent, VARStudentTransformer, VARTokenizer, VARTransformer

if TYPE_CHECKING:  # they live with the text; their old names stay
    from ..text import HFCausalLM, load_text_model

__getattr__, __dir__ = on_demand(__name__)

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
    "Chameleon",
    "ChameleonDecoder",
    "Emu3",
    "GlmImage",
    "HFCausalLM",
    "ImagePrompt",
    "Infinity",
    "InfinityTokenizer",
    "InfinityTransformer",
    "Janus",
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
    "TransformersImageModel",
    "VAR",
    "VARStudent",
    "VARStudentTransformer",
    "VARTokenizer",
    "VARTransformer",
    "load_text_model",
]
