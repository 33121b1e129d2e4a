"""How long does a token take: a class's own generate, our `ar`, our `sjd`, at equal settings?

    python -m benchmarks.hf_image [--hidden 768] [--layers 12] [--side 16] [--rounds 3] [--dtype bfloat16]
    python -m benchmarks.hf_image --memory

Image networks of transformers at a middling size with random weights, one image per call, in the type
that the weights are published in. Correctness first: greedy tokens of all three are the same (in
float64, at a small size, by the tests). Then the three take turns in one process, in CPU seconds.
Random weights say nothing about how many tokens `sjd` accepts on a trained network; passes are given
beside the time.

With `--memory` bytes are counted and nothing is timed: the most bytes of tensors that lived at once
during a call, beyond those before it, and the bytes of our cache. In float32 on a CPU two rows of a product cost about
twice as much as one (`rows`), so that a batch of two branches gains little there over two calls; in
bfloat16 they cost the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from arvision import get_sampler
from arvision.models import Chameleon, Emu3, GlmImage, Janus

from .common import alternate, save, summary
from .memory import peak_bytes

t: Any = transformers
SETTINGS: dict[str, Any] = {"temperature": 1.0, "top_k": 50}


def text_sizes(options: argparse.Namespace) -> dict[str, Any]:
    """Sizes of a language model."""
    return {
        "hidden_size": options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.hidden // 64,
        "num_key_value_heads": options.hidden // 64,
        "intermediate_size": 3 * options.hidden,
        "max_position_embeddings": 4096,
    }


def prompt_of(options: argparse.Namespace, last: list[int]) -> torch.Tensor:
    """Random text [1, L] before what opens an image."""
    draw = torch.Generator().manual_seed(0)
    text = torch.randint(200, 900, (options.prompt,), generator=draw)
    return torch.cat([text, torch.tensor(last)])[None]


def forced(sequence: list[int | None], codes: list[int], length: int) -> Callable[..., list[int]]:
    """A prefix function for generate."""

    def allowed(_: int, prefix: torch.Tensor) -> list[int]:
        found = sequence[len(prefix) - length]
        return codes if found is None else [found]

    return allowed


def glm(options: argparse.Namespace) -> tuple[Any, torch.Tensor, float, Callable[[], Any]]:
    """GLM-Image: no guidance."""
    config = t.GlmImageConfig(
        text_config={
            **text_sizes(options),
            "vocab_size": 20000,
            "vision_vocab_size": 16512,
            "pad_token_id": 19999,
            "eos_token_id": 16385,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [8, 12, 12],
            },
        },
        vision_config={"depth": 1, "hidden_size": 64, "num_heads": 1, "intermediate_size": 64},
        vq_config={"embed_dim": 16, "latent_channels": 64},
        image_token_id=19998,
    )
    network = t.GlmImageForConditionalGeneration(config).eval()
    ids, side = prompt_of(options, [16384]), options.side
    model = GlmImage(network, grids=[(side, side)])

    def own() -> Any:
        return network.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            image_grid_thw=torch.tensor([[1, side, side]]),
            images_per_sample=torch.tensor([1]),
            max_new_tokens=side * side,
            do_sample=True,
            suppress_tokens=list(range(16384, 16512)),
            **SETTINGS,
        )

    return model, ids[0], 1.0, own


def janus(options: argparse.Namespace) -> tuple[Any, torch.Tensor, float, Callable[[], Any]]:
    """Janus: guidance in one batch of two rows."""
    side, width = options.side, options.hidden
    vision = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = t.JanusConfig(
        text_config=t.LlamaConfig(vocab_size=20000, **text_sizes(options)),
        vision_config={
            **vision,
            "image_size": 16 * side,
            "patch_size": 16,
            "projection_dim": width,
            "num_image_tokens": side * side,
        },
        vq_config={
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "num_patches": side,
            "projection_dim": width,
            "image_token_embed_dim": width,
        },
        image_token_id=19999,
    )
    network = t.JanusForConditionalGeneration(config).eval()
    ids = prompt_of(options, [2])
    settings = t.GenerationConfig(
        do_sample=True,
        guidance_scale=3.0,
        bos_token_id=1,
        pad_token_id=0,
        generation_kwargs={"boi_token_id": 2},
        max_length=ids.shape[1] + side * side,
        **SETTINGS,
    )
    network.generation_config = settings

    def own() -> Any:
        # The class changes the configuration that it is given.
        return network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_mode="image",
            generation_config=t.GenerationConfig(**settings.to_dict()),
        )

    return Janus(network), ids[0], 3.0, own


def emu3(options: argparse.Namespace) -> tuple[Any, torch.Tensor, float, Callable[[], Any]]:
    """Emu3: guidance in two calls per token, a forced line end per row."""
    codes = list(range(1000, 1000 + 16384))
    names = {f"<|visual token {k:06d}|>": code for k, code in enumerate(codes)}
    names |= {"<|extra_200|>": 100, "<|extra_201|>": 101, "<|image end|>": 102, "<image>": 103}
    config = t.Emu3Config(
        text_config={
            **text_sizes(options),
            "vocab_size": 18000,
            "bos_token_id": 104,
            "eos_token_id": 105,
            "pad_token_id": 106,
        },
        vq_config={
            "codebook_size": 16384,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "hidden_size": 32,
            "attn_resolutions": [],
        },
        vocabulary_map=names,
    )
    network = t.Emu3ForConditionalGeneration(config).eval()
    side, ids = options.side, prompt_of(options, [107])
    line: list[int | None] = [*[None] * side, 100]
    sequence = [*line * side, 101, 102, 105]

    def own() -> Any:
        return network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=len(sequence),
            do_sample=True,
            guidance_scale=3.0,
            prefix_allowed_tokens_fn=forced(sequence, codes, ids.shape[1]),
            **SETTINGS,
        )

    return Emu3(network, grids=[(side, side)]), ids[0], 3.0, own


def chameleon(options: argparse.Namespace) -> tuple[Any, torch.Tensor, float, Callable[[], Any]]:
    """Chameleon: as Emu3, without line ends."""
    codes = list(range(4, 4 + 8192))
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    names = {f"IMGIMG{str(k).translate(letters)}Z": code for k, code in enumerate(codes)}
    config = t.ChameleonConfig(
        **text_sizes(options),
        vocab_size=10000,
        vocabulary_map={**names, "<s>": 0, "<racm3:break>": 8197, "<eoss>": 8196},
        pad_token_id=1,
        vq_config={"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1},
    )
    network = t.ChameleonForConditionalGeneration(config).eval()
    # The class bars its own image tokens; its generate is to draw them here.
    network.model.vocabulary_mapping.__dict__["image_tokens"] = []
    side, ids = options.side, prompt_of(options, [8197])
    sequence: list[int | None] = [None] * side**2

    def own() -> Any:
        return network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=side * side,
            do_sample=True,
            guidance_scale=3.0,
            negative_prompt_ids=torch.tensor([[0, 8197]]),
            prefix_allowed_tokens_fn=forced(sequence, codes, ids.shape[1]),
            **SETTINGS,
        )

    return Chameleon(network, grids=[(side, side)]), ids[0], 3.0, own


FAMILIES = {"glm-image": glm, "janus": janus, "emu3": emu3, "chameleon": chameleon}


def memory(
    name: str, model: Any, prompt: torch.Tensor, scale: float, tasks: dict[str, Callable[[], Any]]
) -> dict[str, Any]:
    """Bytes of our cache, and the peaks of all tasks."""
    state, _ = model.start([prompt], scale)
    found: dict[str, Any] = {"cache_bytes": state.cache.keys.nbytes + state.cache.values.nbytes}
    del state
    found["peak_bytes"] = {task: peak_bytes(run)[0] for task, run in tasks.items()}
    print(name, found, flush=True)
    return found


def rows(width: int, dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds of a product with 1, 2 and 16 rows."""
    weight = torch.randn(3 * width, width).to(dtype)
    found = {}
    for num in (1, 2, 16):
        given = torch.randn(num, width).to(dtype)

        def task(given: torch.Tensor = given) -> None:
            for _ in range(40):
                torch.nn.functional.linear(given, weight)

        seconds = alternate({"task": task}, 3, time.process_time)["task"]
        found[str(num)] = 1000 * min(seconds) / 40
    return found


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds per token of one family."""
    torch.manual_seed(0)
    model, prompt, scale, own = FAMILIES[name](options)
    model.to(getattr(torch, options.dtype))
    stats: dict[str, Any] = {}

    def ours(sampler: str) -> Callable[[], None]:
        chosen = get_sampler(sampler, **SETTINGS)

        def run() -> None:
            stats[sampler] = chosen(model, [prompt], seeds=[0], guidance_scale=scale).stats

        return run

    tasks = {"generate": own, "ar": ours("ar"), "sjd": ours("sjd")}
    if options.memory:
        return memory(name, model, prompt, scale, tasks)
    seconds = alternate(tasks, options.rounds, time.process_time)
    num = model.num_tokens
    found: dict[str, Any] = {
        task: summary([1000 * one / num for one in own]) for task, own in seconds.items()
    }
    found["parameters"] = sum(p.numel() for p in model.network.parameters())
    found["passes"] = {task: stats[task].forward_passes for task in ("ar", "sjd")}
    found["ar_speedup"] = found["generate"]["median"] / found["ar"]["median"]
    print(name, {key: found[key] for key in ("parameters", "passes", "ar_speedup")})
    print({task: round(found[task]["median"], 2) for task in tasks}, "ms per token", flush=True)
    return found


def main() -> None:
    """Measure the families and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, usual in (
        ("hidden", 768),
        ("layers", 12),
        ("side", 16),
        ("prompt", 32),
        ("rounds", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--memory", action="store_true", help="count bytes instead of seconds")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    options = parser.parse_args()
    record = {name: measure(name, options) for name in options.families}
    if options.memory:
        save("hf_image_memory", {"options": vars(options), "bytes": record})
        return
    products = rows(options.hidden, getattr(torch, options.dtype))
    save(
        "hf_image",
        {"options": vars(options), "milliseconds_per_token": record, "rows": products},
    )


if __name__ == "__main__":
    main()
