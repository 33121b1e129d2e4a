"""`arvision doctor` as a user runs it."""

import json

import torch

from arvision.kernels.dispatch import OPS


def test_every_operation_and_version_is_told(cli):
    done = cli("doctor", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert set(told["operations"]) == {*OPS, "linear", "step"}
    for name in OPS:
        assert told["operations"][name]["implementation"] == "reference"
        assert told["operations"][name]["reason"] == "Triton does not compile for cpu tensors"
        assert told["operations"][name]["used_by"]
    assert told["versions"]["torch"] == torch.__version__
    assert told["devices"][0]["device"] == "cpu"


def test_a_device_that_is_not_here(cli):
    done = cli("doctor", "--device", "cuda:99")
    assert done.returncode == 2
    assert done.stderr.strip().startswith("arvision: device 'cuda:99': expected one of cpu")
    assert len(done.stderr.splitlines()) == 1
