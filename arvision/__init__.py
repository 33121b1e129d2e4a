"""arvision: fast, exact sampling for autoregressive image models."""

from importlib.metadata import PackageNotFoundError, version

from .api import list_models, list_samplers, load, sample
from .errors import (
    ArvisionError,
    CheckpointError,
    InputError,
    MissingDependencyError,
    StateError,
)
from .models import Prompt
from .pipeline import ARPipeline, SampleOutput
from .samplers import get_sampler
from .text.custom_generate import custom_generate
from .text.generation import TextOutput, generate, list_drafters

try:
    __version__ = version("arvision")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0"

__all__ = [
    "ARPipeline",
    "ArvisionError",
    "CheckpointError",
    "InputError",
    "MissingDependencyError",
    "Prompt",
    "SampleOutput",
    "StateError",
    "TextOutput",
    "custom_generate",
    "generate",
    "get_sampler",
    "list_drafters",
    "list_models",
    "list_samplers",
    "load",
    "sample",
]
