"""One network in several threads: each draws what it would draw alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from text_models import random_prompts, tiny_llama

import arvision


@pytest.mark.parametrize("drafter", [None, "token_recycling", "layer_skip", "nested_exit"])
def test_threads_do_not_meet_in_a_network(drafter):
    network = tiny_llama()
    jobs = [(random_prompts([4 + k % 3, 7], seed=k), k) for k in range(8)]

    def draw(job):
        prompts, seed = job
        options = {"temperature": 1.0, "seed": seed, "max_new_tokens": 10}
        # Every other one runs all layers while the others skip some.
        return arvision.generate(
            network, prompts, drafter=drafter if seed % 2 else None, **options
        ).tokens

    wanted = [draw(job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert list(pool.map(draw, jobs)) == wanted
