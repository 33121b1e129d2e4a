"""Suffix decoding: substrings counted exactly, trees by frequency, lengths by match, memory bounded."""

from __future__ import annotations

import random

import pytest
import torch
from text_models import greedy_reference, random_prompts, tiny_llama

import arvision
from arvision import InputError
from arvision.decoding.noise import Noise
from arvision.text.drafters import PastOutputs, SuffixDecoding
from arvision.text.drafters.suffix import SuffixAutomaton


def proposed(drafter, prompt, num):
    """Tokens and parents that a drafter proposes after a prompt and its last token."""
    drafter.start(Noise([0]), 64, 64)
    drafter.attach(None, [prompt[:-1]])
    tokens = torch.zeros(1, 64, dtype=torch.int64)
    tokens[0, 0] = prompt[-1]
    tree = drafter.propose(tokens, torch.tensor([1]), num, 1)
    return tree.tokens[0].tolist(), None if tree.parents is None else tree.parents.tolist()


def occurrences(text, part):
    return sum(text[i : i + len(part)] == part for i in range(len(text) - len(part) + 1))


@pytest.mark.parametrize("seed", range(4))
def test_an_automaton_counts_every_substring_as_a_search_does(seed):
    rng = random.Random(seed)
    text = [rng.randrange(3) for _ in range(60)]
    automaton = SuffixAutomaton()
    for token in text:
        automaton.append(token)
    assert len(automaton.edges) <= 2 * len(text)
    for first in range(60):
        place = 0
        for end in range(first, 60):
            place = automaton.edges[place][text[end]]
            assert automaton.counts[place] == occurrences(text, text[first : end + 1])
    # The longest earlier match of the end of the text, by search.
    place, length = next(automaton.earlier())
    found = [n for n in range(1, 60) if occurrences(text, text[-n:]) > 1]
    assert length == max(found)
    assert automaton.counts[place] == occurrences(text, text[-length:])
    query = [rng.randrange(4) for _ in range(12)]
    found = [n for n in range(1, 13) if occurrences(text, query[-n:])]
    assert next(automaton.find(query), (0, 0))[1] == max(found, default=0)


def test_frequent_continuations_come_first_and_a_long_match_goes_far():
    prompt = [1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2]
    tokens, parents = proposed(SuffixDecoding(), prompt, 3)
    # After (1, 2): 3 twice, 4 once; after (1, 2, 3): 9 and 8 once each.
    assert tokens == [3, 9, 8] or (tokens[0] == 3 and 4 in tokens)
    assert parents is None or parents[0] == -1
    long = [*range(10, 30), *range(10, 20)]
    assert proposed(SuffixDecoding(), long, 8) == (list(range(20, 28)), None)
    # One token matched: as many candidates as the factor says.
    assert proposed(SuffixDecoding(factor=2), [5, 6, 7, 8, 5], 8) == ([6, 7], None)
    assert proposed(SuffixDecoding(), [1, 2, 3], 8) == ([], None)
    # A text that repeats itself goes on doing so.
    assert proposed(SuffixDecoding(), [7, 8, 9, 7, 8, 9, 7], 8)[0] == [8, 9, 7, 8, 9, 7, 8, 9]


def test_past_outputs_are_drafted_in_the_next_text_and_not_their_neighbours():
    network = tiny_llama()
    prompt = random_prompts([9])[0]
    expected = greedy_reference(network, prompt, 40)
    drafter = SuffixDecoding()
    passes = []
    for _ in range(2):
        out = arvision.generate(network, [prompt], drafter=drafter, max_new_tokens=40)
        assert out.tokens == [expected]
        passes.append(out.stats.tokens_per_pass)
    assert passes[1] > passes[0] + 2.0
    past = PastOutputs()
    past.add([1, 2, 3])
    past.add([4, 5, 6])
    # What stood behind an output is no continuation of it.
    assert proposed(SuffixDecoding(past=past), [9, 2, 3], 4)[0] == []
    assert proposed(SuffixDecoding(past=past), [9, 4, 5], 4)[0] == [6]


def test_past_outputs_are_bounded_and_forget_the_oldest():
    past = PastOutputs(capacity=100)
    for start in range(40):
        past.add(list(range(10 * start, 10 * start + 10)))
        assert past.num_tokens <= 100
    assert proposed(SuffixDecoding(past=past), [398], 1)[0] == [399]
    assert proposed(SuffixDecoding(past=past), [8], 1)[0] == []
    past.add(list(range(1000, 2000)))
    assert past.num_tokens <= 100


def test_rows_of_a_batch_have_texts_of_their_own_and_end_by_themselves():
    network = tiny_llama()
    prompts = random_prompts([9, 6, 12])
    out = arvision.generate(network, prompts, drafter="suffix", max_new_tokens=50)
    assert out.tokens == [greedy_reference(network, ids, 50) for ids in prompts]
    assert out.stats.tokens_per_pass > 1.2
    plain = {"max_new_tokens": 30, "temperature": 0.9, "seed": 3}
    drawn = arvision.generate(network, prompts, drafter="suffix", **plain)
    assert drawn.tokens == arvision.generate(network, prompts, **plain).tokens


def test_bad_input_has_one_clear_message():
    with pytest.raises(InputError, match="factor 0"):
        SuffixDecoding(factor=0)
    with pytest.raises(InputError, match="capacity 1"):
        PastOutputs(1)
    with pytest.raises(InputError, match="past 7: expected"):
        SuffixDecoding(past=7)  # pyright: ignore[reportArgumentType]
