"""What may be done to a pipeline's networks before it draws: compile them, quantise them."""

from __future__ import annotations

from typing import Any

from typing_extensions import Self

from .decoding.fixed_step import Steps
from .quantization import quantize_weights


class Prepares:
    """The part of `ARPipeline` that prepares its networks."""

    kind: str
    device: Any
    network: Any
    transformer: Any
    _steps: Steps | None = None
    _quantized: str | None = None

    def quantize(self, how: str) -> Self:
        """Store the weights of what draws the tokens in fewer bits, in place; returns the pipeline.

        What is exact stays so with respect to the quantised model: `stats.quantized` names it.

        Args:
            how: "int8", "int4" or "fp8", see `arvision.quantization`.

        Raises:
            InputError: an unknown way, or weights that are quantised already.
            MissingDependencyError: torchao is not installed.
        """
        quantize_weights(self.network, how)
        self._quantized = how
        return self

    def compile(self, mode: str = "auto", reads_every: int = 1) -> Self:
        """Make passes compiled or captured functions of fixed shapes; returns the pipeline itself.

        `stats.step` tells what ran and `stats.warm_up` the seconds spent on it. Token models: whole
        passes; a sampler whose passes have no fixed shapes draws as before, with a warning. Other
        kinds: each scale, each chain of a diffusion head, each pass of a student is captured; modes
        of `torch.compile` compile their network in place, a graph for each shape.

        Args:
            mode: "auto" captures CUDA graphs, keeps them for later calls, and leaves other devices as
                they are; "eager" makes the fixed passes without a compiler; "default",
                "reduce-overhead" and "max-autotune" are modes of `torch.compile`.
            reads_every: passes between two looks at how many images of a token model go on.

        Raises:
            InputError: an unknown mode, or no positive number of passes.
        """
        steps = Steps(mode, reads_every)
        if self.kind == "token" or mode in ("auto", "eager"):
            self._steps = steps
        else:
            self.transformer.compile(mode=mode, dynamic=False)
        return self
