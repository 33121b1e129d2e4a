"""What a draw holds, what it tells of it, and what it refuses before anything is allocated."""

from __future__ import annotations

import pytest
import torch
from forms import slow
from text_models import random_prompts, tiny_llama

from arvision import ARPipeline, InputError, generate, get_sampler, load, memory
from arvision.batches import joined
from arvision.contracts import Stats
from arvision.testing import tiny_llamagen
from benchmarks.memory import of_images, of_text

ROOM = 1.3
"""Peak beyond the weights, over cache and logits."""


@pytest.mark.parametrize(
    "spec", [slow("ar"), "sjd:window=16", slow("sjd:window=16:coupling=maximal"), "draft"]
)
def test_little_is_held_beside_cache_and_logits(spec):
    found = of_images(load("llamagen-fashion"), spec, batch=4)
    assert 1 < found["ratio"] <= ROOM, found


def test_of_a_language_model_too():
    network = tiny_llama(
        vocab_size=1024, hidden_size=64, num_key_value_heads=4, num_hidden_layers=6
    ).float()
    found = of_text(network, random_prompts([64] * 4), "prompt_lookup", 96)
    assert 0.5 < found["ratio"] <= ROOM, found


def test_a_peak_is_told_where_there_is_an_accelerator(monkeypatch):
    model = tiny_llamagen(grid=(2, 2))
    samples = get_sampler("ar")(model, [0], seeds=[0])
    assert samples.stats["peak_memory"] is None
    assert generate(tiny_llama(), [[1, 2]], max_new_tokens=2).stats.peak_memory is None
    calls = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", calls.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 1234)
    with memory.Peak(torch.device("cuda")) as peak:
        assert calls
    assert peak.bytes == 1234
    part = {"passes_per_image": [1], "tokens": 1}
    both = joined([Stats(peak_memory=5, **part), Stats(peak_memory=7, **part)])
    assert both.peak_memory == 7


def test_an_image_too_large_is_refused_in_gib(monkeypatch):
    pipe = ARPipeline.from_model(tiny_llamagen())
    monkeypatch.setattr("arvision.memory.free_bytes", lambda *_: 9000)
    passes = []
    monkeypatch.setattr(pipe.transformer, "forward", lambda *_, **__: passes.append(1))
    with pytest.raises(InputError, match=r"one image would take about .*KiB.* lower the size"):
        pipe("cat", seed=0)
    assert not passes
    assert memory.in_words(3.2 * 2**30) == "3.2 GiB"
