"""Names that a package imports when somebody first asks for them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any


def on_demand(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose imports stand under `if TYPE_CHECKING:`.

    That block is the one list of names: type checkers read it as it stands, and so does the
    function, which follows an import when its name is first asked for (PEP 562)::

        if TYPE_CHECKING:
            from .api import load

        __getattr__, __dir__ = on_demand(__name__)

    Args:
        package: its `__name__`; its source is read, so it must be there.
    """
    places = dict(_promised(package))

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, attribute = places[name]
        found = import_module(module, package)
        value = getattr(found, attribute) if attribute else found
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *places})

    return get, names


def _promised(package: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Each name under `if TYPE_CHECKING:`, with its module and its name there ("" for a module)."""
    source = Path(str(sys.modules[package].__file__)).read_text(encoding="utf-8")
    for block in ast.parse(source).body:
        if not (isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"):
            continue
        for node in block.body:
            if isinstance(node, ast.ImportFrom):
                base = "." * node.level + (node.module or "")
                for alias in node.names:
                    place = (base, alias.name) if node.module else (base + alias.name, "")
                    yield alias.asname or alias.name, place
