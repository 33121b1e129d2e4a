"""Models and samplers whose passes run the kernels draw the tokens of those that run the references."""

import pytest
import torch
from forms import covered, slow

from arvision import ARPipeline, generate, get_sampler
from arvision.decoding.cache import KVCache
from arvision.kernels import dispatch
from arvision.kernels.dispatch import is_interpreted
from arvision.testing import tiny_llamagen

CAPTIONS = {"caption_dim": 16, "caption_length": 6, "num_classes": None}
CHAINS = ["ar", "sjd:window=3", "sjd:window=3:coupling=maximal"]
TREES = ["sjd:window=8:tree=drift", "sjd:window=8:tree=static:coupling=maximal"]


def kind_of(value):
    return value if isinstance(value, str) else "padded" if value is CAPTIONS else "grouped"


def both(draw, *operations):
    """What `draw` gives with references and with kernels, after a look at which kernels ran."""
    with dispatch.taking("reference"):
        expected = draw()
    dispatch.LAST.clear()
    with dispatch.taking("triton"):
        ours = draw()
    assert all(dispatch.LAST.get(name, dispatch.ON_CPU).is_triton for name in operations), (
        dispatch.LAST
    )
    return ours, expected


def llamagen(device, **sizes):
    model = tiny_llamagen(grid=(2, 3), num_layers=1, **sizes).to(device)
    if "caption_dim" not in sizes:
        return model, [0, 2]
    generator = torch.Generator().manual_seed(1)
    return model, [torch.randn(num, 16, generator=generator).to(device) for num in (2, 6)]


@pytest.mark.parametrize(
    ("spec", "sizes"), covered(CHAINS + TREES, [{"num_kv_heads": 2}, CAPTIONS]), ids=kind_of
)
def test_ragged_llamagen(device, spec, sizes):
    model, conditions = llamagen(device, **sizes)
    sampler = get_sampler(spec)

    def draw():
        return sampler(model, conditions, seeds=[3, 4], guidance_scale=2.0)

    # One candidate behind rows of one length needs no mask, and goes to PyTorch's flash attention.
    is_plain = spec == "ar" and "caption_dim" not in sizes
    ours, expected = both(draw, "sampling", *(() if is_plain else ("tree_attention",)))
    assert ("tree_attention" in dispatch.LAST) == (not is_plain)
    assert ours.tokens.equal(expected.tokens)
    assert ours.stats["passes_per_image"] == expected.stats["passes_per_image"]


def test_float64_keeps_to_pytorch_in_attention_alone(device):
    model, conditions = llamagen(device)
    model.transformer.double()
    sampler = get_sampler(TREES[0])
    ours, expected = both(
        lambda: sampler(model, conditions, seeds=[3, 4], guidance_scale=2.0).tokens, "verify"
    )
    assert ours.equal(expected)
    assert "tree_attention" not in dispatch.LAST


@pytest.mark.parametrize("coupling", ["gumbel", "maximal"])
def test_fixed_steps(device, coupling):
    model = tiny_llamagen(grid=(2, 3), num_layers=1).to(device)
    pipe = ARPipeline.from_model(model).compile("eager")

    def draw():
        sampler = get_sampler(f"sjd:window=3:coupling={coupling}")
        out = pipe(["cat", "dog"], sampler=sampler, seed=[1, 2], output_type="latent")
        assert out.stats.step == "eager"
        return out.tokens

    ours, expected = both(draw, "tree_attention", "sampling", "verify")
    assert ours.equal(expected)


@pytest.mark.parametrize("sampler", ["prompt_lookup", "token_recycling"])
def test_text_of_grouped_queries(device, sampler):
    from text_models import random_prompts, tiny_llama

    network = tiny_llama(num_hidden_layers=1).float().to(device)
    prompts = random_prompts([5, 3])
    prompts = [prompt + prompt for prompt in prompts]

    def draw():
        options = {"max_new_tokens": 6, "seed": 3, "temperature": 1.0}
        return generate(network, prompts, drafter=sampler, **options).tokens

    ours, expected = both(draw, "tree_attention")
    assert ours == expected
    assert network.config._attn_implementation == "sdpa"


