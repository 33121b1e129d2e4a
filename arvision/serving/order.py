"""One picture that somebody waits for, from the request to the answer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..decoding.logits import Shaping
from ..samplers import BaseSampler


@dataclass
class Drawn:
    """A finished picture.

    Attributes:
        tokens: [N] int64, [N, d] or [N, D], on the CPU.
        image: PIL image; None where only tokens were ordered.
        passes: of the model that it took part in.
        waited: seconds from the order to the first pass.
        seconds: from the order to the picture.
    """

    tokens: Tensor
    image: Any
    passes: int
    waited: float
    seconds: float


@dataclass(eq=False)
class Order:
    """A picture to be drawn; made by `arvision.serving.studio.Studio`.

    Attributes:
        condition: as the model takes it.
        prompt: as the pipeline takes it.
        identity: seed and number of the picture.
        model: that draws it, of the size that was asked for.
        sampler: with temperature, top-k and top-p of this picture.
        guidance_scale: of this picture.
        call: further arguments of the pipeline's call, such as a size.
        wants_image: whether the tokens are decoded.
        previews: number of unfinished pictures that are shown on the way.
        on_preview: is given each of them, in the engine's thread.
        answer: holds a `Drawn`, or why there is none.
        is_dropped: set by whoever does not wait any more; the picture is then left unfinished.
        tries: times that its drawing was begun.
        started: when it was ordered, by `time.monotonic`.
        waited: seconds until it was begun.
    """

    condition: Any
    prompt: Any
    identity: tuple[int, int]
    model: Any
    sampler: BaseSampler
    guidance_scale: Any
    call: dict[str, Any] = field(default_factory=dict)
    wants_image: bool = True
    previews: int = 0
    on_preview: Callable[[Any], None] | None = None
    answer: Future[Drawn] = field(default_factory=Future)
    is_dropped: bool = False
    tries: int = 0
    shown: int = 0
    started: float = field(default_factory=time.monotonic)
    waited: float = 0.0

    @property
    def shaping(self) -> Shaping:
        """How logits become the law of this picture."""
        config = self.sampler.config
        return Shaping(
            temperature=config["temperature"], top_k=config["top_k"] or 0, top_p=config["top_p"]
        )

    def begin(self) -> bool:
        """Note that drawing begins; false for a picture that nobody waits for."""
        if self.tries == 0:
            self.waited = time.monotonic() - self.started
        self.tries += 1
        return not self.is_dropped

    def finish(self, tokens: Tensor, image: Any, passes: int) -> None:
        """Hand the picture over."""
        seconds = time.monotonic() - self.started
        with contextlib.suppress(InvalidStateError):  # somebody stopped waiting
            self.answer.set_result(Drawn(tokens.cpu(), image, passes, self.waited, seconds))

    def fail(self, error: BaseException) -> None:
        """Say why there is no picture."""
        with contextlib.suppress(InvalidStateError):
            self.answer.set_exception(error)
