"""Who may import whom, read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "arvision"

# Each part may import the parts in its set, and itself.
GROUND = {
    "errors",
    "contracts",
    "registry",
    "files",
    "checkpoint",
    "lazy",
    "memory",
    "schema",
    "prompt_files",
    "portable",
    "stored",
    "networks",
}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "registry": {"errors"},
    "contracts": {"errors"},
    "file_kinds": {"errors"},
    "files": {"errors", "file_kinds"},
    "memory": {"errors"},
    "batches": {"contracts", "memory"},
    "card": {"errors", "files"},
    "adapters": {"errors", "files", "schema", "stored"},
    "lazy": set(),
    "known": {"errors"},
    "going": set(),
    "networks": set(),
    "acceptance": set(),
    "hosting": {"errors"},
    "schema": {"errors", "files"},
    "prompt_files": {"errors", "files", "schema"},
    "portable": {"errors", "folders", "schema"},
    "headers": {"errors"},
    "needed": {"errors", "schema"},
    "hub": {"errors", "files", "headers", "needed"},
    "stored": {"checkpoint", "errors", "headers", "needed", "schema"},
    "foreign": {"checkpoint", "errors", "files", "schema", "stored"},
    "checkpoint": {"errors", "files", "headers", "schema"},
    "kernels": {"errors"},
    "decoding": {"kernels"} | GROUND,
    "models": {"decoding", "kernels"} | GROUND,
    "samplers": {"decoding"} | GROUND,
    "text": {"decoding", "foreign"} | GROUND,
    "eval": {"folders"} | GROUND,
    "sheet": set(),
    "folders": {"errors", "files", "needed"},
    "inputs": {"errors", "contracts", "decoding", "models"},
    "image_pipeline": {"editing", "pipeline", "inputs", "models", "opening", "samplers"} | GROUND,
    "glm_pipeline": {"drawing", "image_pipeline", "pipeline", "inputs", "models"} | GROUND,
    "opening": {"pipeline", "image_pipeline", "glm_pipeline", "models", "samplers"}
    | {"components", "folders", "foreign", "headers", "hub", "needed"}
    | GROUND,
    "threads": set(),
    "counting": set(),
    "compiling": {"decoding", "quantization"},
    "quantization": {"errors"},
    # A sampler's draft or teacher is a pipeline that a pipeline opens.
    "components": {"folders", "models", "samplers"} | GROUND,
    "editing": {"decoding", "models"} | GROUND,
    "previews": {"models"} | GROUND,
    "drawing": {
        "batches",
        "decoding",
        "editing",
        "inputs",
        "models",
        "previews",
        "samplers",
        "threads",
    }
    | GROUND,
    "pipeline": {
        "card",
        "components",
        "compiling",
        "drawing",
        "editing",
        "quantization",
        "going",
        "models",
        "samplers",
        "folders",
        "inputs",
        "opening",
    }
    | GROUND,
    "catalog": {"folders", "hub", "known", "models", "needed", "samplers"} | GROUND,
    "conversion": {"folders", "known", "models", "pipeline", "samplers"} | GROUND,
    "inspection": {"catalog", "folders", "headers", "hub", "known", "needed"} | GROUND,
    "api": {"adapters", "opening", "pipeline", "samplers", "folders", "inputs"} | GROUND,
    "acceleration": {"models", "samplers", "text"} | GROUND,
    "bench": {"api", "counting", "official", "pipeline", "samplers", "decoding"} | GROUND,
    "official": {"pipeline"} | GROUND,
    "comparison": {"acceptance", "api", "batches", "pipeline", "inputs", "samplers", "sheet"}
    | GROUND,
    "evaluation": {"api", "pipeline", "samplers", "decoding", "eval", "training", "folders"}
    | GROUND,
    "training": {
        "adapters",
        "api",
        "card",
        "pipeline",
        "samplers",
        "models",
        "decoding",
        "eval",
        "sheet",
    }
    | GROUND,
    "fitting": {"text", "training", "decoding"} | GROUND,
    "serving": {"api", "decoding", "glm_pipeline", "image_pipeline", "inputs", "models"}
    | {"pipeline", "previews", "samplers"}
    | GROUND,
    "ui": {"acceptance", "api", "catalog", "folders", "inputs", "opening", "pipeline", "samplers"}
    | {"sheet"}
    | GROUND,
    "testing": {"models"} | GROUND,
}
SEES_ALL = {"cli", "__init__"}
# Names that moved and stay where people import them from, followed on demand.
MOVED = {("models/__init__.py", "text")}


def part_of(module: tuple[str, ...]) -> str:
    """The room that a module belongs to; fitting text models is training, not inference."""
    return "fitting" if module[:2] == ("text", "fitting") else module[0]


def imported_parts(path: Path) -> set[tuple[str, ...]]:
    """Modules of the package that a file imports, as path components below it."""
    here = path.relative_to(PACKAGE).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            base = here[: len(here) - node.level]
            module = tuple(node.module.split(".")) if node.module else ()
            if module or base:
                found.add(base + module)
            else:
                found |= {(alias.name,) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "arvision":
            found.add(("absolute", node.module or ""))
        elif isinstance(node, ast.Import):
            found |= {
                ("absolute", a.name) for a in node.names if a.name.split(".")[0] == "arvision"
            }
    return found


FILES = sorted(p for p in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path):
    part = part_of(path.relative_to(PACKAGE).with_suffix("").parts)
    for target in imported_parts(path):
        assert target[0] != "absolute", f"{path} imports {target[1]} absolutely"
        if part in SEES_ALL:
            continue
        if (path.relative_to(PACKAGE).as_posix(), target[0]) in MOVED:
            continue
        found = part_of(target)
        assert found == part or found in ALLOWED[part], f"{path} imports {target}"
        here = path.relative_to(PACKAGE).parts
        if part == target[0] == "models" and len(target) > 1 and len(here) > 2:
            family = target[1:2]
            names = ("adaptive", "captions", "conditions", "conv_blocks", "latent_head", "network")
            shared = (here[1:2], *((name,) for name in (*names, "pixels", "student")))
            assert family in shared, f"{path}: model families do not know each other"
        if part == "samplers" and path.name not in ("__init__.py", "base.py"):
            own = target[:1] != ("samplers",) or target == ("samplers", "base")
            assert own, f"{path}: samplers do not know each other"


def test_files_stay_small():
    long = {str(p.relative_to(PACKAGE)): len(p.read_text().splitlines()) for p in FILES}
    assert not {name: lines for name, lines in long.items() if lines > 500}


def test_root_links_point_into_the_package():
    root = PACKAGE.parent
    if (root / "PKG-INFO").exists():
        pytest.skip("a source distribution has no links")
    for name in ("models", "samplers", "kernels", "eval"):
        assert (root / name).is_symlink()
        assert (root / name).resolve() == PACKAGE / name
