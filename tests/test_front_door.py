"""What a newcomer meets first opens at once, and loads nothing that it does not need."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import arvision
from arvision import catalog
from arvision.models import FAMILIES
from arvision.samplers import SAMPLERS

HEAVY = ("torch", "diffusers", "transformers", "matplotlib", "scipy")

WALK = """
import json, sys
from typer.testing import CliRunner

def heavy():
    return sorted({name.split(".")[0] for name in sys.modules} & set(HEAVY))

loaded = {}
import arvision
loaded["import arvision"] = heavy()
dir(arvision), arvision.__version__, arvision.InputError
models, samplers = arvision.list_models(), arvision.list_samplers()
fitting = arvision.list_samplers("mar-fashion")
from arvision.cli import app
runner = CliRunner()
said = {}
for line in ("--help", "--version", "models", "samplers", "samplers --model var-fashion",
             "sample --help", "doctor --help", "eval --help", "models --json"):
    done = runner.invoke(app, line.split())
    assert done.exit_code == 0, (line, done.output, done.exception)
    said[line] = done.output
    loaded[line] = heavy()
print(json.dumps([loaded, said, models, [[s, s.facts] for s in samplers], fitting]))
"""


def test_the_front_door_loads_no_library():
    code = f"HEAVY = {HEAVY!r}\n" + WALK
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded, said, models, samplers, fitting = json.loads(done.stdout)
    assert not {step: found for step, found in loaded.items() if found}
    assert models == arvision.list_models()
    # Read from the source there, asked of the registry here.
    assert samplers == [[each, each.facts] for each in arvision.list_samplers()]
    assert fitting == ["ar", "csjd", "cspd"]
    assert said["--version"].strip() == arvision.__version__
    assert "doctor" in said["--help"]
    assert said["samplers"].splitlines()[0].startswith("ar ")
    assert "code" in said["samplers --model var-fashion"]
    assert "sjd" not in said["samplers --model var-fashion"]


def test_source_and_registry_tell_the_same():
    written = {each: each.facts for each in catalog._written_samplers()}
    filed = {
        entry.name: {
            "lossless": entry.facts["exact"],
            "drives": entry.facts["drives"],
            "summary": (entry.value.__doc__ or "").strip().splitlines()[0],
        }
        for entry in SAMPLERS
        if entry.value.__module__.startswith("arvision.")
    }
    assert written == filed
    assert list(written) == list(filed)


def test_cards_tell_the_kind_that_the_network_has(fashion):
    for name in arvision.list_models():
        index = json.loads((catalog.ASSETS / name / "model_index.json").read_text())
        assert FAMILIES.entry(index["transformer"][1]).facts["kind"] == name.kind
    assert arvision.list_samplers("llamagen-fashion") == arvision.list_samplers(fashion)
    assert arvision.list_samplers(catalog.ASSETS / "var-fashion") == ["ar", "code"]


def test_every_public_name_is_there_and_listed():
    assert set(arvision.__all__) <= set(dir(arvision))
    for name in dir(arvision):
        assert getattr(arvision, name) is not None
    for name in ("distill", "compare", "evaluate", "generate", "sample", "load"):
        assert callable(getattr(arvision, name))
    assert arvision.models.LlamaGen is FAMILIES["LlamaGenTransformer"]


def test_an_unknown_name_is_an_attribute_error():
    for module in (arvision, arvision.models):
        with pytest.raises(AttributeError, match="has no attribute 'sampel'"):
            _ = module.sampel
    with pytest.raises(ImportError, match="sampel"):
        exec("from arvision import sampel")


def test_text_models_stay_importable_from_models():
    from arvision import text
    from arvision.models import HFCausalLM, load_text_model

    assert HFCausalLM is text.HFCausalLM
    assert load_text_model is text.load_text_model
    assert {"HFCausalLM", "LlamaGen"} <= set(dir(arvision.models))
