"""Scales, chains of heads and students' passes as functions of fixed shapes: one graph each, kept."""

from __future__ import annotations

import pytest
import torch
from taped import Taped
from tiny_pipelines import tiny

import arvision
from arvision.decoding.fixed_step import Steps
from arvision.decoding.graphs import GraphPool
from arvision.decoding.parts import FixedPart

# Parts of a call: scales behind the first; chains of a set; both passes.
FAMILIES = {
    "var": 3,
    "var shared": 3,
    "infinity": 2,
    "infinity inside": 2,
    "mar": 1,
    "nextstep": 1,
    "student": 1,
    "var student": 1,
}


class Family:
    def __init__(self, name):
        pipe, self.prompt = tiny(name)
        is_student = pipe.kind == "student"
        sampler = pipe.sampler if is_student else arvision.get_sampler("ar")
        self.model, self.sampler = pipe.model, pipe.bind(sampler, pipe.model)
        self.options = {} if is_student else {"guidance_scale": 2.0}
        if name != "nextstep":
            for part in (pipe.transformer, pipe.tokenizer):
                part.double()

    def draw(self, first=0, **more):
        seeds = [(first, 0), (first, 1)]
        return self.sampler(self.model, [self.prompt] * 2, seeds=seeds, **self.options, **more)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param, Family(request.param)


def test_a_part_is_captured_once_and_replayed(family, monkeypatch):
    name, family = family
    wanted = [family.draw(first) for first in (0, 5)]
    eager = family.draw(steps=Steps("eager"))
    assert torch.equal(eager.tokens, wanted[0].tokens)
    assert (eager.stats.step, eager.stats.warm_up) == ("eager", 0)
    steps, capture = Steps("auto"), Taped()
    steps.graphs = GraphPool(capture, "cpu")
    found = family.draw(steps=steps)
    assert torch.equal(found.tokens, wanted[0].tokens)
    assert found.stats.warm_up > 0
    assert len(capture.tapes) == FAMILIES[name]

    def no_work(self):
        raise AssertionError("Python did the work")

    monkeypatch.setattr(FixedPart, "__call__", no_work)
    again = family.draw(5, steps=steps)
    assert torch.equal(again.tokens, wanted[1].tokens)
    assert again.stats.warm_up == 0
    assert torch.equal(found.tokens, wanted[0].tokens)
    # All that a graph looks at stands in the pool's memory or is a weight, or a table of a device.
    for tape in capture.tapes:
        assert not tape.literals


def test_a_part_compiles_without_a_break(family):
    """Whole scales with their draw, a head's whole chain, a student's pass."""
    name, family = family
    wanted, graphs = family.draw(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(FixedPart.__call__, backend=backend, fullgraph=True, dynamic=False)

    class Compiler(GraphPool):
        def ready(self, step):
            return lambda: compiled(step)

    steps = Steps("auto")
    steps.graphs = Compiler(device_type="cpu")
    found = family.draw(steps=steps)
    torch.testing.assert_close(found.tokens, wanted.tokens, rtol=0, atol=1e-4)
    assert len(graphs) == FAMILIES[name]


def test_pipelines_capture_their_parts():
    pipe, prompt = tiny("var")
    wanted = pipe(prompt, seed=3, output_type="latent")
    assert "step" not in wanted.stats
    found = pipe.compile("eager")(prompt, seed=3, output_type="latent")
    assert found.stats.step == "eager"
    assert torch.equal(found.tokens, wanted.tokens)
