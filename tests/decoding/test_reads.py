"""How often a pass waits for its device: once, whatever the sampler and whatever drafts the text."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from forms import short_where
from text_models import random_prompts, tiny_llama

import arvision
from arvision import get_sampler
from arvision.counting import count_calls
from arvision.decoding.run import Run
from arvision.testing import tiny_llamagen
from arvision.text.drafters.head_drafter import HeadDrafter
from arvision.text.drafters.heads import MedusaHeads

SAMPLERS = {
    "ar": 1,
    "sjd": 1,
    "sjd:coupling=maximal": 1,
    "sjd:coupling=independent": 1,
    "sjd:coupling=maximal:reuse=0.2": 1,
    "sjd:init=memory": 1,
    "sjd:tree=drift:window=8": 1,
    "sjd:tree=drift:window=8:min_share=0.05": 1,
    "sjd:tree=static:coupling=maximal:window=8": 1,
    "gsd": 1,
    "lantern": 1,
    "draft:max_draft=3": 1,
    "draft:max_draft=3:coupling=maximal": 1,
    "zipar": 1,
    "pjd": 1,
}
"""Reads of a pass at most."""

DRAFTERS = {
    None: 1,
    "prompt_lookup": 1,
    "token_recycling": 1,
    "prompt_lookup+token_recycling": 1,
    "trigram": 1,
    "jacobi": 1,
    "layer_skip": 1,
    "nested_exit": 1,
    "superposed": 4,  # every level of its drafts is told apart by n-grams on the host
    "heads": 1,
    "chain": 1,
    "dyspec": 1,
    "dyspec_drawn": 1,
    "sequoia": 1,
    "distinct": 1,
    "beam": 1,
}


@pytest.fixture
def reads(monkeypatch):
    """Reads of each pass after the first, up to the one in which a row first ends."""
    counts: list[int] = []
    tell = Run.tell

    def told(run: Run, *given: Any, **more: Any) -> None:
        tell(run, *given, **more)
        seen = calls.num_reads
        if not bool((run.lengths >= run.num_tokens).any()):
            counts.append(seen)
        calls.num_reads = 0

    monkeypatch.setattr(Run, "tell", told)
    with count_calls() as calls:
        yield lambda: counts[2:]


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_read_once_a_pass(name, reads):
    model = tiny_llamagen().to(torch.float64)
    sampler = get_sampler(name)
    if sampler.needs:
        sampler = sampler.bind(draft=tiny_llamagen().to(torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # windows cut to the tiny image
        sampler(model, [0, 1], seeds=[3, 4], guidance_scale=2.0)
    assert reads()
    assert max(reads()) <= SAMPLERS[name]


FIXED = [None, "jacobi", "token_recycling", "heads"]
FIXED += ["chain", "dyspec", "sequoia", "distinct", "beam"]
CASES = [(name, mode) for name in DRAFTERS for mode in (None, "eager") if not mode or name in FIXED]


@pytest.mark.parametrize(
    ("name", "mode", "temperature"),
    short_where(
        lambda name, mode, temperature: temperature == (CASES.index((name, mode)) % 2),
        [(*case, temperature) for case in CASES for temperature in (0.0, 1.0)],
    ),
)
def test_text_reads_once_a_pass(name, mode, temperature, reads):
    options: dict[str, Any] = {}
    drafter: Any = name
    if name == "heads":
        drafter = HeadDrafter(MedusaHeads(32, 2).double())
    elif name in ("chain", "dyspec", "dyspec_drawn", "sequoia", "distinct", "beam"):
        options["drafter_options"] = {"draft": tiny_llama(seed=1), "expansion": name}
        drafter = "draft_model"
    out = arvision.generate(
        tiny_llama(),
        random_prompts((5, 9)),
        drafter=drafter,
        max_new_tokens=20,
        temperature=temperature,
        compile=mode,
        **options,
    )
    assert out.stats.step == (mode or "loop")
    assert reads()
    assert max(reads()) <= DRAFTERS[name]


def test_the_count_sees_a_read(reads):
    """The tests above can fail: a callback that looks at a tensor is seen."""
    model = tiny_llamagen()
    looks: list[Any] = []
    get_sampler("ar")(
        model,
        [0],
        seeds=[0],
        on_step=lambda number, progress: looks.append(progress["tokens"].tolist()),
    )
    assert max(reads()) == 2
