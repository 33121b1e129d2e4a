"""Published models that arvision reads: what their authors say of them, told without a library."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from .errors import ArvisionError

FILE = Path(__file__).parent / "known_models.json"
KINDS = ("token", "scale", "continuous", "student")
CHECKED = ("hub", "licence", "size")
SETTINGS = ("guidance_scale", "temperature", "top_k", "top_p", "negative_prompt", "draft")


@dataclass(frozen=True)
class KnownModel:
    """A published model.

    Attributes:
        name: ours for it.
        family: of models.
        kind: "token", "scale", "continuous" or "student"; says which samplers fit.
        hub: "owner/name" at the hub; None where the files lie elsewhere.
        files: what is loaded, by part.
        licence: of the weights.
        parameters: their number, all networks together, as the authors round it.
        settings: what the authors draw with.
        load: the line that loads it, or makes a pipeline's folder of it.
        quality: published figures; None for none known.
        speed: likewise.
        source: where the figures and settings stand.
        checked: where hub id (or the place of the files), licence and size were looked up; None for
            what we could not see.
        without: samplers of this kind that do not fit all the same.
    """

    name: str
    family: str
    kind: str
    hub: str | None
    files: Mapping[str, str]
    licence: str
    parameters: int
    settings: Mapping[str, Any]
    load: str
    quality: str | None
    speed: str | None
    source: str
    checked: Mapping[str, str | None]
    without: tuple[str, ...] = ()

    @property
    def size(self) -> str:
        """Parameters, and what they take in bfloat16."""
        unit, name = (1e9, "B") if self.parameters >= 1e9 else (1e6, "M")
        return f"{self.parameters / unit:.3g}{name}, {self.parameters * 2 / 1e9:.2g} GB in bfloat16"


class RegistryError(ArvisionError):
    """The list of known models does not hold what it should."""


def parse(entries: Any) -> tuple[KnownModel, ...]:
    """Check entries and make models of them.

    Raises:
        RegistryError: names the entry and what is wrong with it.
    """
    models: dict[str, KnownModel] = {}
    names = {field.name for field in dataclasses.fields(KnownModel)}
    needed = names - {"without"}
    for place, entry in enumerate(entries):
        what = (
            f"known model {entry.get('name', place)!r}" if isinstance(entry, dict) else str(place)
        )
        if not isinstance(entry, dict) or not needed <= set(entry) <= names:
            odd = sorted(needed.symmetric_difference(entry) - {"without"})
            raise RegistryError(f"{what}: missing or unknown fields {', '.join(odd)}")
        model = KnownModel(**{**entry, "without": tuple(entry.get("without", ()))})
        for is_fine, fault in (
            (model.kind in KINDS, f"kind {model.kind!r}: expected one of {', '.join(KINDS)}"),
            (set(model.settings) <= set(SETTINGS), f"settings: expected {', '.join(SETTINGS)}"),
            (bool(model.files) and bool(model.source), "expected files and a source"),
            (tuple(model.checked) == CHECKED, f"checked: expected {', '.join(CHECKED)}"),
            (model.hub is None or model.hub.count("/") == 1, f"hub {model.hub!r}: no owner/name"),
            (isinstance(model.parameters, int) and model.parameters > 0, "parameters"),
            (model.name not in models, "stands twice"),
        ):
            if not is_fine:
                raise RegistryError(f"{what}: {fault}")
        models[model.name] = model
    return tuple(models.values())


@lru_cache(maxsize=1)
def known_models() -> tuple[KnownModel, ...]:
    """All of them, in the order of the file."""
    return parse(json.loads(FILE.read_text(encoding="utf-8")))


def find_known(name: str) -> KnownModel | None:
    """The model of that name or hub id, if it is known and one alone."""
    found = [one for one in known_models() if name in (one.name, one.hub)]
    return found[0] if len(found) == 1 else None
