"""transformers' language models behind the token contract: caches, trees, what is refused."""

from __future__ import annotations

from typing import Any

import accelerate
import pytest
import torch
from forms import slow
from text_models import greedy_reference, random_prompts, tiny_llama

import arvision
from arvision import InputError, StateError
from arvision.contracts import TokenModel
from arvision.text import HFCausalLM, load_text_model


def other_network(kind):
    import transformers as t

    torch.manual_seed(0)
    common: dict[str, Any] = {"vocab_size": 64, "eos_token_id": None, "bos_token_id": None}
    small: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = {
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(n_positions=128, n_embd=32, n_layer=2, n_head=4, **common)
        ),
        "qwen2": lambda: t.Qwen2ForCausalLM(
            t.Qwen2Config(num_key_value_heads=2, intermediate_size=64, **small, **common)
        ),
        "neox": lambda: t.GPTNeoXForCausalLM(
            t.GPTNeoXConfig(intermediate_size=64, **small, **common)
        ),
    }
    return made[kind]().eval().double()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "neox"])
def test_trees_and_ragged_commits_against_full_recomputation(kind):
    network = tiny_llama() if kind == "llama" else other_network(kind)
    model = HFCausalLM(network, 30)
    assert isinstance(model, TokenModel)
    prompts = [torch.tensor(ids) for ids in random_prompts([7, 4, 5])]
    state, logits = model.start(prompts)

    def expected(row, tokens):
        ids = torch.cat([prompts[row], torch.tensor(tokens, dtype=torch.int64)])
        with torch.no_grad():
            return network(ids[None]).logits[0, -1]

    def close(ours, row, tokens):
        torch.testing.assert_close(ours, expected(row, tokens), rtol=0.0, atol=1e-9)

    for row in range(3):
        close(logits[row], row, [])
    tree = torch.tensor(random_prompts([5, 5, 5], seed=1))
    parents = torch.tensor([-1, 0, 0, 1, 2])
    logits = state.extend(tree, parents)
    for row in range(3):
        for path in ([0], [0, 1], [0, 2], [0, 1, 3], [0, 2, 4]):
            close(logits[row, path[-1]], row, tree[row, path].tolist())
    state.commit(torch.tensor([[0, 2, 4], [0, 1, 3], [0, 0, 0]]), torch.tensor([3, 2, 0]))
    committed = [tree[0, [0, 2, 4]].tolist(), tree[1, [0, 1]].tolist(), []]
    assert state.lengths.tolist() == [3, 2, 0]
    chain = torch.tensor(random_prompts([2, 2, 2], seed=2))
    logits = state.extend(chain)
    for row in range(3):
        close(logits[row, 1], row, committed[row] + chain[row].tolist())
    state.commit(torch.tensor([[0, 1]] * 3), torch.tensor([1, 2, 2]))
    state.select(torch.tensor([2, 0]))
    logits = state.extend(torch.tensor([[9], [8]]))
    close(logits[0, 0], 2, [*chain[2].tolist(), 9])
    close(logits[1, 0], 0, [*committed[0], int(chain[0, 0]), 8])


def test_a_draft_pass_of_some_layers_leaves_the_state_alone():
    network = tiny_llama()
    state, _ = HFCausalLM(network, 30).start(random_prompts([6]))
    tokens = torch.tensor([[3, 4]])
    before = state.extend(tokens)
    state.commit(torch.tensor([[0, 1]]), torch.tensor([0]))
    short = state.draft(tokens, layers=[0, 3])
    assert not torch.allclose(short, before)
    assert len(network.model.layers) == 4
    with pytest.raises(StateError, match="call extend first"):
        state.commit(torch.tensor([[0]]), torch.tensor([1]))
    torch.testing.assert_close(state.extend(tokens), before, rtol=0.0, atol=0.0)


def test_what_a_network_lacks_is_named():
    import transformers as t

    with pytest.raises(InputError, match="expected a causal language model"):
        HFCausalLM(torch.nn.Linear(2, 2))
    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1}
    mamba = t.MambaForCausalLM(t.MambaConfig(**sizes, state_size=2))
    with pytest.raises(InputError, match=r"MambaForCausalLM .* position ids"):
        HFCausalLM(mamba)
    local = t.GPTNeoForCausalLM(
        t.GPTNeoConfig(
            vocab_size=32,
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global", "local"], 1]],
        )
    )
    with pytest.raises(InputError, match=r"windowed attention in every layer .*local"):
        HFCausalLM(local)
    # Its configuration does not tell that it builds biases from the places in a mask of its own.
    alibi = t.FalconForCausalLM(t.FalconConfig(**sizes, num_attention_heads=2, alibi=True))
    with pytest.raises(InputError, match="FalconForCausalLM cannot be driven here"):
        HFCausalLM(alibi.eval())


