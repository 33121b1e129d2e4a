"""MTP layers: read from the published layouts of real classes, run as drafters, better trained than not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from text_models import greedy_reference, random_prompts, tiny_llama, walking_llama

import arvision
from arvision import CheckpointError
from arvision.text.drafters import MTP
from arvision.text.drafters.features import FeatureState
from arvision.text.drafters.mtp import LAYOUTS, MTPLayer, load_mtp
from arvision.text.fitting.data import answer
from arvision.text.fitting.eagle3 import Unrolled, unrolled_mask

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


def deepseek():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes: dict[str, Any] = SIZES | {"num_key_value_heads": 4}
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **sizes, q_lora_rank=8, kv_lora_rank=12, qk_rope_head_dim=4, qk_nope_head_dim=6,
            v_head_dim=10, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
            moe_intermediate_size=16, n_shared_experts=1, first_k_dense_replace=1,
        )
    )  # fmt: skip


def glm():
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    sizes: dict[str, Any] = SIZES | {"head_dim": 8}
    return Glm4MoeForCausalLM(
        Glm4MoeConfig(
            **sizes, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
            topk_group=1, moe_intermediate_size=16, n_shared_experts=1, first_k_dense_replace=1,
        )
    )  # fmt: skip


def qwen3_next():
    """Qwen3-Next with full attention in every layer: its linear attention cannot take trees."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    return Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **SIZES, head_dim=8, layer_types=["full_attention"] * 3, num_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        )
    )  # fmt: skip


def qwen2():
    """MiMo-7B is a Qwen2 with an MTP layer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**SIZES))


CASES = {
    "deepseek": (deepseek, "nextn"),
    "glm": (glm, "nextn"),
    "qwen3_next": (qwen3_next, "mtp"),
    "mimo": (qwen2, "mtp_layers"),
}


def published(layer, layout, num_layers):
    """A layer's weights under the published names, experts one by one, with shared copies."""
    form = LAYOUTS[layout]
    own = dict(
        zip(("embedding_norm", "hidden_norm", "projection", "last_norm"), form.names, strict=True)
    )
    block, parts = form.block.format(num_layers), form.parts.format(num_layers)
    tensors = {}
    for key, value in layer.state_dict().items():
        first, rest = key.split(".", 1)
        if first in own:
            tensors[f"{parts}{own[first]}.weight"] = value
        elif rest.endswith("experts.gate_up_proj"):
            for number, both in enumerate(value):
                for side, half in zip(("gate", "up"), both.chunk(2), strict=True):
                    tensors[f"{block}mlp.experts.{number}.{side}_proj.weight"] = half
        elif rest.endswith("experts.down_proj"):
            for number, down in enumerate(value):
                tensors[f"{block}mlp.experts.{number}.down_proj.weight"] = down
        else:
            tensors[f"{block}{rest}"] = value
    if layout == "nextn":
        tensors[f"{block}embed_tokens.weight"] = torch.zeros(64, 32)
        tensors[f"{block}shared_head.head.weight"] = torch.zeros(64, 32)
    return {key: value.detach().clone().contiguous() for key, value in tensors.items()}


@pytest.mark.parametrize("case", sorted(CASES))
def test_a_published_layer_loads_beside_its_model_and_keeps_the_text(case, tmp_path):
    make, layout = CASES[case]
    torch.manual_seed(0)
    network = make().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2.0)
    layer = MTPLayer(network, layout)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    network.save_pretrained(tmp_path)
    save_file(published(layer, layout, 3), tmp_path / "model-mtp.safetensors")
    loaded = load_mtp(network, tmp_path)
    for key, value in layer.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    prompts = random_prompts([9, 6])
    expected = [greedy_reference(network, ids, 16) for ids in prompts]
    variants: tuple[dict[str, Any], ...] = ({}, {"expansion": "chain"})
    for options in variants:
        drafter = MTP(tmp_path, **options)
        out = arvision.generate(network, prompts, drafter=drafter, max_new_tokens=16)
        assert out.tokens == expected
        assert max(out.stats.windows) == (4 if options else 5)


