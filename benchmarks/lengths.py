"""Does a length for each row of a batch pay? SmartSpec by row and by batch, beside fixed lengths.

pip install -e ".[bench]"; python -m benchmarks.lengths [--tokens 40]

SmolLM2-135M-Instruct, greedy, one batch of a prompt of each kind of `benchmarks.text_prompts`, of which
two copy from their prompts and two hardly do, drafted by prompt lookup. Passes are those until the
last row is done; "drafts" are those given to the rows, padding left out. Seconds are of the second of two runs.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from arvision import generate
from arvision.decoding.tree import TokenTree
from arvision.text.drafters import PromptLookup
from arvision.text.loading import load_text_model

from .common import save
from .text import model_file
from .text_prompts import PROMPTS


def main() -> None:
    """Measure and write `results/lengths.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    network, tokenizer = load_text_model(model_file(), device="cpu", dtype=torch.float32)
    prompts = [PROMPTS[kind][0] for kind in PROMPTS]
    whole = TokenTree.topology
    drafts = [0]

    def counted(tree: TokenTree, device: torch.device) -> Any:
        drafts[0] += int((tree.tokens >= 0).sum())
        return whole(tree, device)

    rows = []
    for name, num, by_row in (
        ("4 drafts", 4, True),
        ("10 drafts", 10, True),
        ("auto, one length for the batch", "auto", False),
        ("auto, a length for each row", "auto", True),
    ):
        for _ in range(2):
            drafter = PromptLookup()
            PromptLookup.takes_rows = by_row  # of the class: costs are kept by a drafter's options
            drafts[0], TokenTree.topology = 0, counted
            try:
                out = generate(
                    network,
                    prompts,
                    tokenizer=tokenizer,
                    chat=True,
                    max_new_tokens=options.tokens,
                    drafter=drafter,
                    num_draft=num,
                )
            finally:
                TokenTree.topology = whole
        stats = out.stats
        rows.append(
            {
                "lengths": name,
                "passes": stats.forward_passes,
                "tokens_per_pass": stats.tokens_per_pass,
                "drafts": drafts[0],
                "candidates": stats.candidates,
                "seconds": stats.seconds,
            }
        )
        print(rows[-1], flush=True)
    save("lengths", {"tokens": options.tokens, "rows": rows})


if __name__ == "__main__":
    main()
