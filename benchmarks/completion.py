"""Are k continuations from one pass as good as k draws? Perplexity beside nucleus sampling.

pip install -e ".[bench]"; python -m benchmarks.completion [--prompts 16] [--tokens 12]

SmolLM2-135M-Instruct goes on with the first words of paragraphs of Python's reference (the texts of
`help("topics")`, which every Python has). Superposed decoding takes its n-grams from four fifths of
the topics; the paragraphs are from the others. Perplexities are the model's own, of each
continuation behind its prompt, as the geometric mean over prompts: of all k, and of the best.
"Distinct" is the share of different tokens at the same place among the k. Passes are of one row.
"""

from __future__ import annotations

import argparse
import math
import time
from pydoc_data.topics import topics
from typing import Any

import torch

from arvision import complete, generate
from arvision.text.loading import load_text_model
from arvision.text.ngrams import as_ngrams

from .common import save
from .text import model_file

PREFIX = 12
"""Tokens of a paragraph that are given."""


def paragraphs() -> tuple[list[str], list[str]]:
    """Texts to take n-grams from, and paragraphs of other topics."""
    names = sorted(topics)
    held = set(names[::5])
    known = [topics[name] for name in names if name not in held]
    others = [part for name in names if name in held for part in topics[name].split("\n\n")]
    return known, [" ".join(part.split()) for part in others if part[:1].isalpha()]


@torch.no_grad()
def log_perplexity(network: Any, prompt: list[int], row: list[int]) -> float:
    """Mean surprise of a continuation, nats per token."""
    logp = network(torch.tensor([prompt + row])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return -float(logp.gather(1, torch.tensor(row)[:, None]).mean())


def distinct(rows: list[list[int]]) -> float:
    """Share of different tokens at the same place."""
    places = list(zip(*rows, strict=False))
    return sum(len(set(place)) / len(place) for place in places) / len(places)


def main() -> None:
    """Measure and write `results/completion.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--k", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    network, tokenizer = load_text_model(model_file(), device="cpu", dtype=torch.float32)
    known, others = paragraphs()
    grams = as_ngrams(known, tokenizer)
    ids = [tokenizer(text)["input_ids"] for text in others]
    ids = [row[:PREFIX] for row in ids if len(row) > 2 * PREFIX]
    step = len(ids) // options.prompts
    ids = ids[::step][: options.prompts]
    k, num = options.k, options.tokens

    def superposed(prompt: list[int], **more: Any) -> tuple[list[list[int]], int]:
        out = complete(network, prompt, k=k, max_new_tokens=num, **more)
        return out.tokens, out.stats.forward_passes

    def nucleus(prompt: list[int], **more: Any) -> tuple[list[list[int]], int]:
        out = generate(network, [prompt] * k, max_new_tokens=num, **more)
        return out.tokens, sum(out.stats.passes_per_row)

    ways = {
        "superposed, n-grams of the texts": lambda p: superposed(p, ngrams=grams),
        "superposed, without n-grams": superposed,
        "nucleus sampling, top_p 0.9": lambda p: nucleus(p, temperature=1.0, top_p=0.9),
        "sampling, temperature 0.5": lambda p: nucleus(p, temperature=0.5),
    }
    rows = []
    for name, way in ways.items():
        means, bests, apart, passes, started = [], [], [], 0, time.perf_counter()
        made = [way(prompt) for prompt in ids]
        seconds = time.perf_counter() - started
        for prompt, (found, spent) in zip(ids, made, strict=True):
            values = [log_perplexity(network, prompt, row) for row in found]
            means += values
            bests.append(min(values))
            apart.append(distinct(found))
            passes += spent
        rows.append(
            {
                "way": name,
                "perplexity": math.exp(sum(means) / len(means)),
                "best": math.exp(sum(bests) / len(bests)),
                "distinct": sum(apart) / len(apart),
                "passes": passes / len(ids),
                "seconds": seconds / len(ids),
            }
        )
        print(rows[-1], [tokenizer.decode(row) for row in made[0][0]], flush=True)
    save("completion", {"k": k, "tokens": num, "prompts": len(ids), "ways": rows})


if __name__ == "__main__":
    main()