WINDOWED = {
    "Mistral": {},
    "Ministral": {"layer_types": ["sliding_attention", "full_attention"]},
    "Gemma3Text": {"layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.mark.parametrize("name", [slow("Mistral"), slow("Ministral"), "Gemma3Text"])
def test_text_of_layers_with_a_window(device, name):
    """All layers, those with a window too, go through the kernel, and the window matters."""
    from text_models import random_prompts

    from arvision.kernels.tree_attention import triton

    inner, sights = triton.tree_attention, []

    def counted(queries, keys, values, sight, scale):
        sights.append(sight)
        return inner(queries, keys, values, sight, scale)

    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config", None)
    if config is None:
        pytest.skip(f"this release of transformers has no {name}")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sizes |= {"max_position_embeddings": 256, "eos_token_id": None, "bos_token_id": None}
    prompts = [prompt + prompt for prompt in random_prompts([9, 4])]
    answers = []
    for window in (5, 200):
        sights.clear()
        made = config(**sizes, sliding_window=window, **WINDOWED[name])
        with torch.random.fork_rng():
            torch.manual_seed(1)
            kind = name.removesuffix("Text")
            network = getattr(transformers, f"{kind}ForCausalLM")(made).eval().to(device)
        for parameter in network.parameters():
            parameter.data.mul_(2.0)
        network.generation_config.eos_token_id = None

        def draw(network=network):
            options = {"max_new_tokens": 6, "drafter": "prompt_lookup+token_recycling"}
            return generate(network, prompts, **options).tokens

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton, "tree_attention", counted)
            ours, expected = both(draw, "tree_attention")
        has_window = [sight.firsts is not None for sight in sights]
        assert any(has_window) == (window == 5)
        assert all(has_window) == (window == 5 and name == "Mistral")
        assert ours == expected
        answers.append(ours)
    assert answers[0] != answers[1]


@pytest.mark.parametrize("spec", ["sjd:window=3", TREES[0]])
def test_an_image_model_of_transformers(device, spec):
    from image_networks import janus_prompts, tiny_janus

    from arvision.models import Janus

    model = Janus(tiny_janus(side=2).float().to(device))
    prompts = [prompt.tolist() for prompt in janus_prompts([2, 4])]
    sampler = get_sampler(spec)
    ours, expected = both(
        lambda: sampler(model, prompts, seeds=[1, 2], guidance_scale=3.0).tokens, "tree_attention"
    )
    assert ours.equal(expected)


def test_layers_with_more_than_a_mask_keep_to_pytorch(device):
    from arvision.decoding.transformers_cache import layer_attention

    cache = KVCache(1, 2, 2, 20, 8, device=device, dtype=torch.float32)
    with dispatch.taking("triton"):
        _, mask = cache.begin(4)
        assert mask is not None
        keys, values = cache.update(0, *torch.randn(2, 2, 2, 4, 8, device=device))
        queries, module = torch.randn(2, 2, 4, 8, device=device), torch.nn.Module()
        plain, _ = layer_attention(module, queries, keys, values, mask)
        dispatch.LAST.clear()
        bias = torch.randn(1, 2, 4, 4, device=device)
        biased, _ = layer_attention(module, queries, keys, values, mask, position_bias=bias)
        cut, _ = layer_attention(module, queries[:, :, :2], keys, values, mask[:, :, :2])
        assert not dispatch.LAST
    assert not torch.allclose(plain, biased, atol=1e-3)
    torch.testing.assert_close(cut, plain[:, :2])


@pytest.mark.skipif(not is_interpreted(), reason="a GPU takes its kernels by itself")
def test_a_cpu_takes_no_kernel_by_itself():
    _, mask = KVCache(1, 1, 2, 20, 8, device=torch.device("cpu"), dtype=torch.float32).begin(4)
    assert not hasattr(mask, "sight")
