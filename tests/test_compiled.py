"""`torch.compile` as people use it: whole graphs that are really run, for every family and for text."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from forms import short_where, slow
from safetensors.torch import load_file
from text_models import random_prompts, tiny_llama
from tiny_pipelines import MAKERS, tiny

import arvision
from arvision.networks import bare, is_compiled


class Counting:
    """A backend that runs graphs as they are, and counts them and their runs."""

    def __init__(self):
        torch._dynamo.reset()
        self.graphs = self.runs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1

        def run(*given):
            self.runs += 1
            return graph.forward(*given)

        return run

    def take(self, network, way, **options) -> Any:
        if way == "wrapped":
            return torch.compile(network, backend=self, **options)
        network.compile(backend=self, **options)
        return network


def draw(pipe, prompt):
    guidance = {} if pipe.kind == "student" else {"guidance_scale": 2.0}
    return pipe(prompt, seed=3, num_images_per_prompt=2, output_type="pt", **guidance)


FAMILIES = ("llamagen", "var", "mar", "infinity", "nextstep", "student")
"""One of each network; the other pipelines vary these."""

WAYS = short_where(
    lambda name, way: name in FAMILIES if way == "wrapped" else name == "llamagen",
    product(MAKERS, ["wrapped", "in place"]),
)


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_compiled_pipelines_draw_the_same(name, way):
    """Without a break: a graph that breaks raises under `fullgraph`."""
    pipe, prompt = tiny(name)
    wanted = draw(pipe, prompt)
    backend = Counting()
    for part in ("transformer", "tokenizer"):
        setattr(pipe, part, backend.take(getattr(pipe, part), way, fullgraph=True))
    found = draw(pipe, prompt)
    # Layers of transformers round otherwise when they are compiled.
    close: dict[str, Any] = (
        {"atol": 1e-3, "rtol": 0} if name == "nextstep" else {"atol": 0, "rtol": 0}
    )
    torch.testing.assert_close(found.tokens, wanted.tokens, **close)
    torch.testing.assert_close(found.images, wanted.images, **close)
    # Every pass and the decoding ran as a graph; prefills and a tokenizer's parts come on top.
    assert backend.runs > found.stats.forward_passes
    assert backend.graphs < 8


def test_a_compiled_part_is_saved_as_it_was(tmp_path):
    pipe, prompt = tiny("llamagen")
    wanted = draw(pipe, prompt)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    pipe.tokenizer.compile(backend="eager")
    assert is_compiled(pipe.transformer)
    assert is_compiled(pipe.tokenizer)
    pipe.save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        assert not any("_orig_mod" in key for key in load_file(file))
    again = arvision.load(tmp_path, device="cpu")
    assert type(again.transformer) is type(bare(pipe.transformer))
    found = again(prompt, seed=3, num_images_per_prompt=2, output_type="pt", guidance_scale=2.0)
    assert torch.equal(found.tokens, wanted.tokens)


def test_compiled_and_offloaded():
    pipe, prompt = tiny("llamagen")
    wanted = draw(pipe, prompt)
    backend = Counting()
    pipe.transformer = torch.compile(pipe.transformer, backend=backend)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(draw(pipe, prompt).tokens, wanted.tokens)
    assert backend.runs


def small():
    return tiny_llama(num_hidden_layers=2)


@pytest.mark.parametrize("way", ["wrapped", slow("in place")])
def test_compiled_text_models(way):
    prompts = random_prompts((5, 9))
    wanted = arvision.generate(small(), prompts, max_new_tokens=6).tokens
    backend = Counting()
    network = backend.take(small(), way)
    out = arvision.generate(network, prompts, max_new_tokens=6)
    assert out.tokens == wanted
    assert backend.runs > out.stats.forward_passes
    # Half of the layers, by a change of the network that graphs would not see.
    found = arvision.generate(network, prompts, max_new_tokens=6, drafter="layer_skip")
    assert found.tokens == wanted


def test_compiled_drafts_and_heads():
    from arvision.text.drafters.head_drafter import HeadDrafter
    from arvision.text.drafters.heads import MedusaHeads

    prompts = random_prompts((5, 9))
    wanted = arvision.generate(tiny_llama(), prompts, max_new_tokens=12).tokens
    backend, target = Counting(), Counting()
    draft = backend.take(tiny_llama(seed=1), "wrapped")
    options: dict[str, Any] = {"drafter": "draft_model", "drafter_options": {"draft": draft}}
    found = arvision.generate(tiny_llama(), prompts, max_new_tokens=12, **options)
    assert found.tokens == wanted
    assert backend.runs
    heads = HeadDrafter(MedusaHeads(32, 2).double())
    network = target.take(tiny_llama(), "wrapped")
    found = arvision.generate(network, prompts, max_new_tokens=12, drafter=heads)
    assert found.tokens == wanted
    assert target.runs


def image_family(name) -> tuple[Any, Any, list[torch.Tensor]]:
    """A family's class with its options, a tiny network of transformers, and prompts."""
    import image_networks as nets

    from arvision.models import Chameleon, Emu3, GlmImage, Janus

    return {
        "janus": (Janus, nets.tiny_janus(side=3), nets.janus_prompts((5, 7))),
        "emu3": (partial(Emu3, grids=[(4, 3)]), nets.tiny_emu3(), nets.emu3_prompts((4, 6))),
        "chameleon": (
            partial(Chameleon, grids=[(3, 4)]),
            nets.tiny_chameleon(),
            nets.chameleon_prompts((3, 5)),
        ),
        "glm": (
            partial(GlmImage, grids=[(2, 3), (3, 4)]),
            nets.tiny_glm(),
            nets.glm_prompts((4, 6)),
        ),
    }[name]


