"""`benchmarks/gpu.py` runs on small sizes here, so that its first run on a GPU does not fail on a typo."""

from __future__ import annotations

import json

import pytest
import torch

from arvision.models import LlamaGenTransformer, VARTransformer
from benchmarks import gpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="sizes of a machine without GPU")


def run(tmp_path, *arguments):
    return gpu.main(["--tiny", "--out", str(tmp_path), *arguments])


def test_all_parts_run_and_are_resumed(tmp_path, capsys, monkeypatch):
    quick = [name for name in gpu.PARTS if name not in ("kernels", "kernel-times")]
    assert run(tmp_path, "--parts", ",".join(quick)) == 0
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in quick}
    assert all(share == 1 for case, share in found["loops"].items() if " and " in case)
    assert {"window 1, loop", "window 32, eager"} <= set(found["llamagen-xl"]["passes"])
    table = capsys.readouterr().out
    for name in ("llamagen-3b", "text-1.7b", "var-d30", "mar-l", "students"):
        assert f"| {name} |" in table
    monkeypatch.setattr(gpu, "run_part", lambda *_: pytest.fail("it is there"))
    assert run(tmp_path, "--parts", ",".join(quick)) == 0
    assert run(tmp_path, "--parts", "mar-b,kernels", "--minutes", "0") == 0
    assert "kernels: left for another run" in capsys.readouterr().err


@pytest.mark.slow
def test_the_parts_of_the_kernels(tmp_path):
    assert run(tmp_path, "--parts", "kernels,kernel-times") == 0
    assert json.loads((tmp_path / "kernels.json").read_text())["passed"]


def test_what_it_refuses(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "waits for one" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(tmp_path, "--parts", "llamagen-xxl")


def test_published_sizes():
    """Weights in millions, as the authors tell them."""
    with torch.device("meta"):
        nets: dict[str, torch.nn.Module] = {
            n: LlamaGenTransformer(**s, grid=(24, 24)) for n, s in gpu.LLAMAGEN.items()
        }
        for name, depth in gpu.VARS.items():
            nets[name] = VARTransformer(hidden_size=64 * depth, num_layers=depth, num_heads=depth)
    told = {"llamagen-b": 111, "llamagen-xl": 775, "llamagen-3b": 3100, "var-d16": 310}
    for name, millions in (told | {"var-d30": 2000}).items():
        size = sum(p.numel() for p in nets[name].parameters()) / 1e6
        assert abs(size / millions - 1) < 0.03, (name, size)
