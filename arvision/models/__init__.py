"""Model families: networks, and one class per family that satisfies its contract."""

from ..registry import Registry
from .llamagen import LlamaGen, LlamaGenTokenizer, LlamaGenTransformer
from .mar import MAR, MARAutoencoder, MARTransformer
from .var import VAR, VARTokenizer, VARTransformer

FAMILIES: Registry[type] = Registry("model family")
"""Name of a family's transformer class to the family; a pipeline finds its model class here."""

FAMILIES.register("LlamaGenTransformer", kind="token")(LlamaGen)
FAMILIES.register("MARTransformer", kind="continuous")(MAR)
FAMILIES.register("VARTransformer", kind="scale")(VAR)

__all__ = [
    "FAMILIES",
    "LlamaGen",
    "LlamaGenTokenizer",
    "LlamaGenTransformer",
    "MAR",
    "MARAutoencoder",
    "MARTransformer",
    "VAR",
    "VARTokenizer",
    "VARTransformer",
]
