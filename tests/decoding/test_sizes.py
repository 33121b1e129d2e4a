"""What passes draw and copy: no more noise than places, and never the whole cache."""

from __future__ import annotations

import pytest
import torch
from elsewhere import ELSEWHERE, Elsewhere
from text_models import random_prompts, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

import arvision
from arvision.decoding import noise as noise_module
from arvision.decoding.cache import KVCache
from arvision.decoding.flow import FlowMap
from arvision.decoding.noise import Noise
from arvision.decoding.tree import topology_of
from arvision.decoding.verify import Round, gumbel_coupling
from arvision.samplers import get_sampler
from arvision.testing import tiny_llamagen


@pytest.fixture
def places_drawn(monkeypatch):
    """How many places noise was computed for; without the table that small runs look it up in."""
    monkeypatch.setattr(noise_module, "MEMO_ELEMENTS", 0)
    real, counted = noise_module._gumbel, []

    def spy(identities, positions, num):
        counted.append(positions.numel())
        return real(identities, positions, num)

    monkeypatch.setattr(noise_module, "_gumbel", spy)
    return counted


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"window": 16, "local_window": 2}])
@pytest.mark.parametrize("name", ["pjd", "zipar"])
def test_rows_in_parallel_draw_for_their_own_places_alone(name, options, places_drawn, monkeypatch):
    model = tiny_llamagen(grid=(6, 6))
    options = {k: v for k, v in options.items() if name == "pjd" or k != "window"}
    sampler = get_sampler(name, **options)
    out = sampler(model, [0, 1], seeds=[3, 4], guidance_scale=1.5)
    # Every candidate once, and every guess when it is made; the first tokens.
    assert sum(places_drawn) <= out.stats["candidates"] + 2 * 36 + 2
    monkeypatch.undo()
    again = sampler(model, [0, 1], seeds=[3, 4], guidance_scale=1.5)
    assert torch.equal(out.tokens, again.tokens)


def test_candidates_at_one_depth_share_their_noise(places_drawn):
    own = torch.tensor([[-1, -1, 0, 0, 1, 2], [-1, 0, 0, 0, -1, 4]])
    vocab, generator = 5, torch.Generator().manual_seed(0)
    laws = torch.randn(2, 7, vocab, generator=generator, dtype=torch.float64).log_softmax(-1)
    drafts = torch.randint(vocab, (2, 6), generator=generator)
    drafts[1, 4:] = -1

    def judged(shape):
        offsets = torch.cat([torch.zeros_like(shape.depths[..., :1]), shape.depths + 1], dim=-1)
        positions = torch.tensor([[10], [20]]) + offsets
        return gumbel_coupling(Round(drafts, None, laws, positions, Noise([1, 2]), 3, shape))

    whole, told = judged(topology_of(own)), judged(topology_of(own, 3))
    assert places_drawn == [2 * 7, 2 * 4]
    assert torch.equal(whole.counts, told.counts)
    for row, count in enumerate(told.counts.tolist()):
        assert torch.equal(whole.tokens[row, :count], told.tokens[row, :count])
    places_drawn.clear()
    judged(topology_of(own[0]))
    assert places_drawn == [2 * 4]


@pytest.mark.parametrize("drafter", ["trigram", "token_recycling"])
def test_trees_of_text_draw_once_per_depth(drafter, places_drawn, monkeypatch):
    network, prompts = tiny_llama(), random_prompts([6] * 8, seed=1)
    run = {"max_new_tokens": 10, "temperature": 1.0, "drafter": drafter}
    out = arvision.generate(network, prompts, **run)
    candidates = 8 * sum(out.stats["windows"])
    assert 0 < sum(places_drawn) < 0.75 * candidates
    monkeypatch.undo()
    assert arvision.generate(network, prompts, **run).tokens == out.tokens


@pytest.mark.parametrize("expansion", ["dyspec", "sequoia"])
def test_a_draft_model_draws_once_per_level(expansion, places_drawn):
    draft = tiny_llama(seed=1, num_hidden_layers=1)
    options = {"draft": draft, "expansion": expansion, "num_draft": 12, "max_depth": 3}
    out = arvision.generate(
        tiny_llama(),
        random_prompts([6] * 4, seed=1),
        max_new_tokens=8,
        temperature=1.0,
        drafter="draft_model",
        drafter_options=options,
    )
    # Three levels of drafts and at most four places of judging in each pass, and the prefill.
    assert sum(places_drawn) <= 4 * (out.stats.forward_passes * (3 + 4) + 1)


class Largest(TorchDispatchMode):
    """The largest tensor, in bytes, that an operation makes new memory for."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else [out]:
            given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("rows", [[0, 1, 2], [1, 2, 3], [0, 3], [3, 1], []])
def test_rows_leave_a_cache_in_place(rows):
    cache = KVCache(6, 4, 2, 9, 3, device=torch.device("cpu"), dtype=torch.float32)
    cache.keys.normal_()
    cache.values.normal_()
    cache.advance(torch.tensor([1, 2, 3, 4]), [1, 2, 3, 4])
    keys, values = cache.keys.clone(), cache.values.clone()
    at, size = cache.keys.untyped_storage().data_ptr(), cache.keys.untyped_storage().nbytes()
    with Largest() as largest:
        cache.select(torch.tensor(rows, dtype=torch.int64))
    assert largest.bytes <= size / 6  # one layer's
    assert cache.keys.untyped_storage().data_ptr() == at
    assert torch.equal(cache.keys, keys[:, rows])
    assert torch.equal(cache.values, values[:, rows])
    assert cache.host_lengths == [row + 1 for row in rows]


@pytest.mark.parametrize("kind", ["image", "guided image", "text"])
def test_a_finished_row_costs_no_second_cache(kind):
    if kind == "text":
        from arvision.text import HFCausalLM

        model = HFCausalLM(tiny_llama(num_hidden_layers=8), 200)
        state, _ = model.start([[1, 2, 3]] * 8, 1.0)
    else:
        model = tiny_llamagen(grid=(12, 12), num_layers=8)
        state, _ = model.start([0, 1] * 4, 2.0 if kind == "guided image" else 1.0)
    size = state.cache.keys.untyped_storage().nbytes()
    with Largest() as largest:
        state.select(torch.tensor([0, 1, 2, 4, 5, 6, 7]))
    assert largest.bytes <= size / 8


def test_the_flow_map_takes_blocks_for_the_device():
    flow = FlowMap(torch.randn(512, 4))
    laws, points = torch.zeros(2048, 512), torch.zeros(2048, 4)
    assert len(flow._blocks(laws, points)[0]) == 4  # of a core's cache
    with Elsewhere():
        blocks, _ = flow._blocks(laws.to(ELSEWHERE), points.to(ELSEWHERE))
    assert len(blocks) == 1
