"""What a node asks of ComfyUI: a progress bar with previews, and whether the user has pressed stop.

Outside of ComfyUI (in tests, in scripts) both say nothing.
"""

from __future__ import annotations

from typing import Any

try:
    from comfy.model_management import (  # pyright: ignore[reportMissingImports]
        throw_exception_if_processing_interrupted as stop_if_asked,
    )
    from comfy.utils import ProgressBar  # pyright: ignore[reportMissingImports]
except ImportError:

    def stop_if_asked() -> None:
        """Nobody can ask."""

    ProgressBar = None

PREVIEW_SIDE = 512
"""Longest side of a preview in pixels, as ComfyUI's own samplers show them."""


class Progress:
    """`callback_on_step_end` of a pipeline, shown in ComfyUI.

    Attributes:
        previews: the pictures that the last preview showed.
    """

    def __init__(self) -> None:
        self.previews: list[Any] = []
        self._bar: Any = None

    def __call__(
        self, pipe: Any, step: int, timestep: int, given: dict[str, Any]
    ) -> dict[str, Any]:
        """Show how far the images are, and the first of them if it was decoded."""
        stop_if_asked()
        self.previews = given.get("preview") or self.previews
        if ProgressBar is not None:
            self._bar = self._bar or ProgressBar(given["total"])
            shown = ("JPEG", self.previews[0], PREVIEW_SIDE) if given.get("preview") else None
            self._bar.update_absolute(given["finished"], given["total"], shown)
        return {}