WINDOWED: dict[str, dict[str, Any]] = {
    "Mistral": {},
    "Mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "Starcoder2": {},
    "Phi3": {"pad_token_id": 0},
    "Qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "Qwen3": {"use_sliding_window": True, "max_window_layers": 1, "head_dim": 8},
    "Gemma2": {"head_dim": 8, "attn_implementation": "eager"},
    "Gemma3": {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "GptOss": {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    "Olmo3": {},
    "Cohere2": {},
    "Ministral": {"head_dim": 8},
    "Ministral3": {"head_dim": 8},
    "Exaone4": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "Cwm": {"head_dim": 8, "bos_token_id": 2, "eos_token_id": 1},
    "Doge": {},
}
"""Families whose layers, all or some, see a window; and what their configurations want besides."""


def windowed(name: str, options: dict[str, Any], window: int):
    """A tiny network of that family, float64, whose windowed layers see `window` tokens."""
    import transformers as t

    config = getattr(t, f"{name}TextConfig", None) or getattr(t, f"{name}Config", None)
    if config is None:
        pytest.skip(f"this release of transformers has no {name}")
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "sliding_window": window,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    made = config(**sizes | options)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = getattr(t, f"{name}ForCausalLM")(made).eval()
        # Products grouped by experts exist in single precision at most.
        network = network if "num_local_experts" in options else network.double()
        for parameter in network.parameters():
            parameter.data.mul_(2.0)
    network.generation_config.pad_token_id = 0
    network.generation_config.eos_token_id = None
    return network


@pytest.mark.parametrize("name", sorted(WINDOWED))
def test_windowed_layers_see_their_window_in_trees_and_ragged_batches(name):
    prompts = random_prompts([14, 3, 7])
    answers = {}
    for window in (5, 200):
        network = windowed(name, WINDOWED[name], window)
        expected = [greedy_reference(network, ids, 14) for ids in prompts]
        answers[window] = expected
        for drafter in (None, "prompt_lookup+token_recycling", "jacobi") if window == 5 else ():
            out = arvision.generate(network, prompts, drafter=drafter, max_new_tokens=14)
            assert out.tokens == expected
    assert answers[5] != answers[200]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    # Names a window that its network never looks at: it shows in the trial alone.
    "Moshi": ({"sliding_window": 12, "head_dim": 8}, "are not those of a plain pass"),
    "Llama4Text": (
        {"layer_types": ["chunked_attention", "full_attention"] * 2},
        r"windowed attention in every layer \(it has chunked_attention\)",
    ),
    "Gemma4Text": ({"head_dim": 8, "global_head_dim": 16}, "the same head_dim.* in every layer"),
    "RecurrentGemma": ({"head_dim": 8}, r"it has linear_attention"),
    "MiMoV2Flash": (
        {"layer_types": ["full_attention", "sliding_attention"] * 2},
        "MiMoV2FlashForCausalLM cannot be driven here|the same in every layer",
    ),
    "Lfm2": (
        {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
        "it has conv",
    ),
}
"""Hybrid families that our passes cannot drive, what makes them so, and what is said."""


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_other_hybrids_are_refused_before_a_token_is_drawn(name):
    import transformers as t

    options, message = REFUSED[name]
    config = getattr(t, f"{name}Config", None)
    if config is None:
        pytest.skip(f"this release of transformers has no {name}")
    made = config(
        **{
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "pad_token_id": 0,
            **options,
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = getattr(t, f"{name.removesuffix('Text')}ForCausalLM")(made).eval()
    with pytest.raises(InputError, match=message) as caught:
        arvision.generate(network, random_prompts([6]), max_new_tokens=4)
    assert len(str(caught.value).splitlines()) == 1


def test_falcon_with_one_head_of_keys():
    import transformers as t

    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
    variants: list[dict[str, Any]] = [
        {"multi_query": True, "new_decoder_architecture": False},
        {"multi_query": False, "new_decoder_architecture": False},
        {"new_decoder_architecture": True, "num_kv_heads": 2},
    ]
    for options in variants:
        config = t.FalconConfig(
            **sizes,
            num_attention_heads=4,
            alibi=False,
            bos_token_id=None,
            eos_token_id=None,
            **options,
        )
        network = t.FalconForCausalLM(config).eval().double()
        network.generation_config.pad_token_id = 0
        prompts = random_prompts([9, 4])
        expected = [greedy_reference(network, ids, 12) for ids in prompts]
        out = arvision.generate(network, prompts, drafter="token_recycling", max_new_tokens=12)
        assert out.tokens == expected


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7),
    reason="Dynamo of torch 2.6 loses a name of transformers' modules that give hidden states",
)
@pytest.mark.parametrize("way", [slow("compiled"), "compiled in place", "offloaded"])
def test_compiled_and_offloaded_networks_answer_as_they_are(way):
    prompts = random_prompts([9, 4])
    options: dict[str, Any] = {"drafter": "token_recycling", "max_new_tokens": 8}
    expected = arvision.generate(tiny_llama(num_hidden_layers=1), prompts, **options).tokens
    network: Any = tiny_llama(num_hidden_layers=1)
    if way == "compiled":
        network = torch.compile(network, backend="eager")
    elif way == "compiled in place":
        network.compile(backend="eager")
    else:
        network = accelerate.cpu_offload(network, execution_device=torch.device("cpu"))
    assert arvision.generate(network, prompts, **options).tokens == expected


def test_bad_use_has_one_clear_message():
    model = HFCausalLM(tiny_llama(), 10, tree_room=4)
    for prompt, message in (
        ([], "expected at least one token id"),
        ([1, 64], "holds the id 64: expected 0..63"),
        ([1] * 256, "has 256 tokens: the model has 256 positions"),
    ):
        with pytest.raises(InputError, match=message):
            model.start([prompt])
    with pytest.raises(InputError, match="guidance_scale 2"):
        model.start([[1]], 2.0)
    state, _ = model.start([[1, 2]])
    with pytest.raises(InputError, match="candidate 0 has parent 1"):
        state.extend(torch.tensor([[1, 2]]), torch.tensor([1, -1]))
    with pytest.raises(StateError, match="room for 14 more"):
        state.extend(torch.ones(1, 15, dtype=torch.int64))
    network = tiny_llama()
    network.lm_head.weight.data[3] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        HFCausalLM(network, 4).start([[1]])


def test_models_by_name(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load_text_model(tmp_path / "absent")
    with pytest.raises(InputError, match=r"expected a folder with config.json, or a GGUF"):
        load_text_model(tmp_path)
