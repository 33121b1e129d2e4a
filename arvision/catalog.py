"""What there is: the embedded models and the samplers, told without loading a library."""

from __future__ import annotations

import ast
import dataclasses
import json
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .folders import ASSETS, embedded_models, find_model
from .hub import Source, fetch_index
from .known import known_models
from .needed import index_of, read_json

IMAGE_PIPELINES = ("GlmImagePipeline", "ImageModelPipeline")
"""Pipelines around image models of transformers, which are token models."""

SAMPLERS_FOLDER = Path(__file__).parent / "samplers"


class Listed(str):
    """A name in a list, with facts about it as attributes."""

    facts: dict[str, Any]

    def __new__(cls, name: str, **facts: Any) -> Listed:
        """A string that carries facts."""
        listed = super().__new__(cls, name)
        listed.facts = facts
        return listed

    def __getattr__(self, name: str) -> Any:
        facts = self.__dict__.get("facts", {})
        if name in facts:
            return facts[name]
        raise AttributeError(f"{self!s} has no fact {name!r}")


def list_models() -> list[Listed]:
    """Names of the embedded models, each with `.kind`, `.conditions` and `.summary`."""
    models = []
    for name in embedded_models():
        card = json.loads((ASSETS / name / "card.json").read_text())
        card.pop("shared", None)
        models.append(Listed(name, **card))
    return models


def list_known_models() -> list[Listed]:
    """Names of published models that arvision reads, each with what `arvision.known.KnownModel`
    says, its `.size` in words and the `.samplers` that fit."""
    models = []
    for model in known_models():
        facts = {"size": model.size, **dataclasses.asdict(model)}
        fitting = [each for each in _samplers() if model.kind in each.facts["drives"]]
        without = facts.pop("without")
        facts["samplers"] = [str(each) for each in fitting if each not in without]
        del facts["name"]
        models.append(Listed(model.name, **facts))
    return models


def list_samplers(model: Any = None) -> list[Listed]:
    """Names of the samplers, each with `.lossless` (of its default configuration), `.drives` and
    `.summary`.

    Args:
        model: only samplers that drive this model (a name, folder or pipeline).

    Raises:
        InputError: an unknown model.
        CheckpointError: a folder that holds no pipeline.
    """
    kind = None if model is None else _kind(model)
    return [each for each in _samplers() if kind is None or kind in each.facts["drives"]]


def _samplers() -> list[Listed]:
    """From the registry where it is loaded or packages outside add to it, else from the source."""
    registry = f"{__package__}.samplers"
    if registry not in sys.modules and not entry_points(group=registry):
        return list(_written_samplers())
    from .samplers import SAMPLERS

    return [_sampler(entry.name, entry.value.__doc__, **entry.facts) for entry in SAMPLERS]


def _sampler(name: str, docstring: str | None, *, exact: bool, drives: str) -> Listed:
    summary = (docstring or "").strip().splitlines()[0]
    return Listed(name, lossless=exact, drives=drives, summary=summary)


def _written_samplers() -> Iterator[Listed]:
    """What the decorators `@register(name, exact=..., drives=...)` of our own samplers say."""
    for path in sorted(SAMPLERS_FOLDER.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "register":
                    (name,) = map(ast.literal_eval, mark.args)
                    facts = {str(k.arg): ast.literal_eval(k.value) for k in mark.keywords}
                    yield _sampler(name, ast.get_docstring(node), **facts)


def _kind(model: Any) -> str:
    """Kind of a model, from its card or the name of its network."""
    if not isinstance(model, (str, Path)):
        return model.kind
    for listed in list_models():
        if listed == str(model):
            return listed.facts["kind"]
    place = find_model(model)
    if isinstance(place, str):
        path = fetch_index(Source(place))
    else:
        path = place / index_of(str(place), {one.name: one for one in place.iterdir()})
    content = read_json(path, str(path))
    if path.name == "config.json" or content.get("_class_name") in IMAGE_PIPELINES:
        return "token"
    part = content.get("transformer")
    if not isinstance(part, list) or len(part) != 2:
        raise CheckpointError(f"{model}: no pipeline with a transformer")
    from .models import FAMILIES

    return FAMILIES.entry(part[1]).facts["kind"]
