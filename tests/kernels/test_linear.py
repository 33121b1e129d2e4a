"""The packed linear layer computes what `torch.nn.Linear` computes, and follows its weight."""

import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from arvision.cli.doctor import examine
from arvision.kernels.linear import (
    Linear,
    packed,
    packed_operators,
    packing_pays,
    runs_packed,
)


@pytest.fixture(autouse=True, params=[True, False], ids=["packed", "plain"])
def everywhere(request, monkeypatch):
    """Both paths on any machine that has both."""
    can = torch.backends.mkldnn.is_available()
    monkeypatch.setattr(packed, "packing_pays", lambda: request.param and can)
    return request.param and can


@pytest.mark.parametrize("rows", [1, 3, 4, 17, 64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1), (7, 13), (256, 432)])
@torch.no_grad()
def test_equals_linear(rows, bias, sizes):
    torch.manual_seed(0)
    layer = Linear(*sizes, bias=bias)
    x = torch.randn(2, rows, sizes[0])
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_takes_the_packed_path_only_where_it_says(everywhere):
    layer, x = Linear(8, 8), torch.randn(16, 8)
    assert runs_packed(x, layer.weight) == everywhere
    assert not runs_packed(x[:2], layer.weight)
    assert not runs_packed(x.double(), layer.weight.double())
    with torch.enable_grad():
        assert not runs_packed(x, layer.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not runs_packed(x, layer.weight)
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [1, 2, 17])
@torch.no_grad()
def test_bfloat16_is_packed_where_the_cpu_multiplies_it(rows):
    torch.manual_seed(1)
    layer = Linear(96, 40).to(torch.bfloat16)
    x = torch.randn(1, rows, 96).to(torch.bfloat16)
    assert runs_packed(x, layer.weight) == packed.packs_bfloat16()
    for _ in range(2):
        found = layer(x)
        expected = F.linear(x.double(), layer.weight.double(), layer.bias.double())
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)
        layer.weight.mul_(-2)
    assert not runs_packed(x.half(), layer.weight.half())
    assert not runs_packed(x, layer.weight.float())


@torch.no_grad()
def test_follows_a_changed_weight():
    layer, x = Linear(8, 8, bias=False), torch.randn(16, 8)
    before = layer(x)
    layer.weight.mul_(2)
    torch.testing.assert_close(layer(x), 2 * before)
    layer.load_state_dict({"weight": torch.eye(8)})
    torch.testing.assert_close(layer(x), x)
    layer.weight.data = 3 * torch.eye(8)
    torch.testing.assert_close(layer(x), 3 * x)
    twin = copy.deepcopy(layer)
    twin.weight.zero_()
    assert not twin(x).any()
    assert layer(x).any()


def test_gradients_flow():
    layer, x = Linear(8, 8), torch.randn(16, 8, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None


@pytest.mark.parametrize(
    ("vendor", "capability", "pays"),
    [
        ("GenuineIntel", "AVX512", False),
        ("GenuineIntel", "AVX2", True),
        ("AuthenticAMD", "AVX512", True),
    ],
)
def test_packs_where_mkl_is_slow(monkeypatch, vendor, capability, pays):
    monkeypatch.setattr(packed.Path, "read_text", lambda self: f"vendor_id : {vendor}")
    monkeypatch.setattr(packed.Path, "exists", lambda self: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert packing_pays.__wrapped__() == pays


BUILDS = {
    "no oneDNN": SimpleNamespace(),
    "another operator": SimpleNamespace(
        _reorder_linear_weight=SimpleNamespace(default=lambda weight, _: weight),
        _linear_pointwise=SimpleNamespace(default=lambda x, w, b, *_: F.linear(x, w)),
    ),
    "another signature": SimpleNamespace(
        _reorder_linear_weight=SimpleNamespace(default=lambda weight: weight),
        _linear_pointwise=SimpleNamespace(default=F.linear),
    ),
}


@pytest.fixture(params=BUILDS)
def other_build(request, monkeypatch):
    """A build of PyTorch whose private operators are missing or differ."""
    monkeypatch.setattr(torch.ops, "mkldnn", BUILDS[request.param])
    packed_operators.cache_clear()
    yield
    packed_operators.cache_clear()


@torch.no_grad()
def test_a_build_without_the_packed_product_falls_back(other_build):
    layer, x = Linear(8, 8), torch.randn(16, 8)
    assert packed_operators() is None
    assert not runs_packed(x, layer.weight)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    told = examine("cpu")["operations"]["linear"]
    assert told["implementation"] == "torch"
    assert told["reason"] == "this build of PyTorch lacks oneDNN's packed product"


def test_doctor_tells_which_product_runs(everywhere, monkeypatch):
    monkeypatch.setattr("arvision.kernels.linear.packing_pays", packed.packing_pays)
    told = examine("cpu")["operations"]["linear"]
    assert told["implementation"] == ("onednn" if everywhere else "torch")


@pytest.mark.parametrize("everywhere", [True], indirect=True)
def test_the_package_imports_on_such_a_build():
    code = (
        "import torch, types; torch.ops.mkldnn = types.SimpleNamespace(); import arvision.models; "
        "print(arvision.models.LlamaGen.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "LlamaGen", done.stderr
