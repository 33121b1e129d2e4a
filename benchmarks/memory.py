"""What a draw holds at its peak beside the weights, over its cache and the logits of its largest pass.

Bytes of all tensors that are alive, counted by the profiler, on a CPU.

    python -m benchmarks.memory
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from arvision import ARPipeline, generate, get_sampler, load
from arvision.decoding.cache import KVCache

from .common import save

SPECS = (
    "ar",
    "sjd:window=16",
    "sjd:window=16:coupling=maximal",
    "draft",
    "sjd:window=32:tree=drift",
)
GUIDANCE = 3.0
TREE_ROOM = 128
"""Positions of a text's cache behind the last token, for candidates."""


def peak_bytes(draw: Callable[[], Any]) -> tuple[int, Any]:
    """Most bytes of tensors made by `draw` that were alive at once, and what it gave."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as made:
        out = draw()
    found: Any = made.profiler
    events = [event for event in found.kineto_results.events() if event.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most, out


def of_images(pipe: ARPipeline, spec: str, batch: int) -> dict[str, float]:
    """A draw of `batch` images with guidance; of a draft model the cache counts, too."""
    sampler, model = pipe.bind(get_sampler(spec), pipe.model), pipe.model

    def draw() -> Any:
        classes = [image % 10 for image in range(batch)]
        return sampler(model, classes, seeds=list(range(batch)), guidance_scale=GUIDANCE)

    draw()
    most, out = peak_bytes(draw)
    models = [model, *(sampler.bound(name) for name in sampler.needs)]
    caches = [_cache_bytes(one, batch) for one in models]
    return _ratio(most, sum(caches), 2 * batch * max(out.stats["windows"]) * model.vocab_size * 4)


def of_text(
    network: Any, prompts: list[list[int]], drafter: str | None, new: int
) -> dict[str, float]:
    """Prompts continued greedily: at a temperature a CPU keeps up to 32 MiB of noise besides."""
    config, weight = network.config, network.get_input_embeddings().weight

    def draw() -> Any:
        options: dict[str, Any] = {"max_new_tokens": new}
        return generate(network, prompts, drafter=drafter, **options)

    draw()
    most, out = peak_bytes(draw)
    windows = out.stats.get("windows") or [1]
    places = max(map(len, prompts)) + new + TREE_ROOM
    heads = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    cache = len(prompts) * places * heads * weight.element_size()
    # Of the prompt, too, the logits of the last place alone are made.
    logits = len(prompts) * max(windows) * len(weight) * weight.element_size()
    return _ratio(most, cache, logits)


def _cache_bytes(model: Any, batch: int) -> int:
    state: Any = model.start([0] * batch, GUIDANCE)[0]
    cache: KVCache = state.cache
    return 2 * cache.keys.numel() * cache.keys.element_size()


def _ratio(most: int, cache: int, logits: int) -> dict[str, float]:
    return {"peak": most, "cache": cache, "logits": logits, "ratio": most / (cache + logits)}


def main() -> None:
    """Measure and write `results/memory.json`."""
    torch.set_num_threads(1)
    pipe = load("llamagen-fashion")
    record: dict[str, Any] = {}
    for spec in SPECS:
        for batch in (1, 8):
            name = f"llamagen-fashion {spec} batch {batch}"
            record[name] = of_images(pipe, spec, batch)
            print(name, f"{record[name]['ratio']:.2f}", flush=True)
    save("memory", record)


if __name__ == "__main__":
    main()
