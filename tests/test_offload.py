"""Networks that wait elsewhere between calls draw the same: offloading by diffusers and accelerate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from text_models import random_prompts, tiny_llama
from tiny_pipelines import MAKERS, tiny

import arvision
from arvision.networks import bare, place_of

CPU = torch.device("cpu")


class Away(ModelHook):
    """Weights are NaN except during calls of the module, as if they lay on another device.

    Calls are counted; one within another of the same module is a fault, as real hooks take the
    weights away behind the inner one.
    """

    execution_device = CPU

    def init_hook(self, module):
        self.kept = [(p, p.data) for p in [*module.parameters(), *module.buffers()]]
        self.calls, self.inside = 0, False
        self._take(True)
        return module

    def _take(self, away):
        for holder, data in self.kept:
            is_float = data.is_floating_point()
            holder.data = torch.full_like(data, float("nan") if is_float else 0) if away else data

    def pre_forward(self, module, *args, **kwargs):
        assert not self.inside
        self.calls, self.inside = self.calls + 1, True
        self._take(False)
        return args, kwargs

    def post_forward(self, module, output):
        self.inside = False
        self._take(True)
        return output


def networks(pipe):
    return {n: p for n, p in pipe.components.items() if isinstance(p, torch.nn.Module)}


def draw(pipe, prompt):
    guidance = {} if pipe.kind == "student" else {"guidance_scale": 2.0}
    return pipe(prompt, seed=3, num_images_per_prompt=2, output_type="pt", **guidance)


def pixels_like(images):
    return torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("name", MAKERS)
def test_all_work_goes_through_calls(name):
    pipe, prompt = tiny(name)
    wanted = draw(pipe, prompt)
    pixels = pixels_like(wanted.images)
    codes = pipe.tokenizer.encode(pixels)
    hooks = {}
    for part, network in networks(pipe).items():
        hooks[part] = Away()
        add_hook_to_module(network, hooks[part])
    found = draw(pipe, prompt)
    assert torch.equal(found.tokens, wanted.tokens)
    assert torch.equal(found.images, wanted.images)
    assert torch.equal(pipe.tokenizer.encode(pixels), codes)
    assert all(hook.calls for hook in hooks.values())
    assert ("text_encoder" in hooks) == isinstance(prompt, str) or name == "nextstep"


OFFLOADS: dict[str, Any] = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"),
    "block_level": lambda pipe: pipe.enable_group_offload(
        CPU, offload_type="block_level", num_blocks_per_group=1
    ),
    "leaf_level": lambda pipe: pipe.enable_group_offload(CPU, offload_type="leaf_level"),
}


@pytest.mark.parametrize("kind", OFFLOADS)
@pytest.mark.parametrize("name", MAKERS)
def test_offloaded_pipelines_draw_the_same(name, kind):
    pipe, prompt = tiny(name)
    wanted = draw(pipe, prompt)
    codes = pipe.tokenizer.encode(pixels_like(wanted.images))
    OFFLOADS[kind](pipe)
    if kind == "sequential":
        assert all(p.is_meta for p in pipe.transformer.parameters())
    assert place_of(pipe.transformer) == pipe.model.device
    assert pipe.model.device.type == "cpu"
    found = draw(pipe, prompt)
    assert torch.equal(found.tokens, wanted.tokens)
    assert torch.equal(found.images, wanted.images)
    assert torch.equal(pipe.tokenizer.encode(pixels_like(wanted.images)), codes)
    if kind in ("model", "sequential"):
        pipe.remove_all_hooks()
        assert not any(hasattr(part, "_hf_hook") for part in networks(pipe).values())
        assert torch.equal(draw(pipe, prompt).images, wanted.images)


def test_networks_take_turns_and_go_home():
    """Each network's hook sends the one before it away, and the last draw leaves none behind."""
    pipe, prompt = tiny("captioned")
    pipe.enable_model_cpu_offload(device="cpu")
    order = []
    for name, network in networks(pipe).items():
        hook: Any = network._hf_hook
        before = hook.pre_forward

        def pre_forward(module, *args, _name=name, _before=before, **kwargs):
            order.append(_name)
            return _before(module, *args, **kwargs)

        hook.pre_forward = pre_forward
    draw(pipe, prompt)
    turns = [n for i, n in enumerate(order) if i == 0 or order[i - 1] != n]
    assert turns == ["text_encoder", "transformer", "tokenizer"]
    # The hooks are put on anew, so that weights are home: ours are gone.
    assert not any("pre_forward" in vars(n._hf_hook) for n in networks(pipe).values())


@pytest.mark.parametrize("sampler", ["sjd", "gsd", "zipar", "pjd", "draft", "lantern"])
def test_samplers_with_networks_away(sampler):
    pipe, prompt = tiny("llamagen")
    chosen = arvision.get_sampler(sampler)
    if "draft" in chosen.needs:
        chosen = chosen.bind(draft=tiny("llamagen")[0])
    wanted = pipe(prompt, seed=1, sampler=chosen, output_type="pt")
    for network in networks(pipe).values():
        add_hook_to_module(network, Away())
    found = pipe(prompt, seed=1, sampler=chosen, output_type="pt")
    assert torch.equal(found.tokens, wanted.tokens)
    assert torch.equal(found.images, wanted.images)


def offloaded(way):
    network = tiny_llama()
    if way == "sequential":
        return cpu_offload(network, execution_device=CPU)
    if way == "model":
        return cpu_offload_with_hook(network, execution_device=CPU)[0]
    home = {n: p.detach().clone() for n, p in network.state_dict().items()}
    parts: Any = {"model": "cpu", "lm_head": "cpu"}
    device: Any = "cpu"
    return dispatch_model(network, parts, main_device=device, state_dict=home, force_hooks=True)


DRAFTERS = [None, "prompt_lookup", "token_recycling", "layer_skip", "superposed", "jacobi"]


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("way", ["model", "sequential", "map"])
def test_offloaded_text_models_answer_the_same(way, drafter):
    prompts = random_prompts((5, 9))
    wanted = arvision.generate(tiny_llama(), prompts, max_new_tokens=12)
    found = arvision.generate(offloaded(way), prompts, max_new_tokens=12, drafter=drafter)
    assert found.tokens == wanted.tokens


def test_heads_on_an_offloaded_text_model():
    from arvision.text.drafters.head_drafter import HeadDrafter
    from arvision.text.drafters.heads import MedusaHeads

    prompts = random_prompts((5, 9))
    wanted = arvision.generate(tiny_llama(), prompts, max_new_tokens=12)
    heads = MedusaHeads(32, 2).double()
    away: Any = offloaded("sequential")
    found = arvision.generate(away, prompts, max_new_tokens=12, drafter=HeadDrafter(heads))
    assert found.tokens == wanted.tokens
    assert away.lm_head.weight.is_meta


def test_a_place_is_told_by_hooks():
    pipe, _ = tiny("llamagen")
    assert place_of(pipe.transformer) == CPU
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.transformer._hf_hook.execution_device = torch.device("cuda:1")
    assert place_of(pipe.transformer) == torch.device("cuda:1")
    assert bare(pipe.transformer) is pipe.transformer
