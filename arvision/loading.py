"""Around the loading of a pipeline."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from .errors import ArvisionError, CheckpointError

_LOADING = threading.RLock()
"""Held while a pipeline is loaded: the libraries' progress bars are switches of the process."""


@contextlib.contextmanager
def loading(source: str) -> Iterator[None]:
    """Around a load: one at a time, without bars, the libraries' errors as one line of ours."""
    try:
        with _LOADING, _quietly():
            yield
    except ArvisionError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{source}: cannot be loaded as a pipeline ({reason})") from error


@contextlib.contextmanager
def without_warnings(library: str) -> Iterator[None]:
    """Let a library's log tell errors only."""
    log = logging.getLogger(library)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the libraries' bars over two or three small components."""
    switches = [(diffusers_logging, diffusers_logging.is_progress_bar_enabled())]
    switches.append((transformers_logging, transformers_logging.is_progress_bar_enabled()))
    for switch, _ in switches:
        switch.disable_progress_bar()
    try:
        yield
    finally:
        for switch, was_shown in switches:
            if was_shown:
                switch.enable_progress_bar()
