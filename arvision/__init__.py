"""arvision: fast, exact sampling for autoregressive image models.

`import arvision` loads none of the libraries that it stands on; each name below is imported when it
is first asked for.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from .lazy import on_demand

if TYPE_CHECKING:
    from . import eval as eval
    from . import kernels as kernels
    from . import models as models
    from . import samplers as samplers
    from . import text as text
    from .acceleration import accelerate, restore
    from .api import load, sample
    from .catalog import list_models, list_samplers
    from .comparison import compare
    from .errors import (
        ArvisionError,
        CheckpointError,
        DiskError,
        InputError,
        MissingDependencyError,
        StateError,
    )
    from .evaluation import evaluate
    from .models import Prompt
    from .pipeline import ARPipeline, SampleOutput
    from .samplers import get_sampler
    from .text.completion import Completions, complete
    from .text.custom_generate import custom_generate
    from .text.generation import TextOutput, generate, list_drafters
    from .training.distill import distill

__getattr__, __dir__ = on_demand(__name__)

try:
    __version__ = version("arvision")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0"

__all__ = [
    "ARPipeline",
    "ArvisionError",
    "CheckpointError",
    "Completions",
    "DiskError",
    "InputError",
    "MissingDependencyError",
    "Prompt",
    "SampleOutput",
    "StateError",
    "TextOutput",
    "accelerate",
    "compare",
    "complete",
    "custom_generate",
    "distill",
    "evaluate",
    "generate",
    "get_sampler",
    "list_drafters",
    "list_models",
    "list_samplers",
    "load",
    "restore",
    "sample",
]
