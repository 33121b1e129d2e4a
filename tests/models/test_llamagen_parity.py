"""Every LlamaGen golden: the official code's numbers, to 1e-5 of each tensor's largest value."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from arvision import get_sampler
from arvision.models import LlamaGen, LlamaGenTokenizer

TOLERANCE = 1e-5  # float32 rounding in another order of operations
TRANSFORMERS = ["gpt_c2i", "gpt_c2i_gqa", "gpt_t2i", "gpt_t2i_short"]


def relative_error(ours: torch.Tensor, official: torch.Tensor) -> float:
    assert ours.shape == official.shape
    return float((ours - official).abs().max() / official.abs().max())


def load_case(goldens, name):
    folder = goldens / "llamagen"
    sizes = json.loads((folder / f"{name}.json").read_text())
    io = load_file(folder / f"{name}.io.safetensors")
    if name == "gpt_c2i":
        io |= load_file(folder / "gpt_c2i.pair.io.safetensors")
    model = LlamaGen.from_official(
        folder / f"{name}.pt",
        num_heads=sizes["n_head"],
        num_tokens=sizes["block_size"],
    )
    if "class_ids" in io:
        conditions = io["class_ids"].tolist()
    else:
        valid = io["caption_mask"].bool()
        conditions = [f[v] for f, v in zip(io["caption_features"], valid, strict=True)]
    return model, conditions, io, sizes


def one_by_one(model, conditions, tokens, scale):
    state, logits = model.start(conditions, scale)
    rows = [logits]
    kept = torch.zeros(len(tokens), 1, dtype=torch.int64)
    for step in range(tokens.shape[1] - 1):
        rows.append(state.extend(tokens[:, step : step + 1])[:, 0])
        state.commit(kept, torch.ones(len(tokens), dtype=torch.int64))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize(("scale", "kind"), [(1.0, "cond"), (0.0, "null")])
def test_cached_logits(goldens, name, scale, kind):
    model, conditions, io, _ = load_case(goldens, name)
    ours = one_by_one(model, conditions, io["tokens"], scale)
    checked = 0
    for key in (f"logits_{kind}", f"logits_{kind}_cached", f"pair_logits_{kind}"):
        if key in io:
            assert relative_error(ours, io[key]) < TOLERANCE, key
            checked += 1
    assert checked


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_one_pass_over_a_chain_and_teacher_forcing(goldens, name):
    model, conditions, io, _ = load_case(goldens, name)
    state, logits = model.start(conditions, 1.0)
    rest = state.extend(io["tokens"][:, :-1])
    ours = torch.cat([logits[:, None], rest], dim=1)
    assert relative_error(ours, io["logits_cond"]) < TOLERANCE
    network = model.transformer
    if network.is_text_conditional:
        rows, valid = network.cls_embedding(io["caption_features"]), io["caption_mask"].bool()
    else:
        rows, valid = network.cls_embedding(io["class_ids"]), None
    with torch.no_grad():
        forced = network.teacher_forced(rows, io["tokens"], valid)
    assert relative_error(forced, io["logits_cond"]) < TOLERANCE


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_guidance_is_one_doubled_batch(goldens, name):
    model, conditions, io, _ = load_case(goldens, name)
    ours = one_by_one(model, conditions, io["tokens"], 2.5)
    cond, null = io["logits_cond"], io["logits_null"]
    assert relative_error(ours, null + 2.5 * (cond - null)) < TOLERANCE
    state, _ = model.start(conditions, 2.5)
    assert state.cache.keys.shape[1] == 2 * len(conditions)
    state, _ = model.start(conditions, 1.0)
    assert state.cache.keys.shape[1] == len(conditions)


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("sampler", ["ar", "sjd"])
def test_greedy_generation(goldens, name, sampler):
    model, conditions, io, _ = load_case(goldens, name)
    keys = [key for key in io if key.startswith("greedy_cfg_")]
    assert keys or name == "gpt_c2i_gqa"
    for key in keys:
        scale = float(key.removeprefix("greedy_cfg_"))
        out = get_sampler(sampler, temperature=0.0)(
            model, conditions, seeds=[0, 1, 2], guidance_scale=scale
        )
        assert torch.equal(out.tokens, io[key]), key


def test_grouped_queries_are_read_off_the_tensors(goldens):
    model, _, _, sizes = load_case(goldens, "gpt_c2i_gqa")
    assert model.transformer.config["num_kv_heads"] == sizes["n_kv_head"]
    state, _ = model.start([0], 1.0)
    assert state.cache.keys.shape[2] == sizes["n_kv_head"]


@pytest.mark.parametrize("name", ["vq16", "vq8"])
def test_vq_tokenizer(goldens, name):
    folder = goldens / "llamagen"
    io = load_file(folder / f"{name}.io.safetensors")
    tokenizer = LlamaGenTokenizer.from_official(folder / f"{name}.pt")
    with torch.no_grad():
        assert relative_error(tokenizer.pre_quant(io["pixels"]), io["pre_quant"]) < TOLERANCE
        assert torch.equal(tokenizer.encode(io["pixels"]), io["indices"])
        assert relative_error(tokenizer.decode(io["random_indices"]), io["decoded"]) < TOLERANCE
        assert relative_error(tokenizer.decode(io["indices"]), io["reconstruction"]) < TOLERANCE


@pytest.mark.parametrize("size", ["B", "L", "XL", "XXL", "3B"])
def test_official_sizes_on_the_meta_device(size):
    """Parameter counts of the published models, from heads and widths alone (in millions)."""
    from arvision.models import LlamaGenTransformer

    layers, heads, width, millions = {
        "B": (12, 12, 768, 110.9),
        "L": (24, 16, 1024, 342.9),
        "XL": (36, 20, 1280, 774.7),
        "XXL": (48, 24, 1536, 1411),
        "3B": (24, 32, 3200, 3097),
    }[size]
    with torch.device("meta"):
        model = LlamaGenTransformer(num_layers=layers, num_heads=heads, hidden_size=width)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert abs(count - millions) <= max(0.051, 0.0005 * millions)