def test_the_layer_is_looked_for_where_the_model_came_from(tmp_path):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    network = qwen2().eval()
    layer = MTPLayer(network, "mtp_layers")
    torch.nn.init.normal_(layer.projection.weight, std=0.2)
    network.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no MTP layer, expected model\.layers"):
        arvision.generate(
            network,
            [[1, 2]],
            drafter="mtp",
            drafter_options={"folder": tmp_path},
            max_new_tokens=8,
        )
    tensors = published(layer, "mtp_layers", 3)
    save_file(tensors, tmp_path / "model-mtp.safetensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    out = arvision.generate(again, [[1, 2]], drafter="mtp", max_new_tokens=8)
    assert out.tokens == [greedy_reference(again, [1, 2], 8)]
    del tensors["model.mtp_layers.0.hidden_layernorm.weight"]
    save_file(tensors, tmp_path / "model-mtp.safetensors")
    with pytest.raises(CheckpointError, match=r"hidden_norm\.weight"):
        load_mtp(again, tmp_path)
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        load_mtp(again, tmp_path / "nowhere")


def test_a_trained_layer_beats_an_untrained_one_on_prompts_it_has_not_seen(tmp_path):
    """DeepSeek's objective on the target's own answers, one level deep."""
    network = walking_llama()
    answers = answer(
        network, random_prompts([6] * 48, seed=9), num_tokens=40, batch_size=24, progress=False
    )
    torch.manual_seed(0)
    layer = MTPLayer(network, "nextn").train()
    fresh = {key: value.clone() for key, value in published(layer, "nextn", 4).items()}
    texts = torch.tensor(answers.texts)
    with torch.no_grad():
        hidden = network.model(texts).last_hidden_state
    mask = unrolled_mask(texts.shape[1] - 1, 0, hidden)
    positions = torch.arange(texts.shape[1] - 1).expand(len(texts), -1)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(60):
        embedded = network.model.embed_tokens(texts[:, 1:])
        out = layer.step(embedded, hidden[:, :-1], mask, positions, Unrolled())
        logits = layer.logits(out[:, 4:-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), texts[:, 6:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    unseen = random_prompts([6] * 6, seed=10)
    expected = [greedy_reference(network, ids, 30) for ids in unseen]
    passes = []
    for name, tensors in (("fresh", fresh), ("trained", published(layer, "nextn", 4))):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        out = arvision.generate(
            network, unseen, drafter=MTP(tmp_path / name, max_depth=1), max_new_tokens=30
        )
        assert out.tokens == expected
        passes.append(out.stats.tokens_per_pass)
    assert passes[1] > passes[0] + 0.45


@pytest.mark.parametrize(
    ("expansion", "rule"), [("dyspec", "gumbel"), ("independent", "multi_round")]
)
def test_rules_judge_an_mtp_layer_exactly(expansion, rule, tmp_path):
    from arvision.testing import law_p_value

    network = tiny_llama(vocab_size=4, num_hidden_layers=2, sharpness=1.0)
    texts = torch.cartesian_prod(*[torch.arange(4)] * 3)
    ids = torch.cat([torch.tensor([0, 1]).expand(64, 2), texts], dim=1)
    with torch.no_grad():
        logp = network(ids).logits[:, 1:-1].log_softmax(-1)
    joint = logp.gather(2, texts[..., None])[..., 0].sum(1).exp()
    torch.manual_seed(0)
    layer = MTPLayer(network, "nextn")
    tensors = {k: v for k, v in published(layer, "nextn", 2).items() if "embed" not in k}
    save_file(tensors, tmp_path / "model.safetensors")
    drafter = MTP(tmp_path, expansion=expansion, branching=(2, 1))
    out = arvision.generate(
        network, [[0, 1]] * 600, drafter=drafter, rule=rule, temperature=1.0, max_new_tokens=3
    )
    found = (torch.tensor(out.tokens) * torch.tensor([16, 4, 1])).sum(1)
    assert law_p_value(found, joint) > 1e-5
    assert FeatureState.__name__ == type(drafter._state).__name__
