"""How many files of the package one step walks through, by `sys.setprofile`.

    python -m benchmarks.rooms

A step is one round of the decoding loop: what runs between two calls of the step callback.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
import transformers

import arvision
from arvision.contracts import TokenModel
from arvision.decoding.loop import FixedWindow, decode_tokens
from arvision.decoding.run import Run
from arvision.decoding.verify import greedy
from arvision.text.generation import make_drafter
from arvision.text.model import HFCausalLM

PACKAGE = Path(arvision.__file__).parent
STEP = 3
"""Which step is counted: the first ones fill caches."""


class Rooms:
    """Counts the calls into each file of the package during one step of a run."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            self.calls[str(Path(frame.f_code.co_filename).relative_to(PACKAGE))] += 1

    def on_step(self, step: int) -> None:
        """Count from the end of step `STEP - 1` to the end of step `STEP`."""
        if step == STEP - 1:
            sys.setprofile(self._note)
        elif step == STEP:
            sys.setprofile(None)


def sjd_on_llamagen(rooms: Rooms) -> None:
    """Two images of `llamagen-fashion`, window 16."""
    pipe = arvision.load("llamagen-fashion", device="cpu")
    sampler = arvision.get_sampler("sjd", window=16)
    sampler(
        pipe.model,
        [1, 2],
        seeds=[0, 1],
        guidance_scale=3.0,
        on_step=lambda step, _: rooms.on_step(step),
    )


def recycling_on_llama(rooms: Rooms) -> None:
    """Token Recycling on a tiny Llama with random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    network = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(8)
    drafter = make_drafter("token_recycling")
    lm = HFCausalLM(network, 40)
    decode_tokens(
        cast(TokenModel, lm),
        [ids],
        Run(1, 40, [0], lambda step, _: rooms.on_step(step)),
        drafter=drafter,
        rule=greedy,
        shape=lambda logits: logits,
        policy=FixedWindow(16),
    )


def count(run: Callable[[Rooms], None]) -> Counter[str]:
    """Calls per file of one step."""
    rooms = Rooms()
    try:
        run(rooms)
    finally:
        sys.setprofile(None)
    return rooms.calls


def main() -> None:
    """Print the files of a step of each kind, the busiest first."""
    for run in (sjd_on_llamagen, recycling_on_llama):
        calls = count(run)
        print(f"{run.__name__}: {len(calls)} files")
        for name, num in calls.most_common():
            print(f"    {num:5d} calls  {name}")


if __name__ == "__main__":
    main()