@pytest.mark.parametrize("way", ["wrapped", "in place", "inner in place"])
@pytest.mark.parametrize("name", ["janus", slow("emu3"), slow("chameleon"), slow("glm")])
def test_compiled_image_networks_of_transformers(name, way):
    family, network, prompts = image_family(name)
    model = family(network)
    options: dict[str, Any] = {"seeds": [0, 1], "guidance_scale": 2.0 if model.has_guidance else 1}
    sampler = arvision.get_sampler("sjd:window=3")
    wanted = sampler(model, prompts, **options)
    backend = Counting()
    if way == "inner in place":
        backend.take(network.model, "in place")
    else:
        # A model that has drawn before; in place its network is the same object.
        model.network = backend.take(network, way)
    found = sampler(model, prompts, **options)
    assert torch.equal(found.tokens, wanted.tokens)
    # A graph for each shape of a pass, and every pass ran as one.
    assert backend.runs >= found.stats.forward_passes
    graphs = backend.graphs
    assert torch.equal(sampler(model, prompts, **options).tokens, wanted.tokens)
    assert backend.graphs == graphs  # kept


def test_networks_compiled_where_nothing_tells_how_say_so(monkeypatch):
    family, network, prompts = image_family("janus")
    network._compiled_call_impl = network._call_impl  # a torch that keeps it elsewhere
    with pytest.warns(
        UserWarning, match="does not reach the LlamaModel that draws: use torch.comp"
    ):
        arvision.get_sampler("ar")(family(network), prompts, seeds=[0, 1], guidance_scale=2.0)


@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_networks_of_models_may_be_replaced_by_compiled_ones(way):
    from arvision.text.model import as_text_model

    prompts, backend = random_prompts((5, 9)), Counting()
    wanted = arvision.generate(tiny_llama(), prompts, max_new_tokens=12).tokens
    model = as_text_model(tiny_llama(), 30)
    network = model.network
    model.network = backend.take(network, way)
    assert model.network is network
    out = arvision.generate(model, prompts, max_new_tokens=12)
    assert out.tokens == wanted
    assert backend.runs > out.stats.forward_passes
